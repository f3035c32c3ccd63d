"""Put the bundles of the ranks of one Megatron job together.

Experts, which every rank counts from 0, get their global numbers; tensors that tensor parallelism splits are joined;
everything else must be equal on every rank that holds it. Tokens go into the order of the global batch, losses keep
their data-parallel rank, and activations stay with the rank that computed them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.bundle import read_description
from align.capture.store import Folder
from align.capture.unify import Holder, unify
from align.logwriter import LossLogWriter
from align.losslog import LossLog, unpack
from align.readlog import read_log
from align.tensors import read_tensors
from paddledsv4.config import ModelConfig
from paddledsv4.errors import UserError
from paddledsv4.weights.names import BUFFERS

PER_STEP = ("param_grads", "optimizer")
PER_MICROBATCH = ("forward", "activation_grads", "choices")


@dataclass(frozen=True)
class Part:
    """What one rank wrote."""

    path: Path
    described: dict[str, Any]

    @property
    def rank(self) -> dict[str, Any]:
        """This rank's place in every kind of parallelism."""
        return self.described["rank"]

    def tokens(self) -> np.ndarray:
        """[rows, sequence_length + 1]."""
        try:
            return np.load(self.path / "tokens.npy", allow_pickle=False)
        except Exception as error:  # of a damaged header numpy's reader makes nearly anything
            raise UserError(f"{self.path / 'tokens.npy'} cannot be read ({error}); capture this rank again") from None

    def losses(self) -> LossLog:
        """The rank's own log."""
        log, issues = read_log(self.path / "losses.jsonl").resolve()
        if issues:
            raise UserError(f"{next(iter(issues))}; capture this rank again")
        return log


def merge(paths: list[Path], out: Path) -> Path:
    """Merge what all ranks of a job wrote into the bundle ``out``; nothing is written when something does not fit.

    Raises:
        UserError: ranks are missing or of different runs, a tensor that should be equal is not (the first is named),
            or the job used pipeline or context parallelism.
    """
    parts = _checked([Part(path, read_description(path / "bundle.json")) for path in paths])
    experts = ModelConfig.from_dict(parts[0].described["model"], where=str(parts[0].path)).n_routed_experts
    holders = [Holder.of(part.rank, part.described, experts, part.path) for part in parts]

    def together(name: str, required: bool = True) -> dict[str, np.ndarray]:
        files = [part.path / name for part in parts]
        if not required and not any(file.exists() for file in files):
            return {}
        return unify(holders, [read_tensors(file, widen=False) for file in files])

    with Folder(out) as folder:
        folder.weights("init.safetensors", together("init.safetensors"))
        np.save(folder.hidden / "tokens.npy", _tokens(parts))
        final = {n: t for n, t in together("final.safetensors").items() if not n.endswith(BUFFERS)}
        digest = hashlib.md5(b"".join(final[n].tobytes() for n in sorted(final)), usedforsecurity=False)
        _write_losses(folder, parts, digest.hexdigest())
        for where in _trace_folders(parts):
            for kind in PER_STEP:
                tensors = together(f"{where}/{kind}.safetensors", required=False)
                if tensors:
                    folder.tensors(f"{where}/{kind}", tensors, norms=kind == "param_grads")
        _write_after_step(folder, parts, holders)
        for part in parts:
            _copy_activations(folder, part)
        described = {k: v for k, v in parts[0].described.items() if k != "rank"}
        folder.json("bundle.json", described | {"name": out.name})
    return folder.path


def _checked(parts: list[Part]) -> list[Part]:
    first = parts[0]
    for part in parts:
        if not isinstance(part.described.get("rank"), dict):
            raise UserError(f"{part.path} is no rank of a captured job: its bundle.json has no section rank")
        for section in ("model", "training", "parallel"):
            if part.described[section] != first.described[section]:
                raise UserError(f"{part.path} and {first.path} are of different runs: {section} differs")
    parallel = first.described["parallel"]
    there = sorted(part.rank["rank"] for part in parts)
    missing = sorted(set(range(parallel["world_size"])) - set(there))
    if missing or len(there) != len(set(there)):
        what = f"rank {missing[0]} is missing" if missing else "a rank is given twice"
        raise UserError(f"align merge wants each of the {parallel['world_size']} ranks once: {what}")
    for kind in ("pipeline", "context"):
        if parallel[kind] > 1:
            raise UserError(f"the job used {kind} parallelism; align merges data, expert and tensor parallel ranks")
    return sorted(parts, key=lambda part: part.rank["rank"])


