"""Recipe: one yaml file that says which model to train, how, on which data and with which numerics."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import model_validator
from typing_extensions import Self

from paddledsv4.config.base import StrictConfig
from paddledsv4.config.checkpoint import CheckpointConfig
from paddledsv4.config.files import read_mapping
from paddledsv4.config.lora import LoraConfig
from paddledsv4.config.model import ModelConfig
from paddledsv4.config.observe import ObserveConfig
from paddledsv4.config.training import ParallelConfig, TrainConfig
from paddledsv4.errors import UserError
from paddledsv4.numerics.rules import Overrides


class DataConfig(StrictConfig):
    """Where the tokens are; see :func:`paddledsv4.training.data.load_tokens` for the formats."""

    SECTION: ClassVar[str] = "data."

    tokens: str


class BaseRecipe(StrictConfig):
    """A training run as a file, whatever its data are.

    ``model`` is a section or the path of a config.json; ``weights`` is a checkpoint to start from, of any format
    that `paddledsv4 convert` knows, else weights are drawn. Paths in ``model``, ``weights`` and ``data`` are
    relative to the recipe, ``output`` and ``checkpoint.dir`` to the working directory. ``numerics`` is a preset's
    name, or a mapping of op to variant in which the key ``preset`` names the preset to start from, and ``layers``
    maps globs over layers to such mappings; left out, the environment decides. With ``lora``, adapters are trained and
    nothing else.
    """

    model: ModelConfig
    training: TrainConfig | None = None
    parallel: ParallelConfig = ParallelConfig()
    lora: LoraConfig | None = None
    weights: str | None = None
    numerics: Any = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()
    output: str = "runs/paddledsv4"

    @model_validator(mode="after")
    def _check_numerics(self) -> Self:
        self.numerics_choice()
        return self

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a yaml recipe.

        Raises:
            UserError: one sentence about the first mistake found, opened by the file's name.
        """
        path = Path(path)
        values: dict[str, Any] = read_mapping(path)
        values["model"] = ModelConfig.from_file(path)
        return cls.from_dict(values, where=str(path)).located(path.parent)

    def located(self, folder: Path) -> Self:
        """A copy whose paths do not depend on the working directory; they are relative to ``folder``."""
        if self.weights is None:
            return self
        return self.model_copy(update={"weights": str((folder / self.weights).resolve())})

    def require(self, section: str) -> Any:
        """The section ``training`` or ``data``, which a recipe only used for ``info`` may leave out.

        Raises:
            UserError: the recipe does not have it.
        """
        if getattr(self, section) is None:
            raise UserError(f"{section} is missing; a recipe that trains needs a {section}: section")
        return getattr(self, section)

    def numerics_choice(self) -> tuple[str | None, Overrides]:
        """(preset or None, what deviates from it): the arguments of ``Policy.from_env``.

        Raises:
            UserError: ``numerics`` has another form.
        """
        if self.numerics is None or isinstance(self.numerics, str):
            return self.numerics, Overrides()
        if not isinstance(self.numerics, dict):
            self.reject("numerics", "must be the name of a preset, or a mapping of op to variant")
        values = dict(self.numerics)
        preset = values.pop("preset", None)
        if preset is not None and not isinstance(preset, str):
            raise UserError(f"numerics.preset = {preset!r}: must be the name of a preset")
        return preset, Overrides.from_mapping(values)


class Recipe(BaseRecipe):
    """Training on a table of tokens."""

    data: DataConfig | None = None

    def located(self, folder: Path) -> Self:
        recipe = super().located(folder)
        return recipe if self.data is None else recipe.replace_tokens(str((folder / self.data.tokens).resolve()))

    def replace_tokens(self, tokens: str) -> Self:
        """A copy that reads its tokens from another file."""
        return self.model_copy(update={"data": DataConfig(tokens=tokens)})
