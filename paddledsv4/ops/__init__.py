"""One file per numeric operation, its variants side by side. Importing this package fills the registry."""

from paddledsv4.ops import (  # noqa: F401
    attach_loss,
    compress,
    cross_entropy,
    embedding,
    hadamard,
    hc_mapping,
    hc_mix,
    indexer,
    linear,
    optimizer_step,
    permute,
    rms_norm,
    rope,
    router,
    sinkhorn,
    sparse_attention,
    swiglu,
)
