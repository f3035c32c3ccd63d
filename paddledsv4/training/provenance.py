"""Where numbers come from besides the configuration: the code, the libraries, the machine, the environment."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import paddledsv4
from paddledsv4.host import BITWISE_ENVIRONMENT, ENVIRONMENT

PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "numpy", "torch")
PREFIXES = ("PADDLE", "FLAGS_", "OMP_", "MKL_", "ATEN_", "ONEDNN_", "DNNL_", "KMP_", "CUDA_", "NCCL_", "GLOO_")
KERNELS = (*BITWISE_ENVIRONMENT, *ENVIRONMENT, "MKL_NUM_THREADS")  # variables that choose kernels, and so bits
PACKAGE = Path(paddledsv4.__file__).parent
GIT_LIMIT = 10  # seconds


def provenance() -> dict[str, Any]:
    """Code, versions, variables and machine of this process, as JSON holds them."""
    return {
        "code": {"version": metadata_version("paddledsv4"), "sources": sources_md5(), **git_state()},
        "versions": {"python": platform.python_version()} | {name: metadata_version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(PREFIXES)},
        "machine": {
            "host": socket.gethostname(), "system": platform.platform(), "processor": processor(),
            "cpus": os.cpu_count(),
        },
    }  # fmt: skip


def metadata_version(name: str) -> str | None:
    """The version of an installed package; None: it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def sources_md5(package: Path = PACKAGE) -> str:
    """MD5 over the modules of the package, without the command line, which computes nothing."""
    digest = hashlib.md5()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name.startswith("commands/") or name in ("cli.py", "__main__.py"):
            continue
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def git_state(folder: Path = PACKAGE.parent) -> dict[str, Any]:
    """``revision`` and ``changed``, the files that differ from it; empty where the package is in no repository."""
    if not (folder / ".git").exists():  # an installed package may lie within somebody else's repository
        return {}
    revision, status = (_git(folder, *words) for words in (["rev-parse", "HEAD"], ["status", "--porcelain"]))
    if revision is None or status is None:
        return {}
    return {"revision": revision.strip(), "changed": [line[3:] for line in status.splitlines()]}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=GIT_LIMIT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def processor() -> str:
    """The name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def restore_variables(saved: Mapping[str, str]) -> None:
    """Set the variables that chose kernels, as far as nobody has set them; before Paddle is imported."""
    for name in KERNELS:
        if name in saved:
            os.environ.setdefault(name, saved[name])


def other_bits(saved: Mapping[str, Any], here: Mapping[str, Any], with_torch: bool) -> Iterator[str]:
    """Why a run may not go on bit for bit, one clause each; ``with_torch``: whether torch computes anything."""
    if saved["code"]["sources"] != here["code"]["sources"]:
        yield f"the code of paddledsv4 is another ({_code(saved)} then, {_code(here)} now)"
    for name in PACKAGES:
        then, now = saved["versions"].get(name), here["versions"].get(name)
        if then != now and (with_torch or name != "torch"):
            yield f"{name} was {then or 'absent'} and is {now or 'absent'}"
    for name in KERNELS:
        then, now = saved["variables"].get(name), here["variables"].get(name)
        if then != now:
            yield f"{name} was {then or 'not set'} and is {now or 'not set'}"


def _code(said: Mapping[str, Any]) -> str:
    code = said["code"]
    changed = code.get("changed")
    edits = f" with {len(changed)} changed files" if changed else ""
    return f"{str(code.get('revision') or code.get('version'))[:12]}{edits}"
