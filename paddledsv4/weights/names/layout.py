"""The table applied to a model: every atom, and the tensors that a format keeps them in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paddledsv4.weights.names.spelling import to_megatron
from paddledsv4.weights.names.table import ENDS, PER_LAYER, PER_MTP, Kind, Row, Section, Slot

if TYPE_CHECKING:
    from paddledsv4.config import ModelConfig

FORMATS = ("released", "megatron", "hf", "paddledsv4")
ROUTED, MTP = "routed experts", "multi-token prediction"


@dataclass(frozen=True)
class Atom:
    """One atom of one layer. ``layer``, ``expert``: numbers or None; ``part``: what `paddledsv4 info` counts it as."""

    row: Row
    section: Section
    part: str
    shape: tuple[int, ...]
    layer: int | None = None
    expert: int | None = None
    experts: int = 1

    @property
    def kind(self) -> Kind:
        """How the released files keep it."""
        return self.row.kind

    @property
    def name(self) -> str:
        """The name of our tensor that it is in: one atom's own, or that of several."""
        return self.slot("paddledsv4").name

    def slot(self, format: str) -> Slot | None:
        """Where ``format`` keeps it; None: nowhere (transformers has no MTP layers)."""
        side = {"hf": "transformers", "released": "released"}.get(format, "ours")
        prefix = getattr(self.section, side)
        if prefix is None:
            return None
        slot = self.row.slot(side)
        name = (prefix + slot.name).replace("{n}", str(self.layer)).replace("{e}", str(self.expert))
        if slot.stacked:
            return Slot(name, self.expert * slot.parts + slot.part, self.experts * slot.parts, True)
        if format == "megatron" and self.expert is not None:
            name = to_megatron(name, grouped_experts=True)
        return Slot(name, slot.part, slot.parts)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a format: its atoms stand one below the other. All have one shape and kind."""

    name: str
    atoms: list[Atom]
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers, unpacked."""
        return self.shape_of(self.atoms[0].shape)

    @property
    def kind(self) -> Kind:
        """How the released files keep its atoms."""
        return self.atoms[0].kind

    def shape_of(self, atom: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor if its atoms have the shape ``atom``."""
        experts = self.atoms[0].experts if self.stacked else 1
        rows = (len(self.atoms) // experts * atom[0], *atom[1:])
        return (experts, *rows) if self.stacked else rows


def tensors(config: ModelConfig, format: str) -> dict[str, Tensor]:
    """Name -> tensor, of everything that ``format`` keeps of a model."""
    found: dict[str, Tensor] = {}
    for atom in atoms(config):
        slot = atom.slot(format)
        if slot is None:
            continue
        if slot.name not in found:
            found[slot.name] = Tensor(slot.name, [atom] * slot.parts, slot.stacked)
        found[slot.name].atoms[slot.part] = atom
    return found


def atoms(config: ModelConfig) -> Iterator[Atom]:
    """All atoms of a model, in the order of its layers."""
    yield from _of(ENDS[0], config, None)
    for layer in range(config.num_hidden_layers):
        for section in PER_LAYER:
            yield from _of(section, config, layer)
    yield from _of(ENDS[1], config, None)
    for depth in range(config.num_nextn_predict_layers):
        for section in PER_MTP:
            yield from _of(section, config, depth, config.num_hidden_layers)


def _of(section: Section, config: ModelConfig, layer: int | None, above: int = 0) -> Iterator[Atom]:
    """The atoms of a section; ``above``: so many layers of the decoder stand below an MTP layer."""
    index = None if layer is None else layer + above
    sizes, conditions = dimensions(config, index), _conditions(config, index)
    for part, rows in section.parts.items():
        experts = range(config.n_routed_experts) if part == ROUTED else (None,)
        for expert in experts:
            for row in rows:
                if conditions[row.when]:
                    shape = tuple(sizes[word] for word in row.shape.split())
                    yield Atom(row, section, MTP if above else part, shape, layer, expert, len(experts))


def _conditions(config: ModelConfig, index: int | None) -> dict[str, bool]:
    ratio = 0 if index is None else config.layer_ratio(index)
    hashed = index is not None and config.is_hash_layer(index)
    return {
        "always": True, "compressed": ratio > 0, "indexed": ratio == 4, "hash": hashed, "learned": not hashed,
        "shared": config.n_shared_experts > 0,
    }


def dimensions(config: ModelConfig, index: int | None) -> dict[str, int]:
    """The words of the shapes in the table -> sizes, for the layer ``index`` (MTP layers follow the decoder's)."""
    c, ratio = config, 0 if index is None else config.layer_ratio(index)
    overlap = 2 if ratio == 4 else 1
    width, n = c.num_attention_heads * c.head_dim, c.hc_mult
    return {
        "one": 1, "vocab": c.vocab_size, "hidden": c.hidden_size,
        "q_lora": c.q_lora_rank, "heads": c.num_attention_heads, "head": c.head_dim, "width": width,
        "o_lora": c.o_groups * c.o_lora_rank, "o_group": width // c.o_groups,
        "ratio": ratio, "entry": overlap * c.head_dim,
        "index_heads": c.index_n_heads, "index_head": c.index_head_dim,
        "index_width": c.index_n_heads * c.index_head_dim, "index_entry": overlap * c.index_head_dim,
        "n": n, "streams": n * c.hidden_size, "gates": n * (n + 2),
        "experts": c.n_routed_experts, "topk": c.num_experts_per_tok,
        "expert": c.moe_intermediate_size, "shared": c.n_shared_experts * c.moe_intermediate_size,
    }  # fmt: skip
