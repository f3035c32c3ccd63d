"""torch's CPU kernels in float32, step by step: the same order of additions and the same roundings on Paddle's calls.

Found by experiment on torch 2.13 with MKL_CBWR=AVX2 and checked by tests:

* a GEMM adds its products one after another with fused multiply-adds, in blocks of 192, and then the blocks. So does
  Paddle's, where the columns fill whole kernels: they are padded to a multiple of 24. Sizes under 16, and a few sums
  that do not divide well, have another order, which is not known;
* a sum over the last dimension keeps 4 x 8 partial sums, over another dimension one; both add in blocks of 16;
* Paddle's own sqrt, exp and their kin are off by up to 3 units in the last place; in float64 and rounded once they
  are almost always torch's number.

Each function has torch's backward formula. Outside float32 on a CPU they are Paddle's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import paddle
from paddle import Tensor
from paddle.nn import functional as F

from paddledsv4.numerics.function import differentiable

GEMM_BLOCK, GEMM_COLUMNS, GEMM_ROWS, GEMM_NARROW = 192, 24, 24, 8
NARROW_NUMBERS = 1 << 25  # products at a time; larger ones in float64, the nearest to any order
SUM_BLOCK, LANES, ACCUMULATORS, COLUMNS = 16, 8, 4, 32


def or_native(native: Callable) -> Callable[[Callable], Callable]:
    """Use ``native`` on a GPU and in any precision but float32."""

    def choose(ordered: Callable) -> Callable:
        @functools.wraps(ordered)
        def call(x, *args, **kwargs):
            here = x.dtype == paddle.float32 and x.place.is_cpu_place() and x.size
            return (ordered if here else native)(x, *args, **kwargs)

        return call

    return choose


def _precisely(function: Callable, x: Tensor) -> Tensor:
    """``function`` in float64, rounded once."""
    return function(x.astype("float64")).astype("float32")


# ---- elementwise ----------------------------------------------------------------------------------------------------


@or_native(paddle.exp)
@differentiable
def exp(x):
    y = _precisely(paddle.exp, x)
    return y, lambda g: (g * y,)


@or_native(paddle.sqrt)
@differentiable
def sqrt(x):
    y = _precisely(paddle.sqrt, x)
    return y, lambda g: (g / (2.0 * y),)


@or_native(paddle.rsqrt)
@differentiable
def rsqrt(x):
    y = 1.0 / _precisely(paddle.sqrt, x)
    return y, lambda g: ((g * -0.5) * (y * y * y),)


def _logistic(x):
    return 1.0 / (1.0 + _precisely(paddle.exp, -x))


def cos(x):
    return _precisely(paddle.cos, x) if x.dtype == paddle.float32 else paddle.cos(x)


def sin(x):
    return _precisely(paddle.sin, x) if x.dtype == paddle.float32 else paddle.sin(x)


@or_native(F.sigmoid)
@differentiable
def sigmoid(x):
    y = _logistic(x)
    return y, lambda g: (g * (1.0 - y) * y,)


@or_native(F.silu)
@differentiable
def silu(x):
    def backward(g):
        y = _logistic(x)
        return (g * y * (1.0 + x * (1.0 - y)),)

    return x / (1.0 + _precisely(paddle.exp, -x)), backward


@or_native(lambda x: F.softplus(x, beta=1, threshold=20))
@differentiable
def softplus(x):
    e = _precisely(paddle.exp, x)
    linear = x > 20.0
    return paddle.where(linear, x, _precisely(paddle.log1p, e)), lambda g: (
        paddle.where(linear, g, g * e / (e + 1.0)),
    )


# ---- sums -----------------------------------------------------------------------------------------------------------


def _cascade(x: Tensor) -> Tensor:
    """[R, n, ...] -> [R, ...]: blocks of 16 one after another, then the blocks likewise; what is left over first.

    Paddle's own sum over any dimension but the last adds one after another.
    """
    total = None
    while True:
        n = x.shape[1]
        whole = n // SUM_BLOCK * SUM_BLOCK
        if whole < n or n == 0:
            rest = x[:, whole:].sum(1)
            total = rest if total is None else total + rest
        if whole == 0:
            return total
        x = x[:, :whole].reshape([x.shape[0], -1, SUM_BLOCK, *x.shape[2:]]).sum(2)


def _strided(x: Tensor) -> Tensor:
    """[R, n, c] -> [R, c]: four sums over every fourth row, what is left over on the first, then the four."""
    rows, n, columns = x.shape
    whole = n // ACCUMULATORS * ACCUMULATORS
    partial = _cascade(x[:, :whole].reshape([rows, -1, ACCUMULATORS, columns]))
    total = partial[:, 0]
    for i in range(whole, n):
        total = total + x[:, i]
    for i in range(1, ACCUMULATORS):
        total = total + partial[:, i]
    return total


def _inner_sum(x: Tensor) -> Tensor:
    """[R, n] -> [R]: eight lanes, then the numbers left over, then the lanes."""
    rows, n = x.shape
    lanes = LANES if n >= LANES else 1
    vectors = n // lanes
    lane_sums = _strided(x[:, : vectors * lanes].reshape([rows, vectors, lanes]))
    return paddle.concat([x[:, vectors * lanes :], lane_sums], 1).unsqueeze(-1).sum(1).squeeze(-1)


def _outer_sum(x: Tensor) -> Tensor:
    """[R, n, c] -> [R, c]: columns in whole groups of 32 in one go, the others with strides."""
    whole = x.shape[2] // COLUMNS * COLUMNS
    parts = [_cascade(x[:, :, :whole])] if whole else []
    parts += [_strided(x[:, :, whole:])] if whole < x.shape[2] else []
    return paddle.concat(parts, -1)


def _sum(x: Tensor, dim: int) -> Tensor:
    """x without dimension ``dim``."""
    dim %= x.ndim
    lead, trail = x.shape[:dim], x.shape[dim + 1 :]
    if not trail:
        return _inner_sum(x.reshape([-1, x.shape[-1]])).reshape(lead)
    return _outer_sum(x.reshape([math.prod(lead), x.shape[dim], -1])).reshape([*lead, *trail])


@or_native(lambda x, dim=None, keepdim=False: paddle.sum(x, dim, keepdim=keepdim))
@differentiable
def sum(x, dim=None, keepdim=False):
    flat = x.reshape([-1]) if dim is None else x
    axis = -1 if dim is None else dim
    total = _sum(flat, axis)

    def backward(g):
        if dim is not None and not keepdim:
            g = g.unsqueeze(dim)
        return (g.expand(x.shape),)

    return (total.unsqueeze(dim) if keepdim and dim is not None else total), backward


@or_native(lambda x, dim, keepdim=False: paddle.mean(x, dim, keepdim=keepdim))
def mean(x, dim, keepdim=False):
    return sum(x, dim, keepdim) / x.shape[dim]


@or_native(lambda a, b: a * b)
@differentiable
def scale_rows(a, b):
    """a [..., L] times b [..., 1] or [L]; the gradient of b is a sum in torch's order."""
    rows = b.ndim == a.ndim and b.shape[-1] == 1

    def backward(g):
        both = g * a
        db = sum(both, -1, keepdim=True) if rows else sum(both.reshape([-1, a.shape[-1]]), 0)
        return g * b, db

    return a * b, backward


