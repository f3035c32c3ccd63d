"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on a model from outside: its layers know nothing of them.

A linear layer is replaced by one that adds its adapter to what the layer itself computes. The layer's own tensors keep
their names and their numbers, packed ones too; only adapters are parameters to train. B starts at zero, so that the
first loss is that of the base model to the bit, under every numeric policy.
"""

from __future__ import annotations

import re
import zlib
from types import SimpleNamespace

import numpy as np
import paddle
from paddle import Tensor, nn

from paddledsv4.config.lora import ATTENTION, EXPERTS, GROUPED, LoraConfig
from paddledsv4.errors import UserError
from paddledsv4.moe.mxfp4 import PackedLinear
from paddledsv4.transformer.attention import Attention
from paddledsv4.transformer.build import constant
from paddledsv4.transformer.linear import Linear

ALL_LINEAR = "all-linear"
_BESIDE = "_adapter"  # the grouped projection is a parameter, so its adapter is a layer beside it


class Adapter(nn.Layer):
    """lora_A [r, in] and lora_B [out, r], float32 or wider; they multiply in the dtype of the activations."""

    def __init__(self, ops: SimpleNamespace, a: list[int], b: list[int], dtype: str, scale: float):
        super().__init__()
        self.ops, self.scale = ops, scale
        self.lora_A, self.lora_B = constant(a, dtype, 0.0), constant(b, dtype, 0.0)

    def draw(self, name: str, seed: int) -> None:
        """A uniform within 1 / sqrt(in), as peft draws it. The numbers depend on the name, not on the layout."""
        bound = self.lora_A.shape[1] ** -0.5
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        self.lora_A.set_value(rng.uniform(-bound, bound, self.lora_A.shape).astype(self.lora_A.numpy().dtype))

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """scale A and B as x is multiplied with them."""
        return (self.lora_A * self.scale).astype(x.dtype), self.lora_B.astype(x.dtype)


class LoraLinear(Adapter):
    """base(x) + scale B A x, in place of the linear layer ``base``, dense or packed."""

    groups = 1

    def __init__(self, base: Linear | PackedLinear, features: tuple[int, int], dtype: str, config: LoraConfig):
        super().__init__(base.ops, [config.r, features[0]], [features[1], config.r], dtype, config.scale)
        self.base = base.forward  # not the layer itself: its tensors stand here, under their old names
        for name, tensor in base.named_parameters():
            self.add_parameter(name, tensor)
        for name, tensor in base.named_buffers():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        to_base, to_adapter = self.ops.fan_out(x, 2)
        a, b = self.factors(x)
        return self.ops.add(self.base(to_base), self.ops.linear(self.ops.linear(to_adapter, a), b))


class LoraGroupedLinear(Adapter):
    """The same for the op ``grouped_linear``: every group g has its own A_g [r, in] and B_g [out, r]."""

    def __init__(self, ops: SimpleNamespace, weight: Tensor, groups: int, dtype: str, config: LoraConfig):
        out, features = weight.shape
        super().__init__(ops, [groups * config.r, features], [out, config.r], dtype, config.scale)
        self.groups = groups

    def forward(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """x [s, b, groups * in], weight [groups * out, in] -> [s, b, groups * out]."""
        to_base, to_adapter = self.ops.fan_out(x, 2)
        a, b = self.factors(x)
        low = self.ops.grouped_linear(to_adapter, a, groups=groups)
        return self.ops.add(
            self.ops.grouped_linear(to_base, weight, groups=groups), self.ops.grouped_linear(low, b, groups=groups)
        )


def attach(model: nn.Layer, config: LoraConfig, seed: int) -> dict[str, Adapter]:
    """Freeze ``model`` and give the layers that ``config`` names an adapter each. Returns them by the layers' paths.

    Raises:
        UserError: a target that no layer has, adapters that are there already, or weights split over tensor ranks.
    """
    if adapters(model):
        raise UserError("the model has adapters already; merge them first")
    if model.tensor.group.size > 1:
        raise UserError(
            f"parallel.tensor = {model.tensor.group.size}: must be 1 with a lora section; spread the experts with "
            "parallel.expert and the tokens with parallel.data"
        )
    layers = dict(model.named_sublayers())
    chosen = targets(adaptable(model), config)
    dtype = "float64" if model.embedding.word_embeddings.weight.dtype == paddle.float64 else "float32"
    for parameter in model.parameters():
        parameter.stop_gradient = True
    for path in chosen:
        parent, name = layers[path.rpartition(".")[0]], path.rpartition(".")[2]
        if name == GROUPED:
            adapter = LoraGroupedLinear(parent.ops, parent.linear_o_group_proj, parent.groups, dtype, config)
            setattr(parent, name + _BESIDE, adapter)
            parent.ops = SimpleNamespace(**vars(parent.ops) | {"grouped_linear": adapter})
        else:
            adapter = LoraLinear(layers[path], features(layers[path]), dtype, config)
            setattr(parent, name, adapter)
        adapter.draw(path, seed)
    return adapters(model)


def features(layer: Linear | PackedLinear) -> tuple[int, int]:
    """in and out."""
    out, columns = layer.weight.shape
    return (2 * columns if isinstance(layer, PackedLinear) else columns), out


def adaptable(model: nn.Layer) -> list[str]:
    """Paths of the layers that can have an adapter, in the model's order."""
    found = []
    for path, layer in model.named_sublayers():
        if isinstance(layer, Attention):
            found.append(f"{path}.{GROUPED}")
        if isinstance(layer, Linear | PackedLinear) and path.rpartition(".")[2] in (*ATTENTION, *EXPERTS):
            found.append(path)
    return found


def targets(paths: list[str], config: LoraConfig) -> list[str]:
    """Those of ``paths`` that the configuration means.

    Raises:
        UserError: a name that is the end of no path, or an expression that matches none.
    """
    wanted = config.target_modules
    wanted = list((*ATTENTION, *EXPERTS)) if wanted == ALL_LINEAR else wanted
    if isinstance(wanted, str):
        try:
            chosen = [path for path in paths if re.fullmatch(wanted, path)]
        except re.error as error:
            config.reject("target_modules", f"is no regular expression ({error})")
        if not chosen:
            config.reject("target_modules", f"matches no layer; paths end in {_ends(paths)}, such as {paths[0]}")
        return chosen
    for name in wanted:
        if not any(_is_end(name, path) for path in paths):
            raise UserError(f"lora.target_modules: no layer is called {name!r}; choose from: {_ends(paths)}")
    return [path for path in paths if any(_is_end(name, path) for name in wanted)]


def _is_end(name: str, path: str) -> bool:
    return f".{path}".endswith(f".{name}")


def _ends(paths: list[str]) -> str:
    return ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def adapters(model: nn.Layer) -> dict[str, Adapter]:
    """Path of the adapted layer -> adapter."""
    found = ((path, layer) for path, layer in model.named_sublayers() if isinstance(layer, Adapter))
    return {path.removesuffix(_BESIDE): layer for path, layer in found}
