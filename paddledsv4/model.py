"""DeepSeek-V4 on one page: embedding, decoder, multi-token prediction, head, losses."""

from __future__ import annotations

from dataclasses import dataclass

from paddle import Tensor, nn

from paddledsv4.config import ModelConfig
from paddledsv4.distributed.group import ALONE, Groups
from paddledsv4.fusions.head_loss import head_loss
from paddledsv4.numerics.policy import Policy
from paddledsv4.tensor_parallel.cross_entropy import cross_entropy
from paddledsv4.tensor_parallel.layers import ColumnParallelLinear, embedding
from paddledsv4.transformer.block import TransformerBlock
from paddledsv4.transformer.build import AuxiliaryLosses, Build, ForwardContext
from paddledsv4.transformer.documents import WHOLE_ROWS, WholeRows
from paddledsv4.transformer.multi_token_prediction import MultiTokenPredictionBlock

DTYPES = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Losses:
    """Per-token losses [b, s] of the main head and of every MTP depth, with the masks that they are averaged by."""

    main: Tensor
    main_mask: Tensor
    mtp: list[Tensor]
    mtp_masks: list[Tensor]


class DeepseekV4Model(nn.Layer):
    """The whole model. Activations are sequence-first [s, b, ...], tokens and losses [b, s].

    ``linear_cross_entropy``: the losses without logits (:mod:`paddledsv4.fusions`).
    """

    def __init__(
        self, config: ModelConfig, policy: Policy, precision: str = "fp32", groups: Groups = ALONE,
        sequence_parallel: bool = False, linear_cross_entropy: bool = False, expert_weight_format: str = "precision",
        kv_qat: str = "off", indexer_qat: str = "off",
    ):
        super().__init__()
        self.config, self.policy = config, policy
        build = Build(
            config, policy, DTYPES[precision], groups, sequence_parallel=sequence_parallel,
            expert_weight_format=expert_weight_format, kv_qat=kv_qat, indexer_qat=indexer_qat,
        )
        self.ops, self.tensor, self.context_group = build.ops, build.tensor, groups.context
        self.ops.cross_entropy = cross_entropy(build)  # over this rank's part of the vocabulary
        self.embedding = embedding(build.at("embedding"))
        self.decoder = TransformerBlock(build.at("decoder"))
        self.mtp = MultiTokenPredictionBlock(build.at("mtp"))
        self.output_layer = ColumnParallelLinear(
            build.at("output_layer"), config.hidden_size, config.vocab_size, self.tensor.group
        )
        self.token_losses = head_loss(build, self.ops, self.output_layer, linear_cross_entropy)
        policy.check_layers(path for path, layer in self.named_sublayers() if hasattr(layer, "ops"))

    def forward(
        self, input_ids: Tensor, losses: AuxiliaryLosses | None = None, documents: WholeRows = WHOLE_ROWS
    ) -> Tensor:
        """input_ids [b, s] int64 -> logits of the next token [s, b, V]."""
        context = ForwardContext(input_ids, losses or AuxiliaryLosses(), self.context_group, documents)
        hidden, _ = self.decoder(self.embedding(input_ids), context)
        return self.tensor.join(self.output_layer(self.tensor.enter(hidden)))

    def losses(
        self, input_ids: Tensor, labels: Tensor, loss_mask: Tensor, auxiliary: AuxiliaryLosses,
        documents: WholeRows = WHOLE_ROWS,
    ) -> Losses:
        """input_ids, labels, loss_mask [b, s] -> per-token losses.

        MTP depth k predicts the token k places after the label: ids, labels and mask roll left once per depth, inside
        each document.
        """
        context = ForwardContext(input_ids, auxiliary, self.context_group, documents)
        uses = 1 + len(self.mtp.layers)
        table, *mtp_tables = self.ops.fan_out(self.embedding.word_embeddings.weight, uses)
        *mtp_heads, head = self.ops.fan_out(self.output_layer.weight, uses)
        hidden, streams = self.decoder(self.embedding(input_ids, table), context)
        mtp, masks = [], []
        ids, targets, mask = input_ids, labels, loss_mask
        for depth, layer in enumerate(self.mtp.layers):
            ids, targets, mask = (documents.roll_left(x, context.sequence) for x in (ids, targets, mask))
            ahead, streams = layer(streams, self.embedding(ids, mtp_tables[depth]), context)
            mtp.append(self.token_losses(ahead, mtp_heads[depth], targets, mask))
            masks.append(mask)
        return Losses(self.token_losses(hidden, head, labels, loss_mask), loss_mask, mtp, masks)

    def learned_routers(self) -> list:
        """Routers whose bias is updated after every step."""
        return [layer for layer in self.sublayers() if hasattr(layer, "update_expert_bias")]