def _by_data_rank(parts: list[Part]) -> dict[int, list[Part]]:
    """Data-parallel rank -> its tensor-parallel ranks, which saw the same tokens."""
    groups: dict[int, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.rank["data"], []).append(part)
    return dict(sorted(groups.items()))


def _tokens(parts: list[Part]) -> np.ndarray:
    """Rows in the order of the global batch: microbatch by microbatch, in each the data-parallel ranks in order."""
    size, columns = parts[0].described["training"]["micro_batch_size"], []
    for group in _by_data_rank(parts).values():
        tokens = group[0].tokens()
        for other in group[1:]:
            if not np.array_equal(tokens, other.tokens()):
                raise UserError(f"{other.path} saw other tokens than {group[0].path}, its tensor parallel neighbour")
        columns.append(tokens.reshape(-1, size, tokens.shape[1]))
    if len({c.shape for c in columns}) > 1:
        raise UserError("the ranks have different numbers of tokens; capture them in one run")
    return np.stack(columns, 1).reshape(-1, columns[0].shape[-1])


def _write_losses(folder: Folder, parts: list[Part], final_md5: str) -> None:
    groups = _by_data_rank(parts)
    logs = {rank: group[0].losses() for rank, group in groups.items()}
    for group in groups.values():
        for other in group[1:]:
            mine = other.losses()
            if not (np.array_equal(mine.main.md5s, logs[other.rank["data"]].main.md5s)):
                raise UserError(f"{other.path} has other losses than {group[0].path}, its tensor parallel neighbour")
    norms = {rank: dict(_entries(log.grad_norms)) for rank, log in logs.items()}
    for rank, own in norms.items():
        for key, norm in own.items():
            if repr(norm) != repr(norms[0].get(key)):
                raise UserError(f"step {unpack(key).step}: the gradient norm of rank {rank} is not that of rank 0")
    lines = {}
    for log in logs.values():
        mtp = dict(_entries(log.mtp))
        lines |= {key: (value, mtp.get(key)) for key, value in _entries(log.main)}
    with LossLogWriter(folder.hidden / "losses.jsonl", {"merged": [str(part.path) for part in parts]}) as writer:
        for key, norm in sorted(norms[0].items()):
            step = unpack(key).step
            for at in sorted(at for at in lines if unpack(at).step == step):
                writer.losses(*unpack(at), *lines[at])
            writer.grad_norm(step, norm)
        writer.final_weights(final_md5)


def _entries(series: Any) -> list[tuple[int, float]]:
    return list(zip(series.keys.tolist(), series.values.tolist(), strict=True))


def _trace_folders(parts: list[Part]) -> list[str]:
    """Folders of every rank that hold what belongs to a step, relative to the bundle."""
    found = {f.parent.relative_to(p.path).as_posix() for p in parts for f in p.path.glob("trace/**/param_grads.json")}
    also = {f.parent.relative_to(p.path).as_posix() for p in parts for f in p.path.glob("trace/**/optimizer.json")}
    return sorted(found | also)


def _write_after_step(folder: Folder, parts: list[Part], holders: list[Holder]) -> None:
    """MD5s after a step; of a tensor that is split there is none, for an MD5 cannot be joined."""
    for file in parts[0].path.glob("trace/**/after_step*.json"):
        name = file.relative_to(parts[0].path).as_posix()
        merged: dict[str, dict[str, str]] = {"params": {}, "buffers": {}}
        for part, holder in zip(parts, holders, strict=True):
            for kind, md5s in json.loads((part.path / name).read_text()).items():
                for local, md5 in md5s.items():
                    known = merged[kind].setdefault(holder.global_name(local), md5)
                    if known != md5 and not holder.is_split(local):
                        raise UserError(f"{part.path}: {local} after the step is not what the other ranks have")
        split = {holders[0].global_name(n) for n in merged["params"] if holders[0].is_split(n)}
        merged["params"] = {n: md5 for n, md5 in merged["params"].items() if n not in split}
        folder.json(name, merged)


def _copy_activations(folder: Folder, part: Part) -> None:
    own = "" if part.rank["rank"] == 0 else f"/rank{part.rank['rank']:05d}"
    for kind in PER_MICROBATCH:
        for file in part.path.glob(f"trace/**/{kind}.*"):
            to = folder.hidden / f"trace{own}" / file.relative_to(part.path / "trace")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)
