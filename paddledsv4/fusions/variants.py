"""The table's ``fused`` variants: importing this module registers them beside those of ``paddledsv4/ops``."""

import paddledsv4.ops  # noqa: F401  (the ops come first)
from paddledsv4.fusions import indexer, rms_norm, sparse_attention  # noqa: F401
