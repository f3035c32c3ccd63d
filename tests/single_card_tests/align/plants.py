"""Bugs to plant into a candidate, each with the op that `align locate` has to name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import paddle
from paddle.autograd import PyLayer

from paddledsv4.distributed.context_parallel import SequenceSlice
from paddledsv4.moe.router import LearnedRouter
from paddledsv4.numerics.bfloat16 import at_the_boundary
from paddledsv4.numerics.registry import load_all
from paddledsv4.ops.precision import widen
from paddledsv4.training import step as step_file
from paddledsv4.training.optimizer import Optimizer
from paddledsv4.transformer import attention as attention_file

OPS = load_all()


@dataclass(frozen=True)
class Bug:
    """``plant`` is a context manager; ``op`` what has to be named. ``preset``: the candidate's.

    ``precisions``: where it exists; a cast to bfloat16 too many is none where the result is bfloat16 already.
    """

    name: str
    op: str
    plant: Callable
    preset: str = "paddle"
    precisions: tuple[str, ...] = ("fp32", "bf16")


# ---- tools


def scaled(x, factor: float):
    return (x.astype("float32") * factor).astype(x.dtype)


def early_cast(x):
    return x.astype("bfloat16").astype(x.dtype)


class _Backward(PyLayer):
    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.change(g)


def backward(x, change: Callable):
    """x, with its gradient changed on the way back."""
    return x if x.stop_gradient else _Backward.apply(x, change)


@contextmanager
def op_bug(op: str, change: Callable, preset: str = "paddle") -> Iterator[None]:
    """``change(f, *args, **kwargs)`` in the place of the preset's variant ``f`` of ``op``.

    An emulated bfloat16 op is changed before its results are rounded: a thousandth more would vanish afterwards.
    """
    variant = OPS[op].variants[preset]

    def wrong(*args, **kwargs):
        return change(variant.function, *args, **kwargs)

    emulated = wrong if preset == "torch" else at_the_boundary(wrong, OPS[op].outputs, OPS[op].wide)
    broken = replace(variant, function=wrong, emulated=emulated)
    with mock.patch.dict(OPS[op].variants, {preset: broken}):
        yield


def op(name: str, op_name: str, change: Callable, **more) -> Bug:
    preset = more.get("preset", "paddle")
    return Bug(name, op_name, lambda: op_bug(op_name, change, preset), **more)


def result(name: str, op_name: str, change: Callable, index: int = 0, **more) -> Bug:
    """A bug in result ``index`` of an op."""

    def changed(f, *args, **kwargs):
        outputs = f(*args, **kwargs)
        if not isinstance(outputs, tuple):
            return change(outputs)
        return tuple(change(x) if i == index else x for i, x in enumerate(outputs))

    return op(name, op_name, changed, **more)


def argument(name: str, op_name: str, index: int | str, change: Callable, **more) -> Bug:
    """A bug in what an op makes of argument ``index``."""

    def changed(f, *args, **kwargs):
        if isinstance(index, str) and index in kwargs:
            return f(*args, **kwargs | {index: change(kwargs[index])})
        at = index if isinstance(index, int) else -1
        args = list(args)
        args[at] = change(args[at])
        return f(*args, **kwargs)

    return op(name, op_name, changed, **more)


def patched(name: str, op_name: str, target, attribute: str, value, **more) -> Bug:
    return Bug(name, op_name, lambda: mock.patch.object(target, attribute, value), **more)


# ---- wiring


def _roll_two(sequence, x):
    return paddle.concat([x[:, 2:], paddle.zeros_like(x[:, :2])], 1)


_accumulate, _step, _losses = Optimizer.accumulate, Optimizer.step, step_file.auxiliary_losses
_attention = attention_file.Attention.forward


def _decay_everything(self, learning_rate):
    for state in self.states:
        state.weight_decay = self.config.weight_decay
    return _step(self, learning_rate)


def _wrong_beta(self, learning_rate):
    self.config = self.config.replace(betas=(self.config.betas[0], 0.999))
    return _step(self, learning_rate)


def _only_last_microbatch(self):
    for state in self.states:
        state.main_grad.zero_()
    _accumulate(self)


def _half_indexer_loss(train):
    return replace(_losses(train), indexer_seed=0.5)


def _larger_mtp_factor(train):
    return replace(_losses(train), mtp_factor=2 * _losses(train).mtp_factor)


def _no_scale(self, x, context):
    if not getattr(self, "_halved", False):
        self.core_attention.scale, self._halved = self.core_attention.scale * 1.001, True
    return _attention(self, x, context)


_choose = LearnedRouter.choose


def _no_bias(self, scores, context):
    return self.ops.router_topk(scores, paddle.zeros_like(self.expert_bias), self.topk)


def _detached_query(self, x, context):
    norm = self.q_layernorm.forward
    with mock.patch.object(self.q_layernorm, "forward", lambda y: norm(y).detach()):
        return _attention(self, x, context)


def _eps_inside(f, p, g, m, v, *, step, lr, beta1, beta2, eps, weight_decay, scale):
    f(p, g, m, v, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps**0.5, weight_decay=weight_decay, scale=scale)


def _not_clipped(f, *args, scale, **kwargs):
    f(*args, scale=1.0, **kwargs)


def _no_bias_correction(f, *args, step, **kwargs):
    f(*args, step=10**6, **kwargs)


def _swap_probs(f, x, probs, routing_map):
    rows, weights, token = f(x, probs, routing_map)
    return rows, paddle.flip(weights, [0]), token


def _reversed_sum(f, rows, index, tokens):
    backwards = paddle.arange(index.shape[0] - 1, -1, -1)
    return f(paddle.gather(rows, backwards), paddle.gather(index, backwards), tokens)


def _in_two_halves(f, x, weight):
    half = x.shape[-1] // 2
    if half < 16:
        return f(x, weight)
    a, b = f(x[..., :half], weight[:, :half].contiguous()), f(x[..., half:], weight[:, half:].contiguous())
    return (widen(a) + widen(b)).astype(x.dtype)


BUGS = [
    argument("H_res not transposed", "hc_mix", 0, lambda h: h.transpose([0, 1, 3, 2])),
    result("streams mixed +0.1 %", "hc_mix", lambda x: scaled(x, 1.001)),
    argument("sink dropped", "sparse_attention", 4, lambda sink: paddle.full_like(sink, -1e4)),
    argument("window one short", "sparse_attention", "window", lambda w: w - 1),
    argument("attention scale +1 %", "sparse_attention", "scale", lambda s: s * 1.01),
    argument("attention scale +0.1 %", "sparse_attention", "scale", lambda s: s * 1.001),
    argument("ape rolled", "compress", 2, lambda ape: paddle.roll(ape, 1, 0)),
    result("compressed +0.1 %", "compress", lambda x: scaled(x, 1.001)),
    argument("RMSNorm eps 1e-3", "rms_norm", 2, lambda _: 1e-3),
    argument("RMSNorm eps 1e-5", "rms_norm", 2, lambda _: 1e-5),
    argument("head norm eps 1e-3", "head_norm", 1, lambda _: 1e-3),
    argument("head norm eps 1e-5", "head_norm", 1, lambda _: 1e-5),
    argument("hyper-connection eps 1e-3", "hc_project", 2, lambda _: 1e-3),
    argument("Sinkhorn eps 1e-3", "sinkhorn", 2, lambda _: 1e-3),
    argument("Sinkhorn 3 iterations", "sinkhorn", 1, lambda _: 3),
    argument("contraction eps 1e-3", "hc_contract", 4, lambda _: 1e-3),
    result("router weights +1 %", "router_probs", lambda p: p * 1.01),
    result("router weights +0.1 %", "router_probs", lambda p: p * 1.001),
    result("indexer scores +0.1 %", "indexer_score", lambda x: x * 1.001),
    result("causal mask of the indexer missing", "indexer_topk", lambda i: i.abs()),
    result("router logits cast early", "router_logits", early_cast),
    result("hyper-connection projection cast early", "hc_project", early_cast),
    result("h_pre cast early", "hc_gates", early_cast, precisions=("fp32",)),
    result("losses cast early", "cross_entropy", early_cast),
    result("activations cast to bfloat16", "swiglu", early_cast, precisions=("fp32",)),
    argument("SwiGLU clamp missing", "swiglu", "limit", lambda _: 1e9),
    argument("aux loss on another top-k", "sequence_aux_loss", 2, lambda k: k + 1),
    patched("indexer loss over the microbatches", "attach_loss", step_file, "auxiliary_losses", _half_indexer_loss),
    patched("MTP loss factor doubled", "loss_mean", step_file, "auxiliary_losses", _larger_mtp_factor),
    patched("MTP roll off by one", "embedding", SequenceSlice, "roll_left", _roll_two),
    patched("attention scale of a layer +0.1 %", "sparse_attention", attention_file.Attention, "forward", _no_scale),
    patched("expert bias stale", "router_topk", LearnedRouter, "choose", _no_bias),
    patched("query cut off from the graph", "linear", attention_file.Attention, "forward", _detached_query),
    patched("weight decay on 1-D parameters", "adamw", Optimizer, "step", _decay_everything),
    patched("wrong beta2", "adamw", Optimizer, "step", _wrong_beta),
    patched("only the last microbatch's gradients", "grad_norm", Optimizer, "accumulate", _only_last_microbatch),
    op("AdamW eps inside the root", "adamw", _eps_inside),
    op("AdamW without bias correction", "adamw", _no_bias_correction),
    op("gradients not clipped", "adamw", _not_clipped),
    result("gradient norm +0.1 %", "grad_norm", lambda n: n * 1.001),
    argument("expert bias moves the wrong way", "expert_bias_update", 2, lambda rate: -rate),
    argument("rotary angles reversed", "rope", 2, lambda sin: -sin),
    argument("rotary table without YaRN", "rope_table", 5, lambda _: 1.0),
    op("expert weights in another order", "permute", _swap_probs),
    argument("labels shifted", "cross_entropy", 1, lambda y: paddle.roll(y, 1, 1)),
    result("Hadamard scale missing", "hadamard", lambda x: scaled(x, x.shape[-1] ** 0.5)),
    argument("weight gradient +0.1 %", "linear", 1, lambda w: backward(w, lambda g: scaled(g, 1.001))),
    argument("gradient of the streams +0.1 %", "hc_aggregate", 0, lambda x: backward(x, lambda g: scaled(g, 1.001))),
    argument("SwiGLU gradient +1 %", "swiglu", 0, lambda x: backward(x, lambda g: scaled(g, 1.01))),
    argument("sink gradient missing", "sparse_attention", 4, lambda s: s.detach()),
    argument("grouped output gradient reversed", "grouped_linear", 0, lambda x: backward(x, lambda g: -g)),
    op("summation reversed", "unpermute", _reversed_sum, preset="torch", precisions=("fp32",)),
    op("summation in two halves", "linear", _in_two_halves, preset="torch"),
    result("last bit of the norm", "rms_norm", lambda x: scaled(x, 1 + 2.0**-23), preset="torch", precisions=("fp32",)),
]  # fmt: skip
