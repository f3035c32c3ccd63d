"""A grouped GEMM on bfloat16 weights: what packed ones are held against, beside torch's own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS, DEPTH = 128, 256, 64


@triton.jit
def _grouped(x, w, y, starts, OUT, IN, BACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
             DEPTH: tl.constexpr):
    """Rows of expert program_id(2): y = x W^T, or where it goes BACK x W; w [experts * OUT, IN]."""
    e, block = tl.program_id(2), tl.program_id(1)
    start, stop = tl.load(starts + e), tl.load(starts + e + 1)
    first = start + block * ROWS
    if first >= stop:
        return
    column = tl.program_id(0) * COLUMNS
    tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, OUT if BACK else IN, DEPTH):
        if BACK:
            part = w.load([e * OUT + k, column])
        else:
            part = w.load([e * OUT + column, k]).T
        tile = tl.dot(x.load([first, k]), part, tile)
    i, j = first + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    at = i.to(tl.int64)[:, None] * (IN if BACK else OUT) + j[None, :]
    tl.store(y + at, tile.to(tl.bfloat16), (i < stop)[:, None])


def grouped_gemm(x: torch.Tensor, weight: torch.Tensor, starts: torch.Tensor, largest: int, back: bool) -> torch.Tensor:
    """x [n, in], weight [experts, out, in], starts int32 [experts + 1], no group above ``largest`` rows -> [n, out];
    ``back``: x [n, out] -> [n, in]."""
    experts, out, width = weight.shape
    result = width if back else out
    y = torch.empty(x.shape[0], result, dtype=x.dtype, device=x.device)
    tiles = [TensorDescriptor.from_tensor(t, block) for t, block in (
        (x, [ROWS, DEPTH]), (weight.view(experts * out, width), [DEPTH, COLUMNS] if back else [COLUMNS, DEPTH]),
    )]
    _grouped[result // COLUMNS, triton.cdiv(largest, ROWS), experts](
        *tiles, y, starts, out, width, BACK=back, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, num_warps=8, num_stages=3,
    )
    return y