@or_native(lambda x, dim, keepdim=False: paddle.sqrt(paddle.sum(x * x, dim, keepdim=keepdim)))
@differentiable
def norm(x, dim, keepdim=False):
    """Over the last dimension: squares in eight lanes, then the lanes, then the numbers left over."""
    n = x.shape[-1]
    squares = (x * x).reshape([-1, n])
    whole = n // LANES * LANES
    lanes = squares[:, :whole].reshape([squares.shape[0], -1, LANES]).sum(1)
    total = paddle.concat([lanes, squares[:, whole:]], 1).unsqueeze(-1).sum(1)
    y = _precisely(paddle.sqrt, total).reshape([*x.shape[:-1], 1])

    def backward(g):
        g = g.reshape(y.shape)
        return (x * paddle.where(y == 0.0, paddle.zeros_like(y), g / y),)

    return (y if keepdim else y.squeeze(-1)), backward


def _row_total(x: Tensor) -> Tensor:
    """[R, n] -> [R, 1], as a softmax adds its row: eight lanes, halved until one is left; short rows in order."""
    rows, n = x.shape
    if n < LANES:
        return x.unsqueeze(-1).sum(1)
    padded = F.pad(x, [0, -n % LANES], pad_from_left_axis=False) if n % LANES else x
    lanes = padded.reshape([rows, -1, LANES]).sum(1)
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes


