"""The kernels written for Hopper compile, without a GPU: on the matrix units, and with no atomic addition."""

import re
import subprocess
import sys

import pytest
from reference import ROOT

pytest.importorskip("triton")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from paddledsv4.kernels.{module} import {name} as kernel

integers = "s b n g K H ratio offset slots first first_head".split()
types = {{"selected": "*i32", "sink": "*fp32", "lse": "*fp32", "dsinks": "*fp32", "scale": "fp32"}}
constants = {{"D": {d}, "WINDOW": 100, "FAR": {far}, "BLOCK_K": 512, "BLOCK_H": 64, "BLOCK_N": 64, "PIECE": 64}}
constants = {{name: value for name, value in constants.items() if name in kernel.arg_names}}
types = {{a: "constexpr" if a in constants else types.get(a, "i32" if a in integers else "*bf16")
         for a in kernel.arg_names}}
aligned = {{(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if types[a][0] == "*"}}
source = GluonASTSource(kernel, types, constants, aligned)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 8}}).asm["ptx"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, d, far", [("forward", 512, 2), ("forward", 128, 1), ("backward", 512, 2), ("backward", 256, 0)]
)
def test_it_compiles(name, d, far):
    """In a process of its own: here Triton interprets."""
    code = COMPILE.format(module=f"hopper_{name}", name=name, d=d, far=far)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wgmma.mma_async" in done.stdout and "cp.async" in done.stdout
    assert not re.search(r"^\s*(@\S+ )?(atom|red)\.", done.stdout, re.MULTILINE)
