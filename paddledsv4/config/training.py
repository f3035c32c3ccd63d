"""How a model is trained: optimizer, batches, losses, and over how many ranks."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from paddledsv4.config.base import StrictConfig

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]

NO_DECAY = "parameters with one dimension"


class OptimizerConfig(StrictConfig):
    """AdamW with decoupled weight decay and a learning-rate schedule; warm-up in optimizer steps."""

    SECTION: ClassVar[str] = "optimizer."

    name: Literal["adamw"] = "adamw"
    lr: NotNegative
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NotNegative = 0.1
    no_decay: Literal["parameters with one dimension"] = NO_DECAY
    min_lr: NotNegative = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.min_lr > self.lr:
            self.reject("min_lr", f"must be at most lr ({self.lr})")
        return self


class TrainConfig(StrictConfig):
    """One run; ``sequence_length`` in tokens, ``micro_batch_size`` in rows, ``steps`` in optimizer steps.

    ``indexer_loss_scale``: the weight of the indexer's loss in every microbatch. ``per_microbatch`` divides it by
    ``gradient_accumulation_steps``, as all other losses are, so that the gradient is a mean over the global batch.
    ``megatron`` does not, as the reference: its gradient grows with the number of microbatches (spec 8.3).
    ``linear_cross_entropy``: head and loss in one, without the logits in memory; not with tensor parallelism.
    ``expert_weight_format``: ``mxfp4`` keeps the routed experts packed and frozen; ``precision`` as everything else.
    ``kv_qat``: FP8 rounding of keys and values, of the window and compressed, as a served model caches them; scales
    are powers of two (``ue8m0``, as DeepSeek's) or not. ``indexer_qat``: FP4 rounding of the indexer's queries and
    keys.
    """

    SECTION: ClassVar[str] = "training."

    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    expert_weight_format: Literal["precision", "mxfp4"] = "precision"
    sequence_length: Count
    micro_batch_size: Count
    gradient_accumulation_steps: Count = 1
    steps: Count
    optimizer: OptimizerConfig
    clip_grad_norm: NotNegative = 1.0
    mtp_loss_scaling_factor: NotNegative = 0.1
    indexer_loss_coeff: NotNegative = 0.01
    indexer_sparse_loss: bool = True
    indexer_loss_scale: Literal["megatron", "per_microbatch"] = "megatron"
    kv_qat: Literal["off", "ue8m0", "fp32_scale"] = "off"
    indexer_qat: Literal["off", "fp4"] = "off"
    seq_aux_loss_coeff: NotNegative = 0.0001
    expert_bias_update_rate: NotNegative = 0.001
    linear_cross_entropy: bool = False
    seed: Annotated[int, Field(ge=0)] = 0


class ParallelConfig(StrictConfig):
    """Ranks per kind of parallelism; expert parallelism shares the ranks of the others.

    ``expert_tensor``: over how many ranks each expert is split; as many as ``tensor`` when left out, 1 for whole
    experts. ``sequence_parallel``: between attention and experts each tensor rank keeps its slice of the sequence.
    ``timeout``: seconds that a rank waits for the others before it gives up.
    """

    SECTION: ClassVar[str] = "parallel."

    world_size: Count = 1
    data: Count = 1
    expert: Count = 1
    tensor: Count = 1
    context: Count = 1
    pipeline: Count = 1
    expert_tensor: Count | None = None
    sequence_parallel: bool = False
    timeout: Count = 45

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        ranks = self.data * self.tensor * self.context * self.pipeline
        if self.world_size != ranks:
            self.reject("world_size", f"must be data x tensor x context x pipeline = {ranks}")
        if self.tensor % self.expert_tensor_size:
            self.reject("expert_tensor", f"must divide tensor ({self.tensor})")
        if (self.data * self.tensor * self.context) % (self.expert * self.expert_tensor_size):
            self.reject("expert", "must divide data x tensor x context / expert_tensor "
                        f"({ranks // self.pipeline // self.expert_tensor_size})")
        return self

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that split each expert."""
        return self.expert_tensor or self.tensor
