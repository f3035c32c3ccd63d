"""Losses of a linear head and, their own gradient being known up to a factor, those of x and W with three products.

Of a block of tokens with the whole vocabulary the exponentials are kept, e = exp(logit - base), with one base a
token. With factor = dloss exp(base - log), then, dW = (e - label)^T (x factor) and dx = factor (e - label) W: nothing
passes over e once more, but the labels are put in, and where a logit is far above the label's, so that exponentials of
a token have other bases, these are brought to one.

They are kept as [vocabulary, tokens] in the memory of dW, some rows behind where they would belong: dW is made from
its first row on, each stretch of it where exponentials were that nothing needs any more. A block has as many tokens as
dW has columns. If there are more, those of the first block are kept likewise in the memory of the float32 sum that dW
becomes, twice as many of two bytes each. Where dW is not wanted or too narrow, e has memory of its own, at most
:data:`TOKENS_BLOCK` elements, and no more than half of the tokens.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from paddledsv4.kernels.carrier import Carrier, T
from paddledsv4.kernels.device import multiprocessors
from paddledsv4.kernels.linear_cross_entropy import LOG2E, Losses
from paddledsv4.kernels.matmul import config, multiply

TOKENS_BLOCK = 1 << 29  # elements of a block: 1 GiB in bfloat16


@triton.jit
def _rebase(e, top, base, e_row, tokens, V, stride, COLUMNS: tl.constexpr, WORDS: tl.constexpr, TOKENS: tl.constexpr):
    """WORDS rows of e, in place: relative to ``top`` -> relative to ``base``. Nothing to do where these are equal."""
    i, j = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    part = (tl.program_id(0) * WORDS // COLUMNS).to(tl.int64)
    other = tl.load(top + part * tokens + i, i < tokens, 0.0) - tl.load(base + i, i < tokens, 0.0)
    if tl.max(tl.abs(other), 0) > 0.0:
        at = e + (e_row + j).to(tl.int64)[:, None] * stride + i[None, :]
        here = (j < V)[:, None] & (other != 0.0)[None, :]
        value = tl.load(at, here, 0.0).to(tl.float32) * tl.exp2(other * LOG2E)[None, :]
        tl.store(at, value.to(e.dtype.element_ty), here)


@triton.jit
def _weigh(x, e, labels, picked, logs, dloss, base, factor, scaled, e_row, start, tokens, C, stride,
           TOKENS: tl.constexpr, BLOCK: tl.constexpr, TRAIN: tl.constexpr):
    """The factor of every token, its label's entry in e, and in ``scaled`` factor x, zeros behind the last token."""
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside, token = i < tokens, start + i
    log, origin = tl.load(logs + token, inside, 0.0), tl.load(base + i, inside, 0.0)
    weight = tl.exp2((origin - log) * LOG2E) * tl.load(dloss + token, inside, 0.0).to(tl.float32)
    tl.store(factor + token, weight, inside)
    p = tl.exp2((tl.load(picked + token, inside, 0.0) - log) * LOG2E)
    label = tl.load(labels + token, inside, 0).to(tl.int64)
    value = (p - 1.0) * tl.exp2((log - origin) * LOG2E)
    tl.store(e + (e_row + label) * stride + i, value.to(e.dtype.element_ty), inside)
    if TRAIN:
        for first in range(0, C, BLOCK):
            c = first + tl.arange(0, BLOCK)[None, :]
            v = tl.load(x + token.to(tl.int64)[:, None] * C + c, inside[:, None] & (c < C), 0.0).to(tl.float32)
            to = scaled + i.to(tl.int64)[:, None] * C + c
            tl.store(to, (v * weight[:, None]).to(scaled.dtype.element_ty), c < C)


