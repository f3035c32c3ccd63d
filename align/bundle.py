"""Reference bundles: a recorded run of a trusted trainer, with everything needed to repeat it (format 1).

A bundle is a directory::

    bundle.json          where it comes from, model, training, parallel
    init.safetensors     initial parameters and buffers under Megatron's names
    tokens.npy           [rows, sequence_length + 1] integers; row i holds inputs [:-1] and labels [1:]
    losses.jsonl         what the trusted trainer computed
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.losslog import LossLog
from align.readlog import read_log
from align.tensors import read_tensors
from paddledsv4.config import ModelConfig, ParallelConfig, TrainConfig
from paddledsv4.errors import UserError
from paddledsv4.numerics.settings import with_environment

FORMAT = 1
SHIPPED = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; ``tokens`` is an integer array [rows, sequence_length + 1] within the vocabulary."""

    path: Path
    name: str
    model: ModelConfig
    training: TrainConfig
    parallel: ParallelConfig
    source: dict[str, Any]
    tokens: np.ndarray

    def init(self) -> dict[str, np.ndarray]:
        """Megatron's name -> initial value; bf16 tensors come as the float32 numbers that they hold.

        Raises:
            UserError: the file is missing, truncated or no safetensors file, or a tensor holds NaN or Inf.
        """
        path = self.path / "init.safetensors"
        state = read_tensors(path)
        for name, value in state.items():
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                bad = int(value.size - np.isfinite(value).sum())
                raise UserError(
                    f"{path}: tensor {name} holds NaN or Inf in {bad} of {value.size} elements; "
                    "a run cannot start from it: capture the bundle again"
                )
        return state

    def losses(self) -> LossLog:
        """The recorded losses.

        Raises:
            UserError: losses.jsonl is missing, has a malformed, duplicate or truncated line, or lacks a loss.
        """
        path = self.path / "losses.jsonl"
        log, issues = read_log(path, name=str(path)).resolve()
        if issues:
            raise UserError(f"{next(iter(issues))} ({issues.count} such in all); fetch the bundle again")
        training, parallel = self.training, self.parallel
        expected = training.steps * training.gradient_accumulation_steps * parallel.data
        for kind, series in (("main", log.main), ("MTP", log.mtp)):
            wanted = expected if kind == "main" or self.model.num_nextn_predict_layers else 0
            if len(series) != wanted:
                raise UserError(
                    f"{path}: {len(series)} {kind} losses, but bundle.json promises {wanted} "
                    "(steps * gradient_accumulation_steps * data); fetch the bundle again"
                )
        return log


def shipped_bundles() -> list[str]:
    """Names of the bundles inside this package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/bundle.json"))


def find_bundle(bundle: str | Path) -> Path:
    """The directory of a bundle given by path, or by name for one shipped with align.

    Raises:
        UserError: there is no such directory.
    """
    path = Path(bundle)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; a bundle is a directory with bundle.json in it")
    if "/" not in str(bundle) and str(bundle) in shipped_bundles():
        return SHIPPED / str(bundle)
    raise UserError(
        f"there is no bundle {bundle}: give a directory or a shipped name ({', '.join(shipped_bundles())})"
    )


def load_bundle(bundle: str | Path) -> Bundle:
    """Read and check bundle.json and tokens.npy; weights and losses are read when asked for.

    Raises:
        UserError: something is missing or malformed; the message names the file and what to do.
    """
    path = find_bundle(bundle)
    described = read_description(path / "bundle.json")
    if "rank" in described:
        raise UserError(f"{path} is what one rank of a job wrote; first put all ranks together with align merge")
    where = f"{path / 'bundle.json'}: "
    model = ModelConfig.from_dict(described["model"], where=where + "model")
    training = with_environment(TrainConfig.from_dict(described["training"], where=str(path / "bundle.json")))
    parallel = ParallelConfig.from_dict(described["parallel"], where=str(path / "bundle.json"))
    tokens = _read_tokens(path / "tokens.npy", model, training, parallel)
    name = described.get("name", path.resolve().name)
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise UserError(
            f"{where}name is {name!r}; it must be a plain name (it becomes part of a directory name)"
        )
    return Bundle(path, name, model, training, parallel, described.get("source", {}), tokens)


def read_description(path: Path) -> dict[str, Any]:
    """bundle.json, with the sections that every bundle has.

    Raises:
        UserError: it is missing, malformed or of another format.
    """
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a reference bundle") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch the bundle again") from None
    if not isinstance(described, dict):
        raise UserError(f"{path} holds a {type(described).__name__}; it must hold a JSON object")
    if described.get("format") != FORMAT or isinstance(described["format"], bool):
        raise UserError(f"{path}: format is {described.get('format')!r}; this align reads format {FORMAT}")
    for section in ("model", "training", "parallel", "source"):
        if section != "source" and section not in described:
            raise UserError(f"{path}: the section {section!r} is missing; fetch the bundle again")
        if not isinstance(described.get(section, {}), dict):
            raise UserError(f"{path}: {section} must be a JSON object, not {described[section]!r}")
    return described


def _read_tokens(
    path: Path, model: ModelConfig, training: TrainConfig, parallel: ParallelConfig
) -> np.ndarray:
    try:
        tokens = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; fetch the bundle again") from None
    except Exception as error:  # of a damaged header numpy's reader makes nearly anything, TokenError included
        raise UserError(f"{path} is truncated or no .npy file ({error}); fetch the bundle again") from None
    if not isinstance(tokens, np.ndarray) or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f"{path} holds {getattr(tokens, 'dtype', 'no single array')}; token ids must be integers"
        )
    columns = training.sequence_length + 1
    if tokens.ndim != 2 or tokens.shape[1] != columns:
        raise UserError(
            f"{path} has shape {list(tokens.shape)}; it must be [rows, {columns}] (sequence_length + 1)"
        )
    rows = training.steps * training.gradient_accumulation_steps * parallel.data * training.micro_batch_size
    if len(tokens) < rows:
        raise UserError(
            f"{path} has {len(tokens)} rows; {training.steps} steps need {rows} "
            "(steps * gradient_accumulation_steps * data * micro_batch_size)"
        )
    outside = (tokens < 0) | (tokens >= model.vocab_size)
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise UserError(
            f"{path}: token id {tokens[row, column]} at row {row}, column {column} is outside "
            f"[0, {model.vocab_size}) (vocab_size)"
        )
    return tokens
