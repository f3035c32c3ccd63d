"""The same kernels on torch, and the bridge that lends Paddle's memory to them. The only module here to import torch.

Tensors cross by DLPack without a copy. Inside an op torch's autograd records; its backward runs on the gradients that
Paddle's autograd hands in, so between ops everything is Paddle's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import paddle
import torch
from paddle import Tensor
from paddle.utils.dlpack import to_dlpack as paddle_to_dlpack
from torch.nn import functional as F
from torch.utils.dlpack import to_dlpack as torch_to_dlpack

from paddledsv4.numerics.function import differentiable


def _dense_strides(shape) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]


def to_torch(x: Tensor) -> torch.Tensor:
    """The same memory as a torch tensor, densely packed.

    Packed by its strides too: torch's CPU GEMM takes another path, with other bits, when a dimension of size 1 has
    an odd stride, which ``contiguous()`` leaves as it is (spec section 0, stride trap).
    """
    t = torch.from_dlpack(paddle_to_dlpack(x.detach().contiguous()))
    dense = _dense_strides(t.shape)
    return t if list(t.stride()) == dense else t.as_strided(t.shape, dense)


@functools.cache
def _nothing() -> Tensor:
    return paddle.empty([0])


def to_paddle(t: torch.Tensor) -> Tensor:
    """The same memory as a Paddle tensor.

    Every call of Paddle's own constructor, in paddle.from_dlpack too, loses 64 bytes for ever: 80 KB in a step of the
    tiny model. A clone of an empty tensor that is then given the memory loses none (3 microseconds, from_dlpack 72).
    Streams need no synchronisation: torch works on Paddle's (:func:`paddle_stream`).
    """
    tensor = _nothing().clone()
    tensor.get_tensor()._share_data_with(paddle.base.core.from_dlpack(torch_to_dlpack(t)))
    return tensor


class Exchange:
    """The tensors of one call that crossed to torch, so that what comes back unchanged is not lent twice.

    Paddle frees borrowed memory under one lock that is not recursive: a Paddle tensor on a torch tensor that itself
    stands on a Paddle tensor deadlocks when it dies. Results that share memory with an argument therefore return as
    that argument, or as a copy when they are only a part of it.
    """

    def __init__(self):
        self.lent: dict[int, Tensor] = {}

    def to_torch(self, x: Tensor) -> torch.Tensor:
        x = x.detach().contiguous()
        t = to_torch(x)
        if x.size:
            self.lent[t.untyped_storage().data_ptr()] = x
        return t

    def to_paddle(self, t):
        """The same memory as a Paddle tensor; what is no tensor stays."""
        if not isinstance(t, torch.Tensor):
            return t
        if not t.numel():  # no memory to share: all empty tensors have the same address
            return paddle.empty(list(t.shape), str(t.dtype).split(".")[-1])
        t = t.detach().contiguous()
        source = self.lent.get(t.untyped_storage().data_ptr())
        if source is None:
            return to_paddle(t)
        if t.data_ptr() == source.data_ptr() and t.numel() == source.size:
            return source.view(list(t.shape))  # reshape would give the argument itself back
        return to_paddle(t.clone())


def paddle_stream(tensors):
    """Context in which torch works on Paddle's current stream, so that neither has to wait for the other."""
    gpu = next((x for x in tensors if isinstance(x, Tensor) and x.place.is_gpu_place()), None)
    if gpu is None:
        return contextlib.nullcontext()
    stream = paddle.device.current_stream().stream_base.cuda_stream
    return torch.cuda.stream(torch.cuda.ExternalStream(stream))


def _map(function: Callable, values):
    return tuple(function(v) for v in values) if isinstance(values, tuple) else function(values)


def bridge(function: Callable, explicit: bool) -> Callable:
    """``function(K, *args, **static)`` on Paddle tensors, computed by torch. See numerics/megatron.py."""

    @functools.wraps(function)
    def on_paddle_tensors(*args, **kwargs):
        with paddle_stream(args):
            return (_explicit if explicit else _recorded)(function, args, kwargs)

    return differentiable(on_paddle_tensors)


def _explicit(function, args, kwargs):
    exchange = Exchange()
    with torch.no_grad():
        output, closure = function(TorchKernels, *_map_tensors(exchange.to_torch, args), **kwargs)

    def backward(*grads):
        with paddle_stream(grads), torch.no_grad():
            results = closure(*(exchange.to_torch(g) for g in grads))
        return tuple(exchange.to_paddle(g) for g in results)

    return _map(exchange.to_paddle, output), backward