def stretch_of(vocabulary: int, width: int, tile: dict[str, int]) -> int:
    """Rows of dW made at a time where its memory holds the exponentials: about a sixteenth of them, in tiles that keep
    all multiprocessors busy."""
    programs = multiprocessors()
    whole = tile["ROWS"] * (programs // math.gcd(programs, triton.cdiv(width, tile["COLUMNS"])))
    return max(round(vocabulary / 16 / whole), 1) * whole


def _blocks(
    carrier: Carrier, x: T, weight: T, train: bool
) -> tuple[T | None, T | None, int, list[tuple[int, int, T]]]:
    """Memory of dW and of the sum that it becomes, None where there is none; the row at which exponentials begin in
    whatever holds them; and blocks of tokens: the first one, how many, and the memory of their exponentials."""
    (tokens, width), vocabulary, dtype = x.shape, weight.shape[0], carrier.dtype(x)
    tile = config(dtype)
    rows = tile["ROWS"]
    size = max(min(TOKENS_BLOCK // vocabulary, triton.cdiv(tokens, 2)) // rows, 1) * rows
    dw, sums, row, begin = None, None, 0, 0
    if train and size <= width:
        size, row = min(width // rows, triton.cdiv(tokens, rows)) * rows, stretch_of(vocabulary, width, tile)
        scores = dw = carrier.empty([row + vocabulary, width], dtype, weight)
        if tokens > size:
            sums = carrier.empty([row + vocabulary, width * (1 if dtype == "float32" else 2)], dtype, weight)
            begin = min(sums.shape[1] // rows, triton.cdiv(tokens - size, rows)) * rows  # the last block is in dW
    else:
        scores = carrier.empty([vocabulary, size], dtype, x)
        if train:
            dw = carrier.empty(weight.shape, dtype, weight)
            sums = carrier.empty(weight.shape, "float32", weight) if tokens > size else None
    blocks = [(0, begin, sums)] if begin else []
    blocks += [(start, min(size, tokens - start), scores) for start in range(begin, tokens, size)]
    return dw, sums, row, blocks


def losses_and_gradients(
    carrier: Carrier, x: T, weight: T, labels: T, dloss: T, train: bool = True
) -> tuple[T, T, T | None]:
    """x [tokens, C], weight [V, C] of one dtype, labels [tokens] of integers below V, dloss [tokens] -> losses [tokens]
    float32, dx and dW in their dtypes; unless it is to ``train``, no dW. Rows have a multiple of 16 bytes."""
    (tokens, width), vocabulary, dtype = x.shape, weight.shape[0], carrier.dtype(x)
    rows, columns = (config(dtype)[name] for name in ("ROWS", "COLUMNS"))
    dw, sums, e_row, blocks = _blocks(carrier, x, weight, train)
    most = triton.cdiv(max(count for _, count, _ in blocks), rows) * rows
    found, factor = Losses(carrier, x, weight, labels, most), carrier.empty([tokens], "float32", x)
    base, dx = carrier.empty([most], "float32", x), carrier.empty(x.shape, dtype, x)
    scaled = carrier.empty([most, width], dtype, x) if train else x
    for start, count, e in blocks:
        first, last = start == 0, start + count == tokens
        found.compute(start, count, e, e_row, base)
        carrier.launch(_rebase, (triton.cdiv(vocabulary, 64), triton.cdiv(count, 256)), e, found.top, base, e_row,
                       count, vocabulary, e.shape[1], COLUMNS=columns, WORDS=64, TOKENS=256, num_warps=8)
        carrier.launch(_weigh, (triton.cdiv(count, rows) * rows // 4,), x, e, labels, found.picked, found.logs, dloss,
                       base, factor, scaled, e_row, start, count, width, e.shape[1], TOKENS=4,
                       BLOCK=min(512, triton.next_power_of_2(width)), TRAIN=train, num_warps=4)
        multiply(carrier, e, weight, dx, (count, width, vocabulary), (e_row, 0, start), True, factor=factor, group=16)
        step = e_row if e is (dw if last else sums) else vocabulary  # a stretch at a time where exponentials are
        for row in range(0, vocabulary, step) if train else ():
            multiply(carrier, e, scaled, dw, (min(step, vocabulary - row), width, count), (e_row + row, 0, row),
                     total=sums, first=first, last=last, group=4)
    return found.losses, dx, carrier.rows(dw, vocabulary) if train else None
