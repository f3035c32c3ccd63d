"""What this machine is, seen from a process like that of ``align run``: same pins, same order of imports.

A process of its own, ``python -m align.doctor.here``, because a wrong ATEN_CPU_CAPABILITY can end it with an illegal
instruction, and because libraries read their pins only once, when they are loaded.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from typing import Any

from paddledsv4.host import BITWISE_ENVIRONMENT, prepare_host


def describe() -> dict[str, Any]:
    """Environment, versions, machine and kernels of this process; ``problem`` says why there are no kernels."""
    prepare_host(bitwise=True)
    said: dict[str, Any] = {
        "environment": {name: os.environ.get(name) for name in BITWISE_ENVIRONMENT},
        "python": platform.python_version(),
    }
    try:
        import paddle

        said["paddle"] = paddle.__version__
        from paddledsv4.numerics.torch_kernels import torch
    except ImportError as error:
        return said | {"problem": f"{error.name or error} is not installed"}
    from align.fingerprint import record

    return said | record(torch)


def look() -> dict[str, Any]:
    """:func:`describe` in a process of its own. If that dies, ``problem`` says how; nothing else is certain then."""
    done = subprocess.run(
        [sys.executable, "-m", "align.doctor.here"], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = {"environment": {name: os.environ.get(name, pin) for name, pin in BITWISE_ENVIRONMENT.items()}}
    if done.returncode < 0:
        how = f"the kernels end with signal {signal.Signals(-done.returncode).name}"
        return said | {"problem": f"{how}: this processor lacks instructions that the environment asks for"}
    return said | {"problem": f"the kernels fail: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"}


if __name__ == "__main__":
    print(json.dumps(describe()))
