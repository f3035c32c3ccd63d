"""Manifold hyper-connections (mHC): n residual streams, mixed by input-dependent gates around every layer."""

from __future__ import annotations

from paddle import Tensor, nn

from paddledsv4.transformer.build import Build, constant, parameter


class MappingProjection(nn.Layer):
    """The gates' projection [n^2 + 2n, n*C], in float32 or wider."""

    def __init__(self, build: Build, in_features: int, out_features: int):
        super().__init__()
        self.weight = parameter([out_features, in_features], build.wide_dtype, nn.initializer.XavierUniform())


class HyperConnection(nn.Layer):
    """Gates around one layer f: X <- H_res^T X + h_post f(h_pre X)."""

    def __init__(self, build: Build):
        super().__init__()
        self.ops = build.ops
        config = build.config
        self.streams, self.eps, self.iterations = config.hc_mult, config.hc_eps, config.hc_sinkhorn_iters
        self.dtype = build.dtype  # of the streams, to which the gates are rounded
        gates = self.streams**2 + 2 * self.streams
        self.alpha_pre = constant([1], build.wide_dtype, 0.01)
        self.alpha_post = constant([1], build.wide_dtype, 0.01)
        self.alpha_res = constant([1], build.wide_dtype, 0.01)
        self.bias = constant([gates], build.wide_dtype, 0.0)
        self.mapping_proj = MappingProjection(build, self.streams * config.hidden_size, gates)

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """streams [s, b, n*C] -> layer input [s, b, C], streams to mix, h_res [s, b, n, n], h_post [s, b, n]."""
        residual, to_aggregate, to_map = self.ops.fan_out(streams, 3)
        proj, r = self.ops.hc_project(to_map, self.mapping_proj.weight, self.eps)
        h_pre, h_post, logits = self.ops.hc_gates(
            proj, r, self.alpha_pre, self.alpha_post, self.alpha_res, self.bias, self.streams, self.eps, self.dtype
        )
        h_res = self.ops.sinkhorn(logits, self.iterations, self.eps, self.dtype)
        return self.ops.hc_aggregate(to_aggregate, h_pre), residual, h_res, h_post

    def mix(self, streams: Tensor, h_res: Tensor, h_post: Tensor, output: Tensor) -> Tensor:
        """streams [s, b, n*C] and the layer's output [s, b, C] -> streams [s, b, n*C]."""
        return self.ops.hc_mix(h_res, streams, h_post, output)


class Contraction:
    """Mix-in of a block that ends in one hidden state: hc_head_fn, hc_head_base, hc_head_scale."""

    def create_contraction(self, build: Build) -> None:
        """Create the parameters; call in __init__ before other children, as the reference orders them."""
        n, eps = build.config.hc_mult, build.config.rms_norm_eps
        self.contraction_eps = eps
        self.hc_head_fn = parameter(
            [n, n * build.config.hidden_size], build.wide_dtype, nn.initializer.XavierUniform()
        )
        self.hc_head_base = constant([n], build.wide_dtype, 0.0)
        self.hc_head_scale = constant([1], build.wide_dtype, 1.0)

    def contract(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """streams [s, b, n*C] -> hidden [s, b, C], and the streams for whoever goes on from them."""
        return self.ops.hc_contract(
            streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.contraction_eps
        )
