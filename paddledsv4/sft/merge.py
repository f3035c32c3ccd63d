"""Full weights from a base model and its adapters: W + lora_alpha / r * B A, added in float32 and rounded once.

Of a checkpoint, one piece at a time and without a model, however large it is (:class:`MergedConversion`); of a model in
memory, into a folder under our names (:func:`save_merged`), which `paddledsv4 convert` takes further.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from paddle import Tensor, nn

from paddledsv4.config import LoraConfig
from paddledsv4.errors import UserError
from paddledsv4.moe.mxfp4 import packed_weights
from paddledsv4.ops.precision import widen
from paddledsv4.sft.adapter import PREFIX, SavedAdapter, product
from paddledsv4.sft.lora import adapters
from paddledsv4.weights import bfloat16, mxfp4, storage
from paddledsv4.weights.convert import Conversion
from paddledsv4.weights.from_checkpoint import DTYPES
from paddledsv4.weights.load import named_tensors
from paddledsv4.weights.names import Atom
from paddledsv4.weights.save import write_model
from paddledsv4.weights.storage import PACKED, Storage
from paddledsv4.weights.writer import Entry


def _layer(name: str) -> str:
    """The path of the layer whose weight is called ``name``."""
    return name.removesuffix(".weight")


@dataclass(frozen=True)
class MergedConversion(Conversion):
    """A conversion that adds adapters. Packed weights that have one become bfloat16, unless ``dtype`` packs them.

    Raises:
        UserError: as :class:`Conversion`; or the adapter has a layer that the model has not.
    """

    adapter: SavedAdapter | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = {_layer(atom.name) for tensor, _ in self.tensors.values() for atom in tensor.atoms}
        for name in self.adapter.tensors:
            path = name.removeprefix(PREFIX).rpartition(".lora_")[0]
            if path not in layers:
                raise UserError(f"{self.adapter.folder}: {name} belongs to no layer of {self.source.where}")

    def adapted(self, atom: Atom) -> bool:
        """Whether there is something to add."""
        return f"{PREFIX}{_layer(atom.name)}.lora_A.weight" in self.adapter.tensors

    def storage(self, atom: Atom) -> Storage:
        """How an atom is to lie in the target."""
        kept = super().storage(atom)
        return Storage("BF16") if self.dtype == "keep" and kept.weight in PACKED and self.adapted(atom) else kept

    def copies(self, atom: Atom) -> bool:
        """Whether the target has the very bytes of the source."""
        return super().copies(atom) and not self.adapted(atom)

    def values(self, atom: Atom, narrow: bool = False) -> np.ndarray:
        """The numbers of an atom, the adapter's share added."""
        if not self.adapted(atom):
            return super().values(atom, narrow)
        values = super().values(atom)
        slot, delta = atom.slot("paddledsv4"), self.adapter.delta(_layer(atom.name))
        if delta is None or delta.size != values.size * slot.parts:
            raise UserError(f"{self.adapter.folder}: the adapter of {_layer(atom.name)} does not fit its weight")
        values = values + delta.reshape(slot.parts, *values.shape)[slot.part]
        return bfloat16.encode(values) if narrow else values

    def plan(self, limit: int) -> dict:
        """What makes one conversion the same as another."""
        files = sorted(path for path in self.adapter.folder.iterdir() if path.suffix in (".json", ".safetensors"))
        stats = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        return super().plan(limit) | {"adapter": stats}


class MergedModel:
    """The full weights of a model that has adapters, and all of it on this rank; one is unpacked at a time."""

    def __init__(self, model: nn.Layer, config: LoraConfig):
        self.config, self.packed, self.adapters = config, packed_weights(model), adapters(model)
        self.dtype = DTYPES[model.embedding.word_embeddings.weight.dtype][0]
        self.tensors = {
            name: tensor for name, tensor in named_tensors(model).items()
            if ".lora_" not in name and not name.endswith(".weight_scale")
        }  # fmt: skip

    def values(self, name: str) -> np.ndarray:
        """One full weight in float32 or wider; integers as they are."""
        tensor, path = self.tensors[name], _layer(name)
        if path in self.packed:
            values = mxfp4.dequantize(*(part.numpy() for part in self.packed[path]))
        else:
            values = (widen(tensor) if tensor.is_floating_point() else tensor).numpy()
        adapter = self.adapters.get(path)
        if adapter is None:
            return values
        return values + product(adapter.lora_A.numpy(), adapter.lora_B.numpy(), self.config, path)

    def entries(self) -> list[Entry]:
        """What to write: packed experts in the dtype of the model."""
        return [self._entry(name, tensor) for name, tensor in self.tensors.items()]

    def _entry(self, name: str, tensor: Tensor) -> Entry:
        packed = _layer(name) in self.packed
        dtype = self.dtype if packed else DTYPES[tensor.dtype][0]
        shape = (tensor.shape[0], 2 * tensor.shape[1]) if packed else tuple(tensor.shape)
        return Entry(name, dtype, shape, lambda: [storage.encode(self.values(name), Storage(dtype))[0]])


def save_merged(model: nn.Layer, config: LoraConfig, folder: Path) -> None:
    """Write the full weights of a model that is on one rank, with its config.json, under our names.

    Raises:
        UserError: ``folder`` exists or cannot be written. Nothing is left then.
    """
    write_model(folder, MergedModel(model, config).entries(), model.config)
