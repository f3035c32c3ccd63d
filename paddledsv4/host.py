"""Settings of the host process that make Paddle's CPU engine as fast as the machine allows.

None of them changes what is computed; all must be in place before the engine is imported.

* Paddle ships an Intel MKL of 2019 that takes its slowest path on any processor that is not Intel's.
  ``MKL_DEBUG_CPU_TYPE=5`` selects the AVX2 path: a 512x512x512 GEMM went from 28 to 76 GFLOP/s on an AMD EPYC.
* Paddle frees every temporary at once, and glibc hands blocks above 128 KiB back to the kernel, so each large
  temporary is paid for in page faults. Keeping freed blocks took an elementwise product of two 2 MiB tensors
  from 1.1 ms to 0.07 ms.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings

# glibc's names for the parameters of mallopt(3), from <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3

ENVIRONMENT = {"MKL_DEBUG_CPU_TYPE": "5"}

# The environment of a bitwise run: the kernels that the references were recorded with (spec, section 16).
BITWISE_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # decides the bits of bfloat16 GEMMs
    "OMP_NUM_THREADS": "1",
}


def prepare_host(bitwise: bool = False) -> None:
    """Set what is not set yet; call before ``import paddle``. A value that the user chose is kept."""
    for name, value in (ENVIRONMENT | (BITWISE_ENVIRONMENT if bitwise else {})).items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", message="No ccache found")  # Paddle's import; nothing is compiled here
    if sys.platform == "linux":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    _mallopt(M_MMAP_THRESHOLD, 1 << 30)
    _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    _mallopt(M_TOP_PAD, 64 << 20)


def return_freed_memory() -> None:
    """Keep the peak low instead: blocks above 1 MiB grow in place and go back to the kernel when freed.

    glibc raises that bound whenever such a block is freed; growing columns then leave holes in the heap. Comparing
    two logs of a million lines went from 190 to 174 MB.
    """
    if sys.platform == "linux":
        _mallopt(M_MMAP_THRESHOLD, 1 << 20)
        _mallopt(M_TRIM_THRESHOLD, 16 << 20)  # smaller blocks come and go all the time


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
    if mallopt is not None:
        mallopt(parameter, value)
