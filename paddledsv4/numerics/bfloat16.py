"""bfloat16 on a device without bfloat16 kernels, which is what Paddle's CPU is.

Between ops a tensor really is bfloat16; inside an op its values are held in float32 and rounded to bfloat16

* for Megatron's order: after every kernel that Megatron rounds after, and so are the gradients
  (:func:`with_rounding`);
* for the other variants: once, at the op's outputs and its gradients (:func:`at_the_boundary`).

Which results stay in float32 follows from torch's promotion rule in the first case, and is declared by the op
(``wide``) in the second. Ops that get no bfloat16 and make none are untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import paddle
from paddle import Tensor

from paddledsv4.numerics.function import differentiable
from paddledsv4.numerics.paddle_kernels import PaddleKernels


def needs_emulation(dtype: str) -> bool:
    """Whether a model with parameters of ``dtype`` is emulated on the current device."""
    return dtype == "bfloat16" and paddle.get_device().startswith("cpu")


def _is_narrow(x) -> bool:
    return isinstance(x, Tensor) and x.dtype == paddle.bfloat16


def _map(function: Callable, values):
    """``function`` on every element of nested tuples and lists."""
    if isinstance(values, list):
        return [_map(function, v) for v in values]
    if isinstance(values, tuple):  # named ones too, which some kernels return
        return tuple(_map(function, v) for v in values)
    return function(values)


# ---- one rounding, at the op's outputs


def at_the_boundary(function: Callable, outputs: tuple[str, ...], wide: tuple[str, ...]) -> Callable:
    """``function`` in float32 on bfloat16 tensors; results are rounded, except those named in ``wide``."""

    def narrow(position: int, x):
        name = outputs[min(position, len(outputs) - 1)]
        return x.astype("bfloat16") if isinstance(x, Tensor) and x.is_floating_point() and name not in wide else x

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not any(map(_is_narrow, args)):
            return function(*args, **kwargs)
        result = function(*(x.astype("float32") if _is_narrow(x) else x for x in args), **kwargs)
        if isinstance(result, tuple):
            return tuple(narrow(i, x) for i, x in enumerate(result))
        return narrow(0, result)

    call.takes_float32 = True  # instead of bfloat16, where the numbers are the same
    return call


# ---- a rounding after every kernel


class Rounded:
    """A float32 tensor; ``narrow`` says that it stands for a bfloat16 one and holds only such values.

    Arithmetic promotes as torch does: the result is narrow unless a wide tensor takes part.
    """

    __slots__ = ("narrow", "value")

    def __init__(self, value: Tensor, narrow: bool):
        self.value, self.narrow = value, narrow

    @property
    def shape(self):
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    def __getattr__(self, name: str):
        """Methods of the tensor that lay it out anew: reshape, expand, unsqueeze, squeeze."""
        return _rounding(getattr(_Methods, name), self)

    def __float__(self) -> float:
        return float(self.value)

    def __gt__(self, other):
        return self.value > _used(other)

    def __lt__(self, other):
        return self.value < _used(other)


class _Methods:
    """Layout by method, as functions of the tensor."""

    reshape = staticmethod(lambda x, shape: x.reshape(shape))
    expand = staticmethod(lambda x, shape: x.expand(shape))
    unsqueeze = staticmethod(lambda x, dim: x.unsqueeze(dim))
    squeeze = staticmethod(lambda x, dim: x.squeeze(dim))


def _round(x: Tensor) -> Tensor:
    """Nearest bfloat16 values, in float32; gradients are rounded alike."""
    return x.astype("bfloat16").astype("float32")


def _used(x):
    """What a kernel reads. Reading a narrow value means that the gradient coming back is rounded on its own."""
    if not isinstance(x, Rounded):
        return x
    return _round(x.value) if x.narrow and not x.value.stop_gradient else x.value


def _flat(values):
    for v in values:
        if isinstance(v, tuple | list):
            yield from _flat(v)
        else:
            yield v


def _wrap(x, narrow: bool):
    """A result of a kernel: rounded if it is narrow; integers, booleans and what is no tensor stay."""
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        return x
    return Rounded(_round(x) if narrow else x, narrow)


def _rounding(kernel: Callable, *bound) -> Callable:
    """``kernel`` on Rounded values."""

    def call(*args, **kwargs):
        args = (*bound, *args)
        floats = [x for x in _flat(args) if isinstance(x, Rounded)]
        narrow = bool(floats) and all(x.narrow for x in floats)
        return _map(lambda x: _wrap(x, narrow), kernel(*_map(_used, args), **kwargs))

    return call


def _operator(name: str) -> Callable:
    return lambda *args: _rounding(lambda a, *rest: getattr(a, name)(*rest))(*args)


for _name in ("add", "sub", "mul", "truediv", "pow"):
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(Rounded, _form, _operator(_form))
for _form in ("__neg__", "__getitem__"):
    setattr(Rounded, _form, _operator(_form))


class _RoundingKernels:
    """The namespace of :class:`PaddleKernels` on :class:`Rounded` values; only what has to do with dtypes is new."""

    name = "paddle"

    def __getattr__(self, kernel: str) -> Callable:
        wrapped = _rounding(getattr(PaddleKernels, kernel))
        setattr(self, kernel, wrapped)
        return wrapped

    def dtype(self, x) -> str:
        return "bfloat16" if isinstance(x, Rounded) and x.narrow else PaddleKernels.dtype(_used(x))

    def cast(self, x, dtype: str):
        if dtype == "bfloat16":
            return _wrap(_used(x).astype("float32"), True)
        return _wrap(_used(x).astype(dtype), False)

    def wide(self, x):
        return _wrap(PaddleKernels.wide(_used(x)), False)

    def zeros(self, shape, dtype, like=None):
        return self.full(shape, 0.0, dtype)

    def full(self, shape, value, dtype, like=None):
        held = "float32" if dtype == "bfloat16" else dtype
        return _wrap(paddle.full(shape, value, held), dtype == "bfloat16")

    def softmax(self, x, dim, dtype=None):
        return _wrap(PaddleKernels.softmax(_used(x), dim, dtype), x.narrow and dtype in (None, "bfloat16"))

    def add_(self, x, y) -> None:
        x.value.add_(_used(y))

    def adamw_(self, *args) -> None:
        PaddleKernels.adamw_(*(x.value if isinstance(x, Rounded) else x for x in args))


KERNELS = _RoundingKernels()


def _enter(x):
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        return x
    return Rounded(x.astype("float32"), True) if _is_narrow(x) else Rounded(x, False)


def _leave(x):
    if not isinstance(x, Rounded):
        return x
    return x.value.astype("bfloat16") if x.narrow else x.value


def with_rounding(function: Callable, explicit: bool) -> Callable:
    """``function(K, *tensors, **static)`` of :mod:`paddledsv4.numerics.megatron` on emulating kernels."""

    def recorded(*args, **kwargs):
        return _map(_leave, function(KERNELS, *_map(_enter, args), **kwargs))

    def written_out(*args, **kwargs):
        outputs, closure = function(KERNELS, *_map(_enter, args), **kwargs)
        return _map(_leave, outputs), closure and (lambda *grads: _map(_leave, tuple(closure(*_map(_enter, grads)))))

    return functools.wraps(function)(differentiable(written_out) if explicit else recorded)
