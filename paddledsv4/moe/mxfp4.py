"""Frozen routed experts that stay in MXFP4 from the checkpoint to the optimizer: 4.25 bits a parameter.

The linear layers of an expert are replaced by :class:`PackedLinear`, one after another as the experts are built, so
that no more than one unpacked weight exists at a time. Packed weights are buffers, not parameters: no gradient, no main
gradient and no optimizer state is ever allocated for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import paddle
from paddle import Tensor, nn

from paddledsv4.distributed.group import Group
from paddledsv4.errors import UserError
from paddledsv4.fusions.packed_linear import input_gradient, packed_product
from paddledsv4.tensor_parallel.layers import GateAndLinear, RowParallelLinear
from paddledsv4.transformer.build import Build, parameter, parameters_are_unset
from paddledsv4.weights.mxfp4 import BLOCK, quantize


class PackedLinear(nn.Layer):
    """y = x W^T with W [out, in] frozen: weight int8 [out, in / 2] and weight_scale uint8 [out, in / 32].

    Its first numbers are those that a linear layer draws, rounded to MXFP4.

    Raises:
        UserError: ``in_features`` has no whole blocks, or the ranks of ``group`` would split the weight.
    """

    def __init__(self, build: Build, in_features: int, out_features: int, group: Group):
        super().__init__()
        if in_features % BLOCK:
            raise UserError(
                f"training.expert_weight_format = 'mxfp4': needs rows of a multiple of {BLOCK}, {build.path} has "
                f"{in_features}; change hidden_size or moe_intermediate_size, or keep the experts in precision"
            )
        if group.size > 1:
            raise UserError(
                f"parallel.expert_tensor = {group.size}: must be 1 with training.expert_weight_format = 'mxfp4', whose "
                "experts are not split; spread them with parallel.expert"
            )
        self.ops, self.dx, self.product = build.ops, build.follow(input_gradient), build.follow(packed_product)
        self.register_buffer("weight", paddle.empty([out_features, in_features // 2], "int8"))
        self.register_buffer("weight_scale", paddle.empty([out_features, in_features // BLOCK], "uint8"))
        if not parameters_are_unset():
            normal = nn.initializer.Normal(0.0, build.config.initializer_range)
            drawn = parameter([out_features, in_features], build.dtype, normal)
            self.pack(drawn.detach().astype("float32").numpy())

    def pack(self, values: np.ndarray) -> None:
        """Round finite float32 numbers [out, in] to MXFP4 and keep them."""
        for tensor, array in zip((self.weight, self.weight_scale), quantize(values), strict=True):
            tensor.set_value(array)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.product(x, self.weight, self.weight_scale, linear=self.ops.linear, dx=self.dx)


def expert_linears(build: Build) -> tuple[type[nn.Layer], type[nn.Layer]]:
    """What the two linear layers of a routed expert are made of, for the format of this build."""
    return (PackedLinear, PackedLinear) if build.expert_weight_format == "mxfp4" else (GateAndLinear, RowParallelLinear)


def packed_weights(model: nn.Layer) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of a layer -> its packed weight and the scales, of all that are packed; adapters make no difference."""
    buffers = dict(model.named_buffers())
    paths = [name.removesuffix(".weight_scale") for name in buffers if name.endswith(".weight_scale")]
    return {path: (buffers[f"{path}.weight"], buffers[f"{path}.weight_scale"]) for path in paths}


def with_packed_experts(state: Mapping[str, np.ndarray], model: nn.Layer) -> dict[str, np.ndarray]:
    """``state`` with the numbers of every packed layer of ``model`` rounded to MXFP4; packed ones stay as they are."""
    result = dict(state)
    for path, (weight, _) in packed_weights(model).items():
        values, (rows, half) = result.get(f"{path}.weight"), weight.shape
        if values is not None and values.dtype != np.int8 and values.shape == (rows, 2 * half):
            result[f"{path}.weight"], result[f"{path}.weight_scale"] = quantize(values)
    return result  # what does not fit is for the strict load to refuse


def resident_bits(model: nn.Layer) -> float:
    """Bits that packed experts take in memory for each of their parameters."""
    pairs = packed_weights(model).values()
    size = sum(tensor.size * tensor.element_size() for pair in pairs for tensor in pair)
    return 8 * size / sum(2 * weight.size for weight, _ in pairs)
