"""What every layer is built from, and what every forward pass carries along."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import SimpleNamespace

import paddle
from paddle import Tensor, nn

from paddledsv4.config import ModelConfig
from paddledsv4.distributed.context_parallel import SequenceSlice
from paddledsv4.distributed.group import ALONE, Group, Groups
from paddledsv4.numerics.bfloat16 import needs_emulation
from paddledsv4.numerics.policy import Policy
from paddledsv4.numerics.registry import Op
from paddledsv4.ops.fake_quantize import quantizer
from paddledsv4.ops.precision import accumulate_dtype
from paddledsv4.tensor_parallel.region import OneRank, region
from paddledsv4.transformer.documents import WHOLE_ROWS, WholeRows


@dataclass(frozen=True)
class Build:
    """Config, numeric policy, parameter dtype and layout of ranks, with the path of the layer being built.

    ``expert_weight_format``: "precision" or "mxfp4", see :mod:`paddledsv4.moe.mxfp4`. ``kv_qat`` and ``indexer_qat``:
    formats of :mod:`paddledsv4.ops.fake_quantize`, or "off".
    """

    config: ModelConfig
    policy: Policy
    dtype: str = "float32"
    groups: Groups = ALONE
    path: str = ""
    sequence_parallel: bool = False
    expert_weight_format: str = "precision"
    kv_qat: str = "off"
    indexer_qat: str = "off"

    def at(self, name: str) -> Build:
        """The same for the child ``name``."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    @property
    def ops(self) -> SimpleNamespace:
        """The ops of this layer, resolved: ``ops.rms_norm(x, weight, eps)``."""
        return self.policy.ops(self.path, emulate_bfloat16=needs_emulation(self.dtype))

    def follow(self, op: Op) -> Callable:
        """The function of an op outside the table for this layer."""
        chosen = self.policy.follower(op, self.path)
        return (needs_emulation(self.dtype) and chosen.emulated) or chosen.function

    @property
    def quantize_kv(self) -> Callable[[Tensor], Tensor]:
        """What keys and values [..., head_dim] become when they are cached; their rotary dimensions stay."""
        return quantizer(self.kv_qat, kept=self.config.qk_rope_head_dim)

    @property
    def quantize_index(self) -> Callable[[Tensor], Tensor]:
        """What the indexer's queries and keys [..., index_head_dim] become."""
        return quantizer(self.indexer_qat)

    @property
    def tensor(self) -> OneRank:
        """Where tensor ranks part and meet."""
        return region(self.groups.tensor, self.sequence_parallel)

    @property
    def wide_dtype(self) -> str:
        """dtype of the parameters that are never kept below float32."""
        return accumulate_dtype(self.dtype)


@dataclass(frozen=True)
class AuxiliaryLosses:
    """Weights of the losses beside the main one, and the gradient seed that rides with them.

    ``seed`` is 1 / number of microbatches; ``indexer_seed``, that of the indexer's loss, is either it or 1 (spec 8.3).
    """

    mtp_factor: float = 0.1
    indexer_coeff: float = 0.0
    indexer_sparse: bool = True
    sequence_coeff: float = 0.0
    seed: float = 1.0
    indexer_seed: float = 1.0


@dataclass(frozen=True)
class ForwardContext:
    """input_ids [b, s] that the hash routers read, the auxiliary losses of this pass, and the ranks (``group``) that
    hold the other slices of the sequences. ``documents``: where in the sequences they begin."""

    input_ids: Tensor
    losses: AuxiliaryLosses
    group: Group = ALONE.context
    documents: WholeRows = WHOLE_ROWS

    @functools.cached_property
    def sequence(self) -> SequenceSlice:
        """The slice that input_ids are: all of the sequence without context parallelism."""
        return SequenceSlice(self.group, self.input_ids.shape[1])


_unset: ContextVar[bool] = ContextVar("unset", default=False)


@contextlib.contextmanager
def unset_parameters() -> Iterator[None]:
    """Models built in this block draw no weights: a checkpoint fills their memory, which takes room only then."""
    token = _unset.set(True)
    try:
        yield
    finally:
        _unset.reset(token)


def parameters_are_unset() -> bool:
    """Whether the model that is being built gets its weights from a checkpoint."""
    return _unset.get()


class Unset(nn.initializer.Initializer):
    """Memory of the right size, whatever it holds."""

    def forward(self, var: Tensor, block=None) -> None:
        paddle.empty(var.shape, var.dtype)._share_underline_tensor_to(var)


def parameter(shape: list[int], dtype: str, initializer: nn.initializer.Initializer) -> Tensor:
    """A trainable parameter, initialised."""
    initializer = Unset() if parameters_are_unset() else initializer
    return paddle.create_parameter(shape, dtype=dtype, default_initializer=initializer)


def constant(shape: list[int], dtype: str, value: float) -> Tensor:
    """A trainable parameter that starts at ``value`` everywhere."""
    return parameter(shape, dtype, nn.initializer.Constant(value))
