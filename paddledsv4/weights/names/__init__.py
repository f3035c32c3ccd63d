"""Names of tensors on every side: ours, Megatron's, the released files', transformers'; and of traced activations."""

from paddledsv4.weights.names.layout import FORMATS, Atom, Tensor, atoms, tensors
from paddledsv4.weights.names.spelling import BUFFERS, expert_index, from_megatron, to_megatron, with_expert
from paddledsv4.weights.names.trace import Place, Traced, traced

__all__ = [
    "BUFFERS",
    "FORMATS",
    "Atom",
    "Place",
    "Tensor",
    "Traced",
    "atoms",
    "expert_index",
    "from_megatron",
    "tensors",
    "to_megatron",
    "traced",
    "with_expert",
]
