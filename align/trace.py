"""Record the tensors of one pass under the names of a reference trace, from outside the model.

Two kinds of taps: results (or arguments) of a layer, through Paddle's forward hooks; and of an op that a layer
calls, by wrapping it in that layer's table of ops. The model computes the same bits with a tracer attached.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor, nn


@dataclass(frozen=True)
class Tap:
    """A tensor to record: ``name`` in the trace, from the layer at ``layer`` (its path) or from the op it calls.

    ``pick`` takes ("in" or "out", position) of the layer's or op's arguments or results.
    """

    name: str
    layer: str
    pick: tuple[str, int] = ("out", 0)
    op: str | None = None


def _hyper_connection(at: str) -> list[Tap]:
    return [
        Tap(f"{at}.proj", at, ("out", 0), "hc_project"),
        Tap(f"{at}.r", at, ("out", 1), "hc_project"),
        Tap(f"{at}.h_pre", at, ("out", 0), "hc_gates"),
        Tap(f"{at}.h_post", at, ("out", 1), "hc_gates"),
        Tap(f"{at}.h_res", at, ("out", 0), "sinkhorn"),
        Tap(f"{at}.aggregated", at, ("out", 0), "hc_aggregate"),
        Tap(f"{at}.post_out", at, ("out", 0), "hc_mix"),
    ]


def _attention(at: str) -> list[Tap]:
    core, indexer = f"{at}.core_attention", f"{at}.core_attention.indexer"
    return [
        Tap(f"{at}.q_down.out", f"{at}.linear_q_down_proj"),
        Tap(f"{at}.q_layernorm.out", f"{at}.q_layernorm"),
        Tap(f"{at}.kv_layernorm.out", f"{at}.kv_layernorm"),
        Tap(f"{at}.compressor.out", f"{core}.compressor"),
        Tap(f"{at}.indexer.q", indexer, ("in", 0), "indexer_score"),
        Tap(f"{at}.indexer.compressor.out", indexer, ("in", 1), "indexer_score"),
        Tap(f"{at}.indexer.weights", indexer, ("in", 2), "indexer_score"),
        Tap(f"{at}.indexer.topk", indexer, ("out", 0), "indexer_topk"),
        Tap(f"{at}.indexer.loss", core, ("out", 0), "indexer_loss"),
        Tap(f"{at}.core.query", core, ("in", 0), "sparse_attention"),
        Tap(f"{at}.core.key", core, ("in", 1), "sparse_attention"),
        Tap(f"{at}.core.out", core, ("out", 0), "sparse_attention"),
        Tap(f"{at}.grouped_o.out", at, ("out", 0), "grouped_linear"),
        Tap(f"{at}.out", at),
    ]


def _mixture_of_experts(at: str) -> list[Tap]:
    return [
        Tap(f"{at}.shared.out", f"{at}.shared_experts"),
        Tap(f"{at}.router.logits", f"{at}.router", ("out", 0), "router_logits"),
        Tap(f"{at}.router.probs", f"{at}.router", ("out", 0)),
        Tap(f"{at}.router.map", f"{at}.router", ("out", 1)),
        Tap(f"{at}.experts.in", at, ("out", 0), "permute"),
        Tap(f"{at}.experts.probs", at, ("out", 1), "permute"),
        Tap(f"{at}.experts.tokens_per_expert", f"{at}.experts", ("in", 2)),
        Tap(f"{at}.experts.out", f"{at}.experts"),
        Tap(f"{at}.out", at),
    ]


def _layer(at: str) -> list[Tap]:
    return [
        Tap(f"{at}.in", at, ("in", 0)),
        Tap(f"{at}.out", at),
        Tap(f"{at}.input_layernorm.out", f"{at}.input_layernorm"),
        Tap(f"{at}.pre_mlp_layernorm.out", f"{at}.pre_mlp_layernorm"),
        *_hyper_connection(f"{at}.self_attention_hyper_connection"),
        *_hyper_connection(f"{at}.mlp_hyper_connection"),
        *_attention(f"{at}.self_attention"),
        *_mixture_of_experts(f"{at}.mlp"),
    ]


def taps_of(model: nn.Layer) -> list[Tap]:
    """Every tap of a DeepseekV4Model, under the names of a reference trace."""
    config = model.config
    taps = [Tap("embedding.out", "embedding"), Tap("logits", "output_layer")]
    for i in range(config.num_hidden_layers):
        taps += _layer(f"decoder.layers.{i}")
    taps += [
        Tap("decoder.contract.out", "decoder", ("out", 0), "hc_contract"),
        Tap("decoder.final_layernorm.out", "decoder.final_layernorm"),
        Tap("decoder.mhc_multistream", "decoder", ("in", 0), "hc_contract"),
    ]
    for i in range(config.num_nextn_predict_layers):
        at = f"mtp.layers.{i}"
        taps += [Tap(f"{at}.{name}.out", f"{at}.{name}") for name in ("enorm", "hnorm", "e_proj", "h_proj")]
        taps += _layer(f"{at}.mtp_model_layer")
        taps += [
            Tap(f"{at}.contract.out", at, ("out", 0), "hc_contract"),
            Tap(f"{at}.final_layernorm.out", f"{at}.final_layernorm"),
        ]
    return taps


def _sequence(x) -> tuple:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


class Tracer:
    """Context manager that records into ``forward`` and ``gradients``, both name -> numpy array.

    A tap that fires again in the same pass gets ``#2``, ``#3`` behind its name. ``names`` (a regular expression)
    limits what is recorded.
    """

    def __init__(self, model: nn.Layer, names: str = ""):
        self.model, self.wanted = model, re.compile(names)
        self.forward: dict[str, np.ndarray] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self._calls: Counter = Counter()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Tracer:
        layers = dict(self.model.named_sublayers())
        for tap in taps_of(self.model):
            if tap.layer in layers and self.wanted.search(tap.name):
                (self._tap_op if tap.op else self._tap_layer)(layers[tap.layer], tap)
        return self

    def __exit__(self, *exception) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def new_pass(self) -> None:
        """Forget the call counts: the next pass records under the plain names again, over the old values."""
        self._calls.clear()

    def _tap_layer(self, layer: nn.Layer, tap: Tap) -> None:
        side, position = tap.pick

        def hook(_, inputs, outputs):
            self._record(tap.name, _sequence(inputs if side == "in" else outputs)[position])

        handle = layer.register_forward_post_hook(hook)
        self._undo.append(handle.remove)

    def _tap_op(self, layer: nn.Layer, tap: Tap) -> None:
        side, position = tap.pick
        original = getattr(layer.ops, tap.op)

        def recording(*args, **kwargs):
            outputs = original(*args, **kwargs)
            self._record(tap.name, _sequence(args if side == "in" else outputs)[position])
            return outputs

        setattr(layer.ops, tap.op, recording)
        self._undo.append(lambda: setattr(layer.ops, tap.op, original))

    def _record(self, name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        self._calls[name] += 1
        if self._calls[name] > 1:
            name = f"{name}#{self._calls[name]}"
        self.forward[name] = tensor.detach().numpy().copy()
        if not tensor.stop_gradient and paddle.is_grad_enabled():

            def keep(gradient):
                self.gradients[name] = gradient.numpy().copy()

            tensor.register_hook(keep)
