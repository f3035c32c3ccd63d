"""Small logs and bundles for the tests of align."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from align.losslog import LossLog, loss_md5, loss_text
from align.rawlog import RawLog
from align.readlog import read_log

SHIPPED = "tiny-fp32"


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def loss(step: int, microbatch: int, rank: int, kind: str) -> float:
    """A float32 that differs for every position and kind."""
    return float32(6 / (1 + step) + microbatch / 7 + rank / 13 + (0.3 if kind == "mtp" else 0))


def positions(steps: int, microbatches: int = 2, ranks: int = 1) -> Iterator[tuple[int, int, int]]:
    for step in range(1, steps + 1):
        for microbatch in range(microbatches):
            for rank in range(ranks):
                yield step, microbatch, rank


def entry(step: int, microbatch: int, rank: int, main: float | None = None, mtp: float | None = None) -> dict:
    main = loss(step, microbatch, rank, "main") if main is None else main
    mtp = loss(step, microbatch, rank, "mtp") if mtp is None else mtp
    return {
        "step": step, "microbatch": microbatch, "rank": rank,
        "main_loss": loss_text(main), "main_md5": loss_md5(main),
        "mtp_loss": loss_text(mtp), "mtp_md5": loss_md5(mtp),
    }  # fmt: skip


def json_lines(steps: int, microbatches: int = 2, ranks: int = 1) -> list[str]:
    lines = [json.dumps(entry(*position)) for position in positions(steps, microbatches, ranks)]
    return lines + [json.dumps({"step": step, "grad_norm": "1.5"}) for step in range(1, steps + 1)]


def final_lines(steps: int, microbatches: int = 2, ranks: int = 1, order: str = "main-first") -> list[str]:
    kinds = ("main", "mtp") if order == "main-first" else ("mtp", "main")
    lines = []
    for position in positions(steps, microbatches, ranks):
        for kind in kinds:
            value, rank = loss(*position, kind), position[2]
            lines.append(f"per_token_loss: rank={rank} shape=[2, 256] md5={loss_md5(value + 1)}")
            lines.append(f"final_loss: rank={rank} val={value:.20f} md5={loss_md5(value)}")
    return lines


def path_lines(steps: int, microbatches: int = 2, ranks: int = 1) -> list[str]:
    lines = []
    for position in positions(steps, microbatches, ranks):
        main, mtp, rank = loss(*position, "main"), loss(*position, "mtp"), position[2]
        lines.append(
            f"[LOSS_PATH_MD5] rank={rank} loss_sum={main * 512:.20f} loss_sum_md5={loss_md5(main * 512)} "
            f"final_loss={main:.20f} final_loss_md5={loss_md5(main)}"
        )
        lines.append(
            f"[MTP_LOSS_PATH_MD5] rank={rank} mtp1.final_loss={mtp:.20f} mtp1.final_loss_md5={loss_md5(mtp)}"
        )
    return lines


def step_lines(steps: int, microbatches: int = 2, ranks: int = 1) -> list[str]:
    lines = []
    for step, microbatch, rank in positions(steps, microbatches, ranks):
        main, mtp = loss(step, microbatch, rank, "main"), loss(step, microbatch, rank, "mtp")
        prefix = f"[default{rank}]: " if ranks > 1 else ""
        lines.append(
            f"{prefix}step {step} mb {microbatch} loss {main:.20f} md5 {loss_md5(main)} "
            f"mtp {mtp:.20f} md5 {loss_md5(mtp)}"
        )
    return lines


def write(path: Path, lines: list[str], end: str = "\n") -> Path:
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def read(path: Path, **how: object) -> tuple[LossLog, list[str]]:
    raw: RawLog = read_log(path)
    log, issues = raw.resolve(**how)
    return log, list(issues)


def make_bundle(path: Path, steps: int = 2, **changes: dict) -> Path:
    """A tiny bundle whose model section is the shipped one's; ``changes`` update sections of bundle.json."""
    from align.bundle import SHIPPED as DATA

    described = json.loads((DATA / SHIPPED / "bundle.json").read_text())
    described["training"] |= {"steps": steps, "sequence_length": 8}
    for section, values in changes.items():
        described[section] = described[section] | values if isinstance(values, dict) else values
    path.mkdir()
    (path / "bundle.json").write_text(json.dumps(described))
    np.save(path / "tokens.npy", np.arange(steps * 4 * 9, dtype=np.uint16).reshape(-1, 9) % 512)
    save_file(
        {"weight": np.ones((2, 3), np.float32), "table": np.zeros(4, np.int32)}, path / "init.safetensors"
    )
    write(path / "losses.jsonl", json_lines(steps))
    return path
