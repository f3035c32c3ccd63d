"""The kernels written for Hopper, and those of the head's large products, compile without a GPU: on the matrix units,
no product waiting for another, and with no atomic addition."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from reference import ROOT

triton = pytest.importorskip("triton")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from paddledsv4.kernels.{module} import {name} as kernel

integers = "s b n g K H ratio offset slots first first_head items".split()
types = {{"selected": "*i32", "sink": "*fp32", "lse": "*fp32", "deltas": "*fp32", "scale": "fp32"}}
constants = {{"D": {d}, "WINDOW": 100, "FAR": {far}, "BLOCK_K": 512, "BLOCK_H": 64, "BLOCK_N": 64,
             "PIECE": min(128, {d} // 2)}}
constants = {{name: value for name, value in constants.items() if name in kernel.arg_names}}
types = {{a: "constexpr" if a in constants else types.get(a, "i32" if a in integers else "*bf16")
         for a in kernel.arg_names}}
aligned = {{(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if types[a][0] == "*"}}
source = GluonASTSource(kernel, types, constants, aligned)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": {warps}}}).asm["ptx"])
"""

DESCRIBED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from paddledsv4.kernels.{module} import {name} as kernel
from paddledsv4.kernels.matmul import config

tile = config("bfloat16")
options = {{name: tile.pop(name) for name in ("num_warps", "num_stages")}}
rows, columns, depth = (tile[name] for name in ("ROWS", "COLUMNS", "DEPTH"))
constants = tile | dict(PROGRAMS=132) | {constants}
pieces = 2 if constants.get("FIRST") and constants.get("LAST") else 4
shapes = {{"a": (depth, rows) if constants.get("TRANSPOSE") else (rows, depth), "b": (depth, columns),
          "out": (rows, columns // pieces), "x": (rows, depth), "w": (columns, depth), "e": (columns, rows),
          "g": (rows, columns)}}
numbers = "M N K a_row b_row out_row e_row start tokens first count V C".split()
types = {{"labels": "*i64"}} | dict.fromkeys(numbers, "i32") | {{
    name: "tensordesc<bf16[%d,%d]>" % shape for name, shape in shapes.items()}}
types = {{a: "constexpr" if a in constants else types.get(a, "*fp32") for a in kernel.arg_names}}
aligned = {{(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if types[a] in ("i32", "*fp32")}}
made = triton.compile(ASTSource(kernel, types, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)
assert made.metadata.shared <= 232448, made.metadata.shared
print(made.asm["ptx"])
"""
SUMS = [{"TRANSPOSE": transpose, "SCALE": transpose, "FIRST": first, "LAST": last}
        for transpose in (False, True) for first in (False, True) for last in (False, True)]  # fmt: skip


def assembled(ptx, folder):
    """What the assembler says of it."""
    (folder / "kernel.ptx").write_text(ptx)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    done = subprocess.run([tool, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"], capture_output=True,
                          text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, d, far", [("forward", 512, 2), ("forward", 128, 1), ("backward", 512, 2), ("backward", 256, 0)]
)
def test_it_compiles(name, d, far, tmp_path):
    """In a process of its own: here Triton interprets."""
    code = COMPILE.format(module=f"hopper_{name}", name=name, d=d, far=far, warps=4 if name == "forward" else 8)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "serialized" not in assembled(done.stdout, tmp_path)  # products that wait for one another: too few registers
    assert "wgmma.mma_async" in done.stdout and "cp.async" in done.stdout
    assert not re.search(r"^\s*(@\S+ )?(atom|red)\.", done.stdout, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "constants"), [
    *(("matmul", "_product", sums) for sums in SUMS),
    *(("linear_cross_entropy", "_partials", {"STORE": store}) for store in (False, True)),
    ("linear_cross_entropy", "_gradient", {}),
])  # fmt: skip
def test_the_heads_products_compile(module, name, constants, tmp_path):
    """A branch on a tile between two of them is enough to make the assembler put them in a row."""
    code = DESCRIBED.format(module=module, name=name, constants=constants)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    said = assembled(done.stdout, tmp_path)
    assert "serialized" not in said and " 0 bytes spill stores" in said
    assert "wgmma.mma_async" in done.stdout and "cp.async.bulk" in done.stdout