def _recorded(function, args, kwargs):
    exchange, leaves = Exchange(), []

    def leaf(x):
        t = exchange.to_torch(x)
        leaves.append(t.requires_grad_() if t.is_floating_point() else t)
        return t

    with torch.enable_grad():
        output = function(TorchKernels, *_map_tensors(leaf, args), **kwargs)
    outputs = output if isinstance(output, tuple) else (output,)

    def backward(*grads):
        pairs = [(o, exchange.to_torch(g)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        inputs = [x for x in leaves if x.requires_grad]
        with paddle_stream(grads):
            found = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        by_input = dict(zip(map(id, inputs), found, strict=True))
        return tuple(exchange.to_paddle(by_input.get(id(x))) for x in leaves)

    return _map(exchange.to_paddle, output), backward


def _map_tensors(function, args):
    return [_map_tensors(function, a) if isinstance(a, list) else function(a) if isinstance(a, Tensor) else a
            for a in args]


class _TransposedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g.transpose(-1, -2).contiguous().transpose(-1, -2)


class TorchKernels:
    """A namespace with the meaning of :class:`~paddledsv4.numerics.paddle_kernels.PaddleKernels`."""

    name = "torch"

    # -- layout
    @staticmethod
    def alias(x):
        return x.detach()

    @staticmethod
    def view(x):
        return x.view_as(x)

    @staticmethod
    def detach(x):
        return x.detach()

    @staticmethod
    def contiguous(x):
        return x.contiguous()

    @staticmethod
    def transposed_gradient(x):
        """The order in which torch adds the entries of a row follows from their order in memory."""
        return _TransposedGradient.apply(x)

    @staticmethod
    def permute(x, *dims):
        return x.permute(*dims)

    cat, stack = torch.cat, torch.stack
    chunk, split = torch.chunk, torch.split

    @staticmethod
    def cast(x, dtype):
        return x.to(getattr(torch, dtype))

    @staticmethod
    def wide(x):
        return x if x.dtype in (torch.float32, torch.float64) else x.float()

    @staticmethod
    def dtype(x):
        return str(x.dtype).split(".")[-1]

    # -- creation
    @staticmethod
    def arange(*args, dtype, like=None):
        return torch.arange(*args, dtype=getattr(torch, dtype), device=None if like is None else like.device)

    @staticmethod
    def zeros(shape, dtype, like=None):
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=None if like is None else like.device)

    @staticmethod
    def full(shape, value, dtype, like=None):
        return torch.full(shape, value, dtype=getattr(torch, dtype), device=None if like is None else like.device)

    # -- elementwise
    exp, log, sqrt, rsqrt, cos, sin = torch.exp, torch.log, torch.sqrt, torch.rsqrt, torch.cos, torch.sin
    square, sigmoid, relu, abs, sign = torch.square, torch.sigmoid, torch.relu, torch.abs, torch.sign
    silu, softplus = F.silu, F.softplus
    logaddexp, maximum, where, clamp = torch.logaddexp, torch.max, torch.where, torch.clamp

    logical_not, logical_and = torch.logical_not, torch.logical_and

    @staticmethod
    def lowest(x):
        return torch.finfo(x.dtype).min

    @staticmethod
    def masked_fill(x, mask, value):
        return x.masked_fill(mask, value)

    # -- reductions
    @staticmethod
    def sum(x, dim=None, keepdim=False):
        return x.sum() if dim is None else x.sum(dim=dim, keepdim=keepdim)

    @staticmethod
    def mean(x, dim, keepdim=False):
        return x.mean(dim=dim, keepdim=keepdim)

    @staticmethod
    def max(x, dim, keepdim=False):
        return x.max(dim=dim, keepdim=keepdim).values

    @staticmethod
    def norm(x, dim, keepdim=False):
        return x.norm(dim=dim, keepdim=keepdim)

    @staticmethod
    def scale_rows(a, b):
        return a * b

    @staticmethod
    def vector_norm(x):
        return torch.norm(x)

    @staticmethod
    def add_(x, y):
        x.add_(y)

    logsumexp = torch.logsumexp

    @staticmethod
    def softmax(x, dim, dtype=None):
        return torch.softmax(x, dim=dim, dtype=None if dtype is None else getattr(torch, dtype))

    @staticmethod
    def log_softmax(x, dim):
        return torch.log_softmax(x, dim=dim)

    # -- linear algebra
    matmul, bmm, einsum = torch.matmul, torch.bmm, torch.einsum

    @staticmethod
    def grouped_matmul(x, blocks):
        return torch.einsum("sbgd,grd->sbgr", x, blocks)

    # -- selection
    @staticmethod
    def topk(x, k):
        return torch.topk(x, k, dim=-1)

    gather = torch.gather

    @staticmethod
    def scatter(x, dim, index, values):
        return x.scatter(dim, index, values)

    @staticmethod
    def index_select(x, index):
        return x.index_select(0, index)

    @staticmethod
    def index_add(x, index, rows):
        return x.index_add(0, index, rows)

    one_hot = F.one_hot

    @staticmethod
    def nonzero(mask):
        return mask.nonzero(as_tuple=True)

    @staticmethod
    def shared_rows(keys, index):
        """As the reference gathers, because the order in which its backward sums over rows follows from it."""
        rows, taken = index.shape
        everywhere = keys.unsqueeze(0).expand(rows, -1, -1)
        read = index.clamp(min=0).unsqueeze(-1)
        gathered = torch.gather(everywhere, 1, read.expand(rows, taken, keys.shape[-1]))
        return gathered.masked_fill_((index < 0).unsqueeze(-1), 0.0)

    # -- between ranks
    @staticmethod
    def all_reduce(x, group, op="sum"):
        return x if group.size == 1 else to_torch(group.all_reduce_(to_paddle(x.contiguous().clone()), op)).clone()

    # -- whole operations
    @staticmethod
    def embedding(ids, weight):
        return F.embedding(ids, weight)

    @staticmethod
    def rms_norm(x, weight, eps):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    @staticmethod
    def adamw_(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay):
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        p.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
