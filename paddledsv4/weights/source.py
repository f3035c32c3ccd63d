"""A checkpoint in any format, held against the table of names, and read atom by atom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from typing_extensions import Self

from paddledsv4.config import ModelConfig
from paddledsv4.errors import UserError
from paddledsv4.weights import storage
from paddledsv4.weights.files import INDEX, Files, Stored, read_folder, read_index
from paddledsv4.weights.names import Atom, Tensor, from_megatron, tensors
from paddledsv4.weights.storage import RELEASED, Storage

CHUNK = 1 << 18  # elements

# a tensor that only one format has -> the format
SIGNS = {
    "embed.weight": "released",
    "model.embed_tokens.weight": "hf",
    "embedding.word_embeddings.weight": "paddledsv4",
}


class Source:
    """The tensors of a checkpoint that fit a model exactly: none missing, none extra, all of legal shapes and dtypes.

    Args:
        stored: every tensor of the files.
        where: the folder or file, for messages.
        format: one of ``FORMATS``; "megatron" and "paddledsv4" accept both spellings of experts.

    Raises:
        UserError: one sentence about the first tensor that does not fit.
    """

    def __init__(self, stored: Mapping[str, Stored], where: Path, config: ModelConfig, format: str):
        if format in ("megatron", "paddledsv4"):
            format = "megatron" if any(from_megatron(name) != name for name in stored) else "paddledsv4"
        self.where, self.config, self.format, self.stored = where, config, format, stored
        self.files = Files()
        self._check(tensors(config, format))

    @classmethod
    def open(cls, path: Path, config: ModelConfig, format: str | None = None, mtp: bool = True) -> Self:
        """Read the headers of a folder or file, whose format its names show. ``mtp`` False: leave out MTP layers.

        Raises:
            UserError: files that cannot be read, or that are not of this format or model.
        """
        stored = read_folder(path)
        shown = _format(path, stored, format)
        if not mtp:
            stored = {name: tensor for name, tensor in stored.items() if not name.startswith("mtp.")}
        return cls(stored, path, config if mtp and shown != "hf" else without_mtp(config), shown)

    @classmethod
    def by_rule(cls, path: Path, config: ModelConfig, format: str) -> Self:
        """What a checkpoint holds if its dtypes are the released ones: for a folder whose weights are not here.

        An index in the folder must name exactly these tensors.
        """
        stored = {
            name: Stored(path, name, dtype, shape, 0, storage.size(dtype, shape))
            for name, (dtype, shape) in listing(config, format).items()
        }
        index = path / INDEX
        if index.exists():
            files = read_index(index)
            kept = {name: stored.get(name, Stored(path / file, name, "BF16", (), 0, 0)) for name, file in files.items()}
            return cls(kept, index, config, _format(path, kept, format))
        return cls(stored, path, config, format)

    def _check(self, expected: Mapping[str, Tensor]) -> None:
        scales = {storage.scale_name(self.format, n) for n in expected if self._is_packed(n)}
        extra = next((name for name in self.stored if name not in expected and name not in scales), None)
        missing = [name for name in (*expected, *scales) if name not in self.stored]
        if extra and extra.startswith("mtp."):
            raise UserError(
                f"{self.stored[extra]} belongs to an MTP layer that this config (num_nextn_predict_layers = "
                f"{self.config.num_nextn_predict_layers}) does not have or that is of another kind, as DSpark's are; "
                "convert --without-mtp leaves all MTP layers out"
            )
        if missing:
            more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
            raise UserError(f"{self.where}: tensor {missing[0]}{more} missing, which a model of this config has")
        if extra:
            raise UserError(f"{self.stored[extra]} has no place in a model of this config")
        for tensor in expected.values():
            self._check_tensor(tensor)

    def _is_packed(self, name: str) -> bool:
        return name in self.stored and self.stored[name].dtype in storage.PACKED

    def _check_tensor(self, tensor: Tensor) -> None:
        weight, legal = self.stored[tensor.name], storage.legal(tensor.kind)
        if weight.dtype not in legal:
            raise UserError(f"{weight} has dtype {weight.dtype}, must be one of {', '.join(legal)}")
        kept, one = Storage(weight.dtype), tensor.atoms[0].shape
        storage.check_packable(tensor.name, kept, one)
        _check_shape(weight, tensor.shape_of(kept.shape(one)))
        if not self._is_packed(tensor.name):
            return
        scale = self.stored[storage.scale_name(self.format, tensor.name)]
        if scale.dtype not in storage.SCALES[: 1 if weight.dtype == "I8" else 2]:
            raise UserError(f"{scale} has dtype {scale.dtype}, must be F8_E8M0 (beside FP8 also F32)")
        _check_shape(scale, tensor.shape_of(kept.scale_shape(one)))

    def storage(self, atom: Atom) -> Storage:
        """The dtypes that an atom lies in."""
        slot = atom.slot(self.format)
        weight = self.stored[slot.name].dtype
        if weight not in storage.PACKED:
            return Storage(weight)
        return Storage(weight, self.stored[storage.scale_name(self.format, slot.name)].dtype)

    def raw(self, atom: Atom) -> tuple[np.ndarray, np.ndarray | None]:
        """What is stored of an atom: weight, and scales or None."""
        kept = self.storage(atom)
        weight = self.read(self.weight(atom, kept))
        return weight, self.read(self.scale(atom, kept)) if kept.scale else None

    def weight(self, atom: Atom, kept: Storage) -> Stored:
        """Where its weight lies."""
        slot = atom.slot(self.format)
        return self.stored[slot.name].piece(slot.part, slot.parts, kept.shape(atom.shape))

    def scale(self, atom: Atom, kept: Storage) -> Stored:
        """Where its scales lie."""
        slot = atom.slot(self.format)
        scale = self.stored[storage.scale_name(self.format, slot.name)]
        return scale.piece(slot.part, slot.parts, kept.scale_shape(atom.shape))

    def read(self, stored: Stored) -> np.ndarray:
        """The bytes of a piece in a new array.

        Raises:
            UserError: it cannot be read, or has a number that is NaN or infinite.
        """
        return self.read_into(stored, np.empty(stored.shape, storage.NUMPY[stored.dtype]))

    def read_into(self, stored: Stored, out: np.ndarray) -> np.ndarray:
        """The same into the memory of ``out``, contiguous, of the stored dtype and size."""
        flat, start = out.reshape(-1), 0
        while start < flat.size:
            chunk = flat[start : start + CHUNK]  # looked at while it is in the processor's cache
            self.files.read_into(stored.at(start * out.itemsize, chunk), chunk)
            try:
                storage.check_finite(stored.dtype, chunk)
            except ValueError as error:
                raise UserError(f"{stored} {error}; fetch the file again") from None
            start += CHUNK
        return out

    def values(self, atom: Atom, narrow: bool = False) -> np.ndarray:
        """Its numbers: float32, or if ``narrow`` bfloat16 bits; integers as they are."""
        kept = self.storage(atom)
        weight, scale = self.raw(atom)
        return weight if atom.kind == "I64" else storage.decode(kept, weight, scale, narrow)

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The model without its MTP layers."""
    ratios = config.compress_ratios[: config.num_hidden_layers]
    return config.replace(num_nextn_predict_layers=0, compress_ratios=ratios)


def _check_shape(stored: Stored, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise UserError(f"{stored} has shape {list(stored.shape)}, the config gives {list(shape)}")


def listing(config: ModelConfig, format: str = "released") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor with the dtypes of the released files, scales included."""
    found = {}
    for name, tensor in tensors(config, format).items():
        kept, one = RELEASED[tensor.kind], tensor.atoms[0].shape
        found[name] = kept.weight, tensor.shape_of(kept.shape(one))
        if kept.scale:
            found[storage.scale_name(format, name)] = kept.scale, tensor.shape_of(kept.scale_shape(one))
    return found


def _format(path: Path, stored: Iterable[str], wanted: str | None) -> str:
    """The format that names show, which has to be the one that was asked for.

    Raises:
        UserError: another one, or none that is known.
    """
    shown = next((SIGNS[name] for name in SIGNS if name in stored), None)
    if shown is None:
        raise UserError(f"{path}: has none of {', '.join(SIGNS)}: not a DeepSeek-V4 checkpoint of a known format")
    if wanted and shown != wanted and not {shown, wanted} <= {"megatron", "paddledsv4"}:
        raise UserError(f"{path}: holds a checkpoint of the format {shown}, not {wanted}; use --from {shown}")
    return wanted or shown
