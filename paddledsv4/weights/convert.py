"""From one checkpoint format to another, tensor by tensor.

Every target tensor is put together from atoms, each read from where the source keeps it, and written as it comes: one
atom at a time is in memory. Bytes stay as they are unless another dtype is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from paddledsv4.errors import UserError
from paddledsv4.weights import storage
from paddledsv4.weights.names import Atom, Tensor, tensors
from paddledsv4.weights.source import Source
from paddledsv4.weights.storage import PACKED, RELEASED, Storage
from paddledsv4.weights.writer import Entry, Folder, shards

DTYPES = ("keep", "bf16", "released")
QUANTIZATION = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """``source`` written in another ``format``.

    ``dtype``: "keep" copies bytes. "bf16" unpacks FP8 and FP4 and rounds what the released files have in bfloat16 or
    below; what they have in float32 stays. "released" packs as the released files do.

    Raises:
        UserError: the format cannot hold the model, or atoms that it joins lie in different dtypes.
    """

    source: Source
    format: str
    dtype: str = "keep"

    def __post_init__(self) -> None:
        if self.format == "hf" and self.source.config.num_nextn_predict_layers:
            raise UserError("transformers has no MTP layers; leave them out with --without-mtp")
        if self.format == "hf" and self.packed:
            raise UserError("transformers' names have no place for FP8 or FP4 scales; unpack with --dtype bf16")

    @cached_property
    def tensors(self) -> dict[str, tuple[Tensor, Storage]]:
        """Name -> target tensor and how it is to lie."""
        found = {}
        for name, tensor in tensors(self.source.config, self.format).items():
            kinds = {self.storage(atom) for atom in tensor.atoms}
            if len(kinds) > 1:
                dtypes = " and ".join(sorted(kind.weight for kind in kinds))
                raise UserError(f"{self.source.where}: tensor {name} would join {dtypes}; use --dtype bf16")
            storage.check_packable(name, next(iter(kinds)), tensor.shape)
            found[name] = tensor, next(iter(kinds))
        return found

    @property
    def packed(self) -> bool:
        """Whether some target tensor is FP8 or FP4."""
        return any(kept.weight in PACKED for _, kept in self.tensors.values())

    def storage(self, atom: Atom) -> Storage:
        """How an atom is to lie in the target."""
        kept = self.source.storage(atom)
        if atom.kind == "I64":
            return Storage("I64") if self.format in ("released", "hf") else kept
        if self.dtype == "released":
            return RELEASED[atom.kind]
        return Storage("BF16") if self.dtype == "bf16" and atom.kind != "F32" else kept

    def entries(self) -> Iterator[tuple[Tensor, Entry]]:
        """What to write, scales after their weights."""
        packed = _Recent(self._pack)
        for name, (tensor, kept) in self.tensors.items():
            one = tensor.atoms[0].shape
            weight = partial(self._weights, tensor, packed)
            yield tensor, Entry(name, kept.weight, tensor.shape_of(kept.shape(one)), weight)
            if kept.scale:
                shape = tensor.shape_of(kept.scale_shape(one))
                scale = partial(self._scales, tensor, packed)
                yield tensor, Entry(storage.scale_name(self.format, name), kept.scale, shape, scale)

    def copies(self, atom: Atom) -> bool:
        """Whether the target has the very bytes of the source."""
        return self.source.storage(atom) == self.storage(atom)

    def values(self, atom: Atom, narrow: bool = False) -> np.ndarray:
        """The numbers that the target is to have, where it has other bytes; as bfloat16 bits if ``narrow``."""
        return self.source.values(atom, narrow)

    def _weights(self, tensor: Tensor, packed: _Recent) -> Iterator[np.ndarray]:
        for atom in tensor.atoms:
            kept = self.source.storage(atom)
            yield self.source.read(self.source.weight(atom, kept)) if self.copies(atom) else packed(atom)[0]

    def _scales(self, tensor: Tensor, packed: _Recent) -> Iterator[np.ndarray]:
        for atom in tensor.atoms:
            kept = self.source.storage(atom)
            yield self.source.read(self.source.scale(atom, kept)) if self.copies(atom) else packed(atom)[1]

    def _pack(self, atom: Atom) -> tuple[np.ndarray, np.ndarray | None]:
        wanted = self.storage(atom)
        if wanted.weight == "BF16":
            weight, scale = self.values(atom, narrow=True), None
        else:
            with np.errstate(over="ignore"):
                weight, scale = storage.encode(self.values(atom), wanted)
        try:
            storage.check_finite(wanted.weight, weight)
        except ValueError:
            where = self.source.weight(atom, self.source.storage(atom))
            raise UserError(f"{where} has numbers too large for {wanted.weight}") from None
        return weight, scale

    def config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The target's config.json, from that of the source."""
        values = {"model_type": "deepseek_v4"} | dict(values)
        source = self.source.config
        if values.get("num_nextn_predict_layers") != source.num_nextn_predict_layers:
            values["num_nextn_predict_layers"] = source.num_nextn_predict_layers
            if "compress_ratios" in values:
                values["compress_ratios"] = list(source.compress_ratios)
        if not self.packed:
            values.pop("quantization_config", None)
            values.pop("expert_dtype", None)
        elif not values.get("quantization_config"):
            values["quantization_config"] = QUANTIZATION
        return values

    def plan(self, limit: int) -> dict[str, Any]:
        """What makes one conversion the same as another: source files, target, options."""
        files = sorted({stored.file for stored in self.source.stored.values()})
        stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        plan = {"files": stats, "format": self.format, "dtype": self.dtype, "limit": limit,
                "config": self.source.config.model_dump(mode="json")}
        return json.loads(json.dumps(plan))


