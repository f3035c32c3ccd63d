"""DeepSeek-V4 on one page: embedding, decoder, multi-token prediction, head, losses."""

from __future__ import annotations

from dataclasses import dataclass

from paddle import Tensor, nn

from paddledsv4.config import ModelConfig
from paddledsv4.distributed.group import ALONE, Groups
from paddledsv4.numerics.policy import Policy
from paddledsv4.transformer.block import TransformerBlock
from paddledsv4.transformer.build import AuxiliaryLosses, Build, ForwardContext, parameter
from paddledsv4.transformer.linear import Linear
from paddledsv4.transformer.multi_token_prediction import MultiTokenPredictionBlock

DTYPES = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Losses:
    """Per-token losses [b, s] of the main head and of every MTP depth, with the masks that they are averaged by."""

    main: Tensor
    main_mask: Tensor
    mtp: list[Tensor]
    mtp_masks: list[Tensor]


class Embedding(nn.Layer):
    """Token embedding: word_embeddings.weight [V, C]."""

    def __init__(self, build: Build):
        super().__init__()
        self.ops = build.ops
        config = build.config
        self.word_embeddings = nn.Layer()
        self.word_embeddings.weight = parameter(
            [config.vocab_size, config.hidden_size], build.dtype, nn.initializer.Normal(0.0, config.initializer_range)
        )

    def forward(self, input_ids: Tensor, weight: Tensor | None = None) -> Tensor:
        """[b, s] -> [s, b, C]. ``weight``: one of several copies of the table, see fan_out."""
        return self.ops.embedding(input_ids, self.word_embeddings.weight if weight is None else weight)


class DeepseekV4Model(nn.Layer):
    """The whole model. Activations are sequence-first [s, b, ...], tokens and losses [b, s]."""

    def __init__(self, config: ModelConfig, policy: Policy, precision: str = "fp32", groups: Groups = ALONE):
        super().__init__()
        self.config, self.policy = config, policy
        build = Build(config, policy, DTYPES[precision], groups)
        self.context_group = groups.context
        self.ops = build.ops
        self.embedding = Embedding(build.at("embedding"))
        self.decoder = TransformerBlock(build.at("decoder"))
        self.mtp = MultiTokenPredictionBlock(build.at("mtp"))
        self.output_layer = Linear(build.at("output_layer"), config.hidden_size, config.vocab_size)
        policy.check_layers(path for path, layer in self.named_sublayers() if hasattr(layer, "ops"))

    def forward(self, input_ids: Tensor, losses: AuxiliaryLosses | None = None) -> Tensor:
        """input_ids [b, s] int64 -> logits of the next token [s, b, V]."""
        context = ForwardContext(input_ids, losses or AuxiliaryLosses(), self.context_group)
        hidden, _ = self.decoder(self.embedding(input_ids), context)
        return self.output_layer(hidden)

    def losses(self, input_ids: Tensor, labels: Tensor, loss_mask: Tensor, auxiliary: AuxiliaryLosses) -> Losses:
        """input_ids, labels, loss_mask [b, s] -> per-token losses.

        MTP depth k predicts the token k places after the label: ids, labels and mask roll left once per depth.
        """
        context, uses = ForwardContext(input_ids, auxiliary, self.context_group), 1 + len(self.mtp.layers)
        table, *mtp_tables = self.ops.fan_out(self.embedding.word_embeddings.weight, uses)
        *mtp_heads, head = self.ops.fan_out(self.output_layer.weight, uses)
        hidden, streams = self.decoder(self.embedding(input_ids, table), context)
        mtp, masks = [], []
        ids, targets, mask = input_ids, labels, loss_mask
        for depth, layer in enumerate(self.mtp.layers):
            ids, targets, mask = (context.sequence.roll_left(x) for x in (ids, targets, mask))
            ahead, streams = layer(streams, self.embedding(ids, mtp_tables[depth]), context)
            mtp.append(self.ops.cross_entropy(self.output_layer(ahead, mtp_heads[depth]), targets))
            masks.append(mask)
        main = self.ops.cross_entropy(self.output_layer(hidden, head), labels)
        return Losses(main, loss_mask, mtp, masks)

    def learned_routers(self) -> list:
        """Routers whose bias is updated after every step."""
        return [layer for layer in self.sublayers() if hasattr(layer, "update_expert_bias")]
