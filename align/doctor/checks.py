"""Compare what a bundle recorded with what is here, and name the command that removes each difference."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Any

from paddledsv4.host import BITWISE_ENVIRONMENT

EQUAL, DIFFERENT, UNKNOWN = "equal", "different", "unknown"


@dataclass(frozen=True)
class Check:
    """One comparison. ``state`` is EQUAL, DIFFERENT (no match can be expected), or UNKNOWN (told, not judged)."""

    name: str
    here: str
    reference: str
    state: str
    fix: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All checks, and the sentence that they come to."""

    checks: list[Check]
    verdict: str

    @property
    def ok(self) -> bool:
        """True when nothing speaks against a bitwise match."""
        return all(check.state != DIFFERENT for check in self.checks)

    @property
    def fixes(self) -> list[str]:
        """The commands to run, in the order of the checks."""
        return list(dict.fromkeys(check.fix for check in self.checks if check.fix))

    def as_dict(self) -> dict[str, Any]:
        return {
            "match_can_be_expected": self.ok,
            "verdict": self.verdict,
            "fixes": self.fixes,
            "checks": [asdict(check) for check in self.checks],
        }


def diagnose(source: dict[str, Any], here: dict[str, Any], name: str) -> Diagnosis:
    """Judge the machine.

    Args:
        source: of bundle.json; whatever in it is absent or malformed counts as not recorded.
        here: what :func:`align.doctor.here.look` found.
        name: how commands call the bundle.
    """
    recorded = _mapping(source.get("kernel_fingerprint"))
    checks = [*_environment(_mapping(source.get("environment")), here["environment"])]
    torch = source.get("torch") or recorded.get("torch")
    if here.get("problem"):
        fix = f"pip install torch=={_release(torch)}" if "not installed" in here["problem"] and torch else None
        checks.append(Check("kernels", here["problem"], "", DIFFERENT, fix))
    else:
        checks += [*_versions(torch, here), *_machine(recorded, here)]
        checks.append(_kernels(_mapping(recorded.get("kernels")), here["kernels"]))
    return Diagnosis(checks, _verdict(checks, recorded, name))


def _verdict(checks: list[Check], recorded: dict[str, Any], name: str) -> str:
    wrong = [check for check in checks if check.state == DIFFERENT]
    if wrong and not any(check.fix for check in wrong):
        return (
            "a bitwise match cannot be expected here, and no setting helps: run where the kernels agree, as on "
            f"{recorded.get('processor', 'the machine of the recording')}"
        )
    if wrong:
        return "a bitwise match cannot be expected here; this may help:"
    command = f"align run {shlex.quote(name)} --numerics torch"
    if recorded.get("kernels"):
        return f"a bitwise match can be expected here: {command}"
    return f"nothing recorded speaks against a bitwise match, but the bundle has no kernel fingerprint: {command}"


def _environment(recorded: dict[str, Any], here: dict[str, Any]) -> list[Check]:
    checks = []
    for name in sorted({*recorded, *BITWISE_ENVIRONMENT}):
        value = here.get(name)
        if name not in recorded:
            checks.append(Check(name, _text(value), "not recorded", UNKNOWN))
            continue
        wanted = None if recorded[name] is None else str(recorded[name])
        equal = wanted == value
        fix = f"unset {name}" if wanted is None else f"export {name}={shlex.quote(wanted)}"
        checks.append(Check(name, _text(value), _text(wanted), EQUAL if equal else DIFFERENT, None if equal else fix))
    return checks


def _versions(torch: object, here: dict[str, Any]) -> list[Check]:
    if not torch:
        return [Check("torch", here["torch"], "not recorded", UNKNOWN)]
    equal = _release(torch) == _release(here["torch"])
    fix = None if equal else f"pip install torch=={_release(torch)}"
    return [Check("torch", here["torch"], str(torch), EQUAL if equal else DIFFERENT, fix)]


def _machine(recorded: dict[str, Any], here: dict[str, Any]) -> list[Check]:
    """Threads and the chosen instruction set decide bits; the processor itself does so only through the kernels."""
    wanted, threads = recorded.get("cpu_capability"), recorded.get("threads")
    checks = [
        _same("CPU capability", here["cpu_capability"], wanted, f"export ATEN_CPU_CAPABILITY={str(wanted).lower()}"),
        _same("threads", here["threads"], threads, f"export OMP_NUM_THREADS={threads}"),
    ]
    features, there = here.get("features", []), recorded.get("features")
    there = there if isinstance(there, list) else None
    told = "not recorded" if there is None else " ".join(map(str, there)) or "none"
    state = EQUAL if there == features else UNKNOWN
    checks.append(Check("CPU features", " ".join(features) or "none", told, state))
    processor = recorded.get("processor")
    state = EQUAL if processor == here.get("processor") else UNKNOWN
    return [*checks, Check("processor", str(here.get("processor")), _text(processor, "not recorded"), state)]


def _same(name: str, here: object, wanted: object, fix: str) -> Check:
    if wanted is None:
        return Check(name, str(here), "not recorded", UNKNOWN)
    equal = here == wanted
    return Check(name, str(here), str(wanted), EQUAL if equal else DIFFERENT, None if equal else fix)


def _kernels(recorded: dict[str, Any], here: dict[str, str]) -> Check:
    """Kernels that only one side has are no evidence, unless that leaves none."""
    common = sorted({*recorded} & {*here})
    if not common:
        return Check("kernels", f"{len(here)} run", "no fingerprint recorded", UNKNOWN)
    wrong = [name for name in common if recorded[name] != here[name]]
    if not wrong:
        return Check("kernels", f"{len(common)} of {len(common)} equal", f"{len(recorded)} recorded", EQUAL)
    told = ", ".join(wrong[:6]) + (", ..." if len(wrong) > 6 else "")
    return Check("kernels", f"{len(wrong)} of {len(common)} differ: {told}", f"{len(recorded)} recorded", DIFFERENT)


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _release(version: object) -> str:
    """The version without its build: 2.13.0+cpu is 2.13.0."""
    return str(version).partition("+")[0]


def _text(value: object, absent: str = "not set") -> str:
    return absent if value is None else str(value)
