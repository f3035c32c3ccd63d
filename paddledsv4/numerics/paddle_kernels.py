"""The kernels that Megatron's order of operations is written in, on Paddle. Names and meaning follow torch."""

from __future__ import annotations

import math

import paddle
from paddle.nn import functional as F

from paddledsv4.numerics import torch_order


class PaddleKernels:
    """A namespace. ``dim`` counts as in torch; dtypes are given as text."""

    name = "paddle"

    # -- layout
    @staticmethod
    def alias(x):
        """The same memory as another tensor; detach() would be taken for an in-place operation."""
        return x.detach().view(list(x.shape))

    @staticmethod
    def view(x):
        """The same numbers as another node of the graph."""
        return x.reshape(list(x.shape))

    @staticmethod
    def detach(x):
        return x.detach()

    @staticmethod
    def contiguous(x):
        return x.contiguous()

    @staticmethod
    def transposed_gradient(x):
        """x; its gradient's matrices lie transposed in memory, as where x is used transposed."""
        return x

    @staticmethod
    def permute(x, *dims):
        return paddle.transpose(x, list(dims))

    @staticmethod
    def cat(tensors, dim):
        return paddle.concat(tensors, dim)

    @staticmethod
    def stack(tensors, dim):
        return paddle.stack(tensors, dim)

    @staticmethod
    def chunk(x, parts, dim):
        return paddle.chunk(x, parts, dim)

    @staticmethod
    def split(x, sizes, dim):
        return paddle.split(x, sizes, dim)

    @staticmethod
    def cast(x, dtype):
        return x.astype(dtype)

    @staticmethod
    def wide(x):
        """In float32; float64 stays."""
        return x if x.dtype in (paddle.float32, paddle.float64) else x.astype("float32")

    @staticmethod
    def dtype(x):
        return str(x.dtype).split(".")[-1]

    # -- creation
    @staticmethod
    def arange(*args, dtype, like=None):
        return paddle.arange(*args, dtype=dtype)

    @staticmethod
    def zeros(shape, dtype, like=None):
        return paddle.zeros(shape, dtype)

    @staticmethod
    def full(shape, value, dtype, like=None):
        return paddle.full(shape, value, dtype)

    # -- elementwise
    exp, log, sqrt, rsqrt = torch_order.exp, paddle.log, torch_order.sqrt, torch_order.rsqrt
    cos, sin = torch_order.cos, torch_order.sin
    square, relu, abs, sign = paddle.square, F.relu, paddle.abs, paddle.sign
    sigmoid, silu, softplus = torch_order.sigmoid, torch_order.silu, torch_order.softplus
    logaddexp = staticmethod(paddle.logaddexp)

    @staticmethod
    def clamp(x, low=None, high=None):
        """Infinities that no bound forbids stay; paddle.clip makes the largest finite numbers of them."""
        if x.is_floating_point():
            low, high = -math.inf if low is None else low, math.inf if high is None else high
        return paddle.clip(x, low, high)

    @staticmethod
    def maximum(a, b):
        return paddle.maximum(a, b)

    logical_not, logical_and = staticmethod(paddle.logical_not), staticmethod(paddle.logical_and)

    @staticmethod
    def lowest(x):
        return -3.4028234663852886e38 if x.dtype == paddle.float32 else -1.7976931348623157e308

    @staticmethod
    def where(condition, a, b):
        return paddle.where(condition, a, b)

    @staticmethod
    def masked_fill(x, mask, value):
        return paddle.where(mask.expand(x.shape), paddle.full_like(x, value), x)

    # -- reductions
    sum, mean = torch_order.sum, torch_order.mean

    @staticmethod
    def max(x, dim, keepdim=False):
        """Values; the gradient goes to the first largest entry."""
        index = paddle.argmax(x.detach(), dim, keepdim=True)
        values = paddle.take_along_axis(x, index, dim)
        return values if keepdim else values.squeeze(dim)

    norm, scale_rows = torch_order.norm, torch_order.scale_rows

    @staticmethod
    def vector_norm(x):
        return torch_order.norm(x.flatten(), -1)

    @staticmethod
    def add_(x, y):
        x.add_(y)

    @staticmethod
    def logsumexp(x, dim):
        top = paddle.max(x, dim, keepdim=True)
        top = paddle.where(paddle.isfinite(top), top, paddle.zeros_like(top))
        return paddle.log(torch_order.sum(torch_order.exp(x - top), dim)) + top.squeeze(dim)

    @staticmethod
    def softmax(x, dim, dtype=None):
        return torch_order.softmax(x if dtype is None else x.astype(dtype), dim)

    @staticmethod
    def log_softmax(x, dim):
        x = x - paddle.max(x, dim, keepdim=True)
        return x - paddle.log(torch_order.sum(torch_order.exp(x), dim, keepdim=True))

    # -- linear algebra
    matmul, grouped_matmul = torch_order.matmul, torch_order.grouped_matmul
    bmm = staticmethod(paddle.matmul)
    einsum = staticmethod(paddle.einsum)

    # -- selection
    @staticmethod
    def topk(x, k):
        """(values, int64 index), largest first."""
        return paddle.topk(x, k, -1)

    @staticmethod
    def gather(x, dim, index):
        return paddle.take_along_axis(x, index, dim, broadcast=False)

    @staticmethod
    def scatter(x, dim, index, values):
        return paddle.put_along_axis(x, index, values, dim, broadcast=False)

    @staticmethod
    def index_select(x, index):
        return paddle.gather(x, index)

    @staticmethod
    def index_add(x, index, rows):
        return paddle.index_add(x, index, 0, rows)

    @staticmethod
    def one_hot(index, classes):
        return F.one_hot(index, classes)

    @staticmethod
    def nonzero(mask):
        """One index tensor per dimension."""
        return tuple(x.flatten() for x in paddle.nonzero(mask, as_tuple=True))

    @staticmethod
    def shared_rows(keys, index):
        """keys [M, D], index [R, T] -> [R, T, D]; -1 gives zeros and reads no key."""
        rows = paddle.gather(paddle.concat([paddle.zeros_like(keys[:1]), keys], 0), index.flatten() + 1)
        return rows.reshape([*index.shape, keys.shape[-1]])

    # -- between ranks
    @staticmethod
    def all_reduce(x, group, op="sum"):
        """A new tensor, the sum or maximum over the ranks of a group; without a gradient."""
        return x if group.size == 1 else group.all_reduce_(x.contiguous().clone(), op)

    # -- whole operations
    @staticmethod
    def embedding(ids, weight):
        return F.embedding(ids, weight)

    @staticmethod
    def rms_norm(x, weight, eps):
        wide = x.astype("float32") if x.dtype == paddle.bfloat16 else x
        r = torch_order.rsqrt(torch_order.mean(paddle.square(wide), -1, keepdim=True) + eps)
        return torch_order.scale_rows(torch_order.scale_rows(wide, r), weight.astype(wide.dtype)).astype(x.dtype)

    @staticmethod
    def adamw_(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
        p.scale_(1 - lr * weight_decay)
        m.add_((g - m) * (1 - beta1))
        v.scale_(beta2).add_((g * (1 - beta2)) * g)
        denominator = torch_order.sqrt(v) / (1 - beta2**step) ** 0.5 + eps
        p.add_((m * (-lr / (1 - beta1**step))) / denominator)
