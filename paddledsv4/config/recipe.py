"""Recipe: one yaml file that says which model to train, how, on which tokens and with which numerics."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from paddledsv4.config.base import StrictConfig
from paddledsv4.config.files import read_mapping
from paddledsv4.config.model import ModelConfig
from paddledsv4.config.training import ParallelConfig, TrainConfig
from paddledsv4.errors import UserError


class DataConfig(StrictConfig):
    """Where the tokens are; see :func:`paddledsv4.training.data.load_tokens` for the formats."""

    SECTION: ClassVar[str] = "data."

    tokens: str


class Recipe(StrictConfig):
    """A training run as a file.

    ``model`` is a section or the path of a config.json; paths in ``model`` and ``data.tokens`` are relative
    to the recipe, ``output`` to the working directory. ``numerics`` is a preset's name, or a mapping of op to
    variant in which the key ``preset`` names the preset to start from; left out, the environment decides.
    """

    model: ModelConfig
    training: TrainConfig | None = None
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig | None = None
    numerics: str | dict[str, str] | None = None
    output: str = "runs/paddledsv4"

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a yaml recipe.

        Raises:
            UserError: one sentence about the first mistake found, opened by the file's name.
        """
        path = Path(path)
        values: dict[str, Any] = read_mapping(path)
        values["model"] = ModelConfig.from_file(path)
        recipe = cls.from_dict(values, where=str(path))
        if recipe.data is None:
            return recipe
        return recipe.replace_tokens(str((path.parent / recipe.data.tokens).resolve()))

    def replace_tokens(self, tokens: str) -> Self:
        """A copy that reads its tokens from another file."""
        return self.model_copy(update={"data": DataConfig(tokens=tokens)})

    def require(self, section: str) -> Any:
        """The section ``training`` or ``data``, which a recipe only used for ``info`` may leave out.

        Raises:
            UserError: the recipe does not have it.
        """
        if getattr(self, section) is None:
            raise UserError(f"{section} is missing; a recipe that trains needs a {section}: section")
        return getattr(self, section)

    def numerics_choice(self) -> tuple[str | None, dict[str, str]]:
        """(preset or None, overrides op -> variant): the arguments of ``Policy.from_env``."""
        if not isinstance(self.numerics, dict):
            return self.numerics, {}
        overrides = dict(self.numerics)
        return overrides.pop("preset", None), overrides
