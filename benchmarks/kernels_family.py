"""The cases of one family, in a process of their own: checked, timed, compared, printed and saved.

benchmarks/kernels.py starts it. What a family leaves behind, memory or a kernel that never ends, is not the next one's.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from align.files import write_whole
from benchmarks.kernel_case import Case
from benchmarks.kernel_timing import clean, milliseconds
from benchmarks.kernels_rival import ABSENT, LEFT_OUT, peer_time, reason, time_alone


@dataclass
class Result:
    """What was found of a case; ``peers`` has milliseconds, or in words why there are none, ``beside`` ours where they
    were measured in a process of their own, and ``remarks`` what is to be said of some of these times."""

    name: str
    ms: float = 0.0
    rate: float = 0.0
    share: float = 0.0
    bound: str = ""
    error: float = float("nan")
    limit: float = 0.0
    unfused_ms: float | None = None
    peers: dict[str, float | str] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    goal: str = ""
    failure: str = ""

    @property
    def right(self) -> bool:
        """Whether the kernel ran and its error is within its limit; NaN is not."""
        return not self.failure and self.error <= self.limit

    @property
    def ratios(self) -> dict[str, float]:
        """How many times our time the others take: plain torch ("unfused") and the peers that have a time."""
        times = ({"unfused": self.unfused_ms} if self.unfused_ms else {}) | self.peers
        return {name: t / self.beside.get(name, self.ms) for name, t in times.items()
                if isinstance(t, float) and self.ms}


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
        clean()  # what is kept, a process of its own would lack
        if name in without:
            found.peers[name] = LEFT_OUT
        elif name in case.alone:
            alone = time_alone(module, case.name, name)
            found.peers[name] = alone.theirs
            found.beside |= {name: alone.ours} if alone.ours else {}
            found.remarks |= {name: alone.remark} if alone.remark else {}
        else:
            found.peers[name] = peer_time(make, case.graph)
    found.goal = verdict(case, found)


def verdict(case: Case, found: Result) -> str:
    """Whether the goal is met, in words; "" for a case without one, or with a wrong result."""
    if case.goal is None or not found.right:
        return ""
    if case.rival is None:
        return f"{'met' if found.share >= case.goal else 'missed'} ({case.goal:.0%} of the ceiling)"
    ratios = {name: ratio for name, ratio in found.ratios.items() if name in found.peers}
    failed = [name for name, t in found.peers.items() if isinstance(t, str) and not t.startswith(ABSENT)]
    if failed and case.rival == "fastest peer":
        return f"open: {', '.join(failed)} failed"
    rival = min(ratios, key=ratios.get, default=None) if case.rival == "fastest peer" else case.rival
    if rival not in ratios:
        return f"open: {case.rival} did not run"
    return f"{'met' if ratios[rival] >= case.goal else 'missed'} ({case.goal:.2g} x the rate of {rival})"


def line(found: Result) -> str:
    if found.failure:
        return f"{found.name:48} FAILED {found.failure}"
    unit = "TFLOP/s" if found.bound == "flops" else "GB/s"
    rate = found.rate / (1e12 if found.bound == "flops" else 1e9)
    mark = "ok" if found.right else "WRONG"
    head = f"{found.name:48} {found.ms:9.3f} ms {rate:7.0f} {unit:7} {found.share:6.1%}"
    return f"{head}  error {found.error:.1e} {mark}"


def rivals(found: Result) -> str:
    """The others: time, ratio, our time if it was another beside this one, and what there is to remark."""
    times, parts = ({"unfused": found.unfused_ms} if found.unfused_ms else {}) | found.peers, []
    for name, t in times.items():
        remarks = [f"ours {found.beside[name]:.3f}"] if name in found.beside else []
        remarks += [found.remarks[name]] if name in found.remarks else []
        text = f"{name}: {t}" if isinstance(t, str) else f"{name} {t:.3f} ms"
        text += f" = {found.ratios[name]:.2f} x" if name in found.ratios else ""
        parts.append(text + (f" ({'; '.join(remarks)})" if remarks else ""))
    return ", ".join(parts)


def save(record: dict, path: Path) -> None:
    """All that is known so far: what comes later may not end."""
    write_whole(path, json.dumps(record | {"seconds": time.time() - record["started"]}, indent=1))


def run(case: Case, module: str, record: dict, path: Path, limit: int, without: list[str]) -> None:
    """Adds ``case`` to the record, when it is timed and again when its rivals are."""
    faulthandler.dump_traceback_later(limit, exit=True)
    found = measure(case, record["ceilings"])
    record["cases"].append(asdict(found))
    print(line(found), end="  ", flush=True)
    save(record, path)
    measure_rivals(case, found, without, module)
    record["cases"][-1] = asdict(found)
    print(rivals(found), found.goal, flush=True)
    save(record, path)
    faulthandler.cancel_dump_traceback_later()


def main(name: str, path: Path, quick: bool, only: str, limit: int, without: list[str]) -> None:
    """Adds a family's cases to the record at ``path``, and at the end its name to the families that ended."""
    record = json.loads(path.read_text())
    kept = 0
    try:
        module = importlib.import_module(f"benchmarks.kernels_{name}")
        if hasattr(module, "report"):
            record["reports"][name] = module.report(quick)
        else:
            for case in module.cases(quick):
                if only in case.name:
                    run(case, module.__name__, record, path, limit, without)
                del case
                clean()
        clean()
        kept = torch.cuda.memory_reserved()
    except Exception as error:
        record["cases"].append(asdict(Result(name, failure=reason(error))))
        print(f"{name:48} FAILED {str(error).strip()}", flush=True)
    record["ended"].append(name)
    save(record, path)
    print(f"{name}: {time.time() - record['started']:.0f} s since the start, {kept / 2**30:.1f} GiB not given back",
          flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), **json.loads(sys.argv[3]))
