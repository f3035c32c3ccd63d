"""The table's ``fused`` variants: importing this module registers them beside those of ``paddledsv4/ops``."""

import paddledsv4.ops  # noqa: F401  (the ops come first)
from paddledsv4.fusions import (  # noqa: F401
    compress,
    hyper_connection,
    indexer,
    linear_cross_entropy,
    packed_linear,
    permute,
    rms_norm,
    rope,
    sparse_attention,
    swiglu,
)
