"""Every fused kernel on one GPU, with torch tensors as carriers: time, rate, share of the ceiling, rivals, errors.

In one call the two ceilings of the device (a large copy, a large bf16 GEMM) are measured beside the kernels, the same
computation in plain torch operations, and other libraries that can be imported. Paddle is not needed. A rival known to
hang has a process of its own; another that does ends the run, which by then has printed and saved all before it, and
the kernel that it was compared with.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
import typer

from benchmarks.kernel_case import Case
from benchmarks.kernel_timing import copy_rate, gemm_rate, milliseconds
from benchmarks.kernels_rival import peer_time, reason, time_alone

EXAMPLES = """Examples:

    python benchmarks/kernels.py

    python benchmarks/kernels.py --family gemm,mhc --quick --json kernels.json

    python benchmarks/kernels.py --family attn --only "sparse attention" --without tilelang
"""
FAMILIES = ("mhc", "attn", "gemm", "layer")


@dataclass
class Result:
    """What was found of a case; ``peers`` has milliseconds, or in words why there are none, and ``remarks`` what is to
    be said of some of these times."""

    name: str
    ms: float = 0.0
    rate: float = 0.0
    share: float = 0.0
    bound: str = ""
    error: float = float("nan")
    limit: float = 0.0
    unfused_ms: float | None = None
    peers: dict[str, float | str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    goal: str = ""
    failure: str = ""

    @property
    def right(self) -> bool:
        """Whether the kernel ran and its error is within its limit; NaN is not."""
        return not self.failure and self.error <= self.limit


def measure(case: Case, ceilings: dict[str, float]) -> Result:
    """Checks, then times ``case``."""
    found = Result(case.name, bound=case.bound, limit=case.limit)
    try:
        found.error = case.check()
        found.ms = milliseconds(case.ours, case.graph)
        found.rate = case.work / found.ms * 1e3
        found.share = found.rate / ceilings[case.bound]
    except Exception as error:
        found.failure = reason(error)
    return found


def measure_rivals(case: Case, found: Result, without: list[str], module: str) -> None:
    """Adds to ``found`` the times of plain torch and of libraries not named in ``without``, and the verdict."""
    if case.unfused is not None:
        unfused = peer_time(lambda: case.unfused, case.graph)
        found.unfused_ms = unfused if isinstance(unfused, float) else None
    for name, make in case.peers.items():
        gc.collect()
        torch.cuda.empty_cache()  # which a process of its own would lack
        if name in without:
            found.peers[name] = "left out"
        elif name in case.alone:
            found.peers[name], remark = time_alone(module, case.name, name)
            found.remarks |= {name: remark} if remark else {}
        else:
            found.peers[name] = peer_time(make, case.graph)
    found.goal = verdict(case, found)


def verdict(case: Case, found: Result) -> str:
    """Whether the goal is met, in words; "" for a case without one, or with a wrong result."""
    if case.goal is None or not found.right:
        return ""
    if case.rival is None:
        return f"{'met' if found.share >= case.goal else 'missed'} ({case.goal:.0%} of the ceiling)"
    times = {name: t for name, t in found.peers.items() if isinstance(t, float)}
    rival = min(times, key=times.get, default=None) if case.rival == "fastest peer" else case.rival
    if rival not in times:
        return f"open: {case.rival} did not run"
    return f"{'met' if times[rival] / found.ms >= case.goal else 'missed'} ({case.goal:.2g} x the rate of {rival})"


def line(found: Result) -> str:
    if found.failure:
        return f"{found.name:48} FAILED {found.failure}"
    unit = "TFLOP/s" if found.bound == "flops" else "GB/s"
    rate = found.rate / (1e12 if found.bound == "flops" else 1e9)
    mark = "ok" if found.right else "WRONG"
    head = f"{found.name:48} {found.ms:9.3f} ms {rate:7.0f} {unit:7} {found.share:6.1%}"
    return f"{head}  error {found.error:.1e} {mark}"


def rivals(found: Result) -> str:
    times = {"unfused": found.unfused_ms} if found.unfused_ms else {}
    return ", ".join(
        (f"{name} {t:.3f} ms" + (f" = {t / found.ms:.2f} x" if found.ms else "") if isinstance(t, float)
         else f"{name}: {t}") + (f" ({found.remarks[name]})" if name in found.remarks else "")
        for name, t in (times | found.peers).items()
    )  # fmt: skip


def main(
    family: Annotated[str, typer.Option(help="Which kernels, separated by commas.")] = ",".join(FAMILIES),
    quick: Annotated[bool, typer.Option(help="The shorter sequence only.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose name has this text.")] = "",
    json_: Annotated[Path | None, typer.Option("--json", help="Write every figure there.")] = None,
    limit: Annotated[int, typer.Option(help="Seconds for one case, after which the run ends.", min=1)] = 120,
    without: Annotated[str, typer.Option(help="Rivals to leave out, separated by commas.")] = "",
) -> None:
    """Fused kernels at the shapes of DeepSeek-V4-Flash on one GPU, beside plain torch and other libraries."""
    start = time.perf_counter()
    ceilings = {"bytes": copy_rate(), "flops": gemm_rate()}
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}; copy "
          f"{ceilings['bytes'] / 1e9:.0f} GB/s, bf16 GEMM {ceilings['flops'] / 1e12:.0f} TFLOP/s", flush=True)
    facts = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "ceilings": ceilings}
    results, reports = [], {}

    def save() -> None:  # after every case: what comes later may not end
        facts["seconds"] = time.perf_counter() - start
        if json_:
            cases = [asdict(result) for result in results]
            json_.write_text(json.dumps(facts | {"cases": cases, "reports": reports}, indent=1))

    def run(case: Case, module: str) -> None:
        faulthandler.dump_traceback_later(limit, exit=True)
        found = measure(case, ceilings)
        results.append(found)
        print(line(found), end="  ", flush=True)
        save()
        measure_rivals(case, found, without.split(","), module)
        print(rivals(found), found.goal, flush=True)
        save()
        faulthandler.cancel_dump_traceback_later()

    for name in family.split(","):
        try:
            module = importlib.import_module(f"benchmarks.kernels_{name}")
            if hasattr(module, "report"):
                reports[name] = module.report(quick)
            else:
                for case in module.cases(quick):
                    if only in case.name:
                        run(case, module.__name__)
                    del case
                    gc.collect()
                    torch.cuda.empty_cache()
        except Exception as error:  # the other families still count
            results.append(Result(name, failure=reason(error)))
            print(line(results[-1]), flush=True)
        save()
        print(f"{name}: {facts['seconds']:.0f} s since the start", flush=True)
    raise typer.Exit(0 if all(r.right for r in results) else 1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(epilog=EXAMPLES)(main)
    app()
