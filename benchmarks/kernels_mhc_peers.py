"""Calls of other libraries' kernels for benchmarks/kernels_mhc.py: each gives a function that imports the library,
prepares its inputs, and returns what is to be timed. Where a library does something a little different, it is said.

liger-kernel's mHC kernels are left out: its projection compiled for more than 50 s (2026-11-21, given up)."""

from __future__ import annotations

import torch


def liger_norm(x, w):
    def make():
        from liger_kernel.ops.rms_norm import rms_norm_forward

        return lambda: rms_norm_forward(x, w, 1e-6, 0.0, "gemma", None)

    return make


def liger_norm_backward(x, w, dy):
    def make():
        from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward

        _, flat, r, block, warps, mode = rms_norm_forward(x, w, 1e-6, 0.0, "gemma", None)
        return lambda: rms_norm_backward(dy, flat, w, r, 0.0, mode, block, warps, False, None)

    return make


def quack_norm(x, w):
    def make():
        from quack.rmsnorm import rmsnorm_fwd

        return lambda: rmsnorm_fwd(x, w, eps=1e-6)

    return make


def quack_norm_backward(x, w, dy):
    def make():
        from quack.rmsnorm import rmsnorm_bwd, rmsnorm_fwd

        r = rmsnorm_fwd(x, w, eps=1e-6, store_rstd=True)[2]
        return lambda: rmsnorm_bwd(x, w, dy, r)

    return make


def liger_swiglu(x):
    def make():
        from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

        return lambda: swiglu_fused_gate_up_forward(x)

    return make


def liger_swiglu_backward(x, dy):
    def make():
        from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward

        return lambda: swiglu_fused_gate_up_backward(x, dy)

    return make


def tile_sinkhorn(logits):
    """Its result is float32."""
    def make():
        from tile_kernels.mhc import mhc_sinkhorn_fwd

        out = torch.empty_like(logits)
        return lambda: mhc_sinkhorn_fwd(logits, out, 20, 1e-6)

    return make


def tile_sinkhorn_backward(logits):
    def make():
        from tile_kernels.mhc import mhc_sinkhorn_bwd

        grad, out = torch.randn_like(logits), torch.empty_like(logits)
        return lambda: mhc_sinkhorn_bwd(grad, logits, out, 20, 1e-6)

    return make


def _streams(x, n):
    return x.view(x.shape[0], n, -1)


def tile_aggregate(x, h):
    """float32 gates."""
    def make():
        from tile_kernels.mhc import mhc_pre_apply_mix_fwd

        v, gate = _streams(x, h.shape[1]), h.float()
        out = torch.empty_like(v[:, 0])
        return lambda: mhc_pre_apply_mix_fwd(v, gate, out)

    return make


def tile_aggregate_backward(x, h):
    """float32 gates; adds to the streams' gradient."""
    def make():
        from tile_kernels.mhc import mhc_pre_apply_mix_bwd

        v, gate = _streams(x, h.shape[1]), h.float()
        grad, dx = torch.randn_like(v[:, 0]), torch.zeros_like(v)
        return lambda: mhc_pre_apply_mix_bwd(grad, v, gate, dx)

    return make


def tile_mix(h_res, x, h_post, o):
    """float32 gates."""
    def make():
        from tile_kernels.mhc import mhc_post_fwd

        n = h_post.shape[1]
        args = o[None], _streams(x, n)[None], h_post.float()[None, ..., None], h_res.float()[None]
        return lambda: mhc_post_fwd(*args)

    return make


def tile_mix_backward(h_res, x, h_post, o):
    """float32 gates and gradients of gates."""
    def make():
        from tile_kernels.mhc import mhc_post_bwd

        n = h_post.shape[1]
        args = o[None], _streams(x, n)[None], h_post.float()[None, ..., None], h_res.float()[None]
        grad = torch.randn_like(args[1])
        return lambda: mhc_post_bwd(*args, grad)

    return make