def _native_softmax(x, dim):
    """Written out: Paddle's own CPU softmax gives masked entries exp(-64) instead of zero."""
    e = paddle.exp(x - paddle.max(x.detach(), dim, keepdim=True))
    return e / paddle.sum(e, dim, keepdim=True)


@or_native(_native_softmax)
@differentiable
def softmax(x, dim):
    last = dim in (-1, x.ndim - 1)

    def total(e):
        if not last:
            return e.sum(dim, keepdim=True)
        return _row_total(e.reshape([-1, e.shape[-1]])).reshape([*e.shape[:-1], 1])

    e = _precisely(paddle.exp, x - x.max(dim, keepdim=True))
    y = e * (1.0 / total(e)) if last else e / total(e)
    return y, lambda g: ((g - total(g * y)) * y,)


# ---- linear algebra -------------------------------------------------------------------------------------------------


def _narrow_gemm(a: Tensor, b: Tensor) -> Tensor:
    """Few rows or columns: products, each rounded, in four lanes one after another; then the lanes, halved twice."""
    k = a.shape[1]
    if k % 4 or a.shape[0] * k * b.shape[1] > NARROW_NUMBERS:
        return paddle.matmul(a.astype("float64"), b.astype("float64")).astype("float32")
    products = a.unsqueeze(1) * b.t().unsqueeze(0)
    lanes = products.reshape([a.shape[0], b.shape[1], k // 4, 4]).sum(2)
    lanes = lanes[..., :2] + lanes[..., 2:]
    return lanes[..., 0] + lanes[..., 1]


def gemm(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] x [k, n] -> [m, n]."""
    (m, k), n = a.shape, b.shape[1]
    if n <= GEMM_NARROW:
        return _narrow_gemm(a, b)
    padded = max(-(-n // GEMM_COLUMNS) * GEMM_COLUMNS, 2 * GEMM_COLUMNS)
    if padded > n:
        b = paddle.concat([b, paddle.zeros([k, padded - n], b.dtype)], 1)
    if m < GEMM_ROWS:
        a = paddle.concat([a, paddle.zeros([GEMM_ROWS - m, k], a.dtype)], 0)
    block = -(-k // 2) if GEMM_BLOCK < k <= 2 * GEMM_BLOCK else GEMM_BLOCK
    total = None
    for start in range(0, k, block):
        part = paddle.matmul(a[:, start : start + block], b[start : start + block])
        total = part if total is None else total + part
    return total[:m, :n]


@or_native(paddle.matmul)
@differentiable
def matmul(x, weight):
    """x [..., k], weight [k, n] -> [..., n]."""
    rows = x.reshape([-1, x.shape[-1]])

    def backward(g):
        g = g.reshape([-1, g.shape[-1]])
        return gemm(g, weight.t()).reshape(x.shape), gemm(rows.t(), g)

    return gemm(rows, weight).reshape([*x.shape[:-1], weight.shape[1]]), backward


@or_native(lambda x, blocks: paddle.einsum("...gd,grd->...gr", x, blocks))
@differentiable
def grouped_matmul(x, blocks):
    """x [..., g, d], blocks [g, r, d] -> [..., g, r], one GEMM a group."""
    groups, lead = blocks.shape[0], x.shape[:-2]
    rows = x.reshape([-1, *x.shape[-2:]])

    def each(function):
        return [function(i) for i in range(groups)]

    def backward(dy):
        dy = dy.reshape([-1, groups, blocks.shape[1]])
        dx = paddle.stack(each(lambda i: gemm(dy[:, i], blocks[i])), 1)
        return dx.reshape(x.shape), paddle.stack(each(lambda i: gemm(dy[:, i].t(), rows[:, i])))

    return paddle.stack(each(lambda i: gemm(rows[:, i], blocks[i].t())), 1).reshape([*lead, groups, -1]), backward