class _Recent:
    """Remembers the last two results: the scales of a tensor of two atoms are wanted after both its weights."""

    def __init__(self, function: Callable[[Atom], tuple]):
        self.function, self.results = function, []

    def __call__(self, atom: Atom) -> tuple:
        found = next((result for known, result in self.results if known is atom), None)
        if found is None:
            del self.results[:-1]
            found = self.function(atom)
            self.results.append((atom, found))
        return found


def convert(
    conversion: Conversion, target: Path, config: Mapping[str, Any], limit: int, verify: bool = False,
    wrote: Callable[[int], None] = lambda size: None, also: tuple[Path, ...] = (),
) -> int:
    """Write the folder ``target`` in files of at most ``limit`` bytes; ``config`` is the source's config.json.

    An interrupted call is continued by the next one. ``also``: small files to copy. Returns the number of files.

    Raises:
        UserError: a tensor or the disk is not as it should be. Nothing is left then, and the source is as it was.
    """
    files = shards([entry for _, entry in conversion.entries()], limit)
    folder = Folder(target, conversion.plan(limit))
    try:
        todo = {name: entries for name, entries in files.items() if not folder.has(name, entries)}
        wrote(sum(entry.size for name in files.keys() - todo.keys() for entry in files[name]))
        folder.check_space(sum(entry.size for entries in todo.values() for entry in entries))
        for name, entries in todo.items():
            folder.write(name, entries, wrote)
        folder.write_index(files)
        folder.finish_text("config.json", json.dumps(conversion.config(config), indent=2) + "\n")
        for path in also:
            folder.finish_text(path.name, path.read_text(encoding="utf-8"))
        if verify:
            _verify(conversion, folder.hidden, wrote)
        folder.publish()
    except Exception:
        folder.discard()
        raise
    return len(files)


def _verify(conversion: Conversion, folder: Path, wrote: Callable[[int], None]) -> None:
    """Read back what was written, as strictly as any source, and compare every byte with what should be there.

    Raises:
        UserError: it names the first tensor that differs.
    """
    with Source.open(folder, conversion.source.config, conversion.format) as written:
        for _, entry in conversion.entries():
            stored, offset = written.stored[entry.name], 0
            for piece in entry.pieces():
                part = stored.at(offset, piece)
                if written.files.read(part).tobytes() != np.ascontiguousarray(piece).tobytes():
                    raise UserError(f"{stored} is not what was written; the disk or this machine's memory is faulty")
                offset += piece.nbytes
                wrote(piece.nbytes)
