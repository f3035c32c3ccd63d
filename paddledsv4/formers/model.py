"""Our model as PaddleFormers' PretrainedModel: it adds names and files, and computes nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import paddle
from paddle import Tensor
from paddleformers.transformers import PretrainedModel
from paddleformers.transformers.model_outputs import ModelOutput
from paddleformers.utils.env import PADDLE_WEIGHTS_NAME

from paddledsv4.config import TrainConfig
from paddledsv4.errors import UserError
from paddledsv4.formers.config import LOSSES, DeepseekV4Config
from paddledsv4.model import DeepseekV4Model
from paddledsv4.numerics.policy import Policy
from paddledsv4.sft.lora import adapters
from paddledsv4.training.step import auxiliary_losses, microbatch_losses
from paddledsv4.transformer.build import unset_parameters
from paddledsv4.transformer.documents import documents_of
from paddledsv4.weights.files import INDEX
from paddledsv4.weights.from_checkpoint import load_checkpoint
from paddledsv4.weights.save import save_model

IGNORED_LABEL = -100
# Arguments of PaddleFormers' from_pretrained about hubs, file formats and memory, which mean nothing here.
OF_PADDLEFORMERS = (
    "cache_dir", "convert_from_hf", "download_hub", "force_download", "load_checkpoint_format", "load_via_cpu",
    "low_cpu_mem_usage", "subfolder", "use_safetensors",
)  # fmt: skip


class DeepseekV4ForCausalLM(PretrainedModel):
    """:class:`DeepseekV4Model` (``self.model``) on one process.

    ``policy``: numeric variants; without, ``config.numerics`` and the environment say.
    ``auxiliary``: the weights of the losses; the gradient accumulation of a Trainer divides all of them alike.

    Raises:
        UserError: an illegal configuration, or several processes.
    """

    config_class = DeepseekV4Config
    base_model_prefix = "model"

    def __init__(self, config: DeepseekV4Config, policy: Policy | None = None):
        super().__init__(config)
        if paddle.distributed.get_world_size() > 1:
            raise UserError("PaddleFormers trains this model on one process; `paddledsv4 train` trains it on many")
        policy = policy or Policy.from_env(config.numerics)
        self.model = DeepseekV4Model(
            config.model_config(), policy, config.precision(), linear_cross_entropy=config.linear_cross_entropy
        )
        self.auxiliary = auxiliary_losses(loss_config(config))
        name_parameters(self.model)

    def init_weights(self) -> None:
        """Nothing: our layers drew their weights."""

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, loss_mask: Tensor | None = None, cu_seqlens: Any = None,
        **unknown: Any,
    ) -> ModelOutput:
        """input_ids, labels, loss_mask [b, s] -> logits [b, s, V], or with labels the losses.

        labels are the next tokens, already shifted, as PaddleFormers' data sets have them; -100 counts nothing.
        ``loss`` has the value of ``main_loss``; in backward all others take part too. ``cu_seqlens``: as in
        :func:`paddledsv4.transformer.documents.documents_of`.

        Raises:
            UserError: any other input, such as PaddleFormers' own description of packed documents.
        """
        if unknown:
            raise UserError(f"the model takes no {', '.join(unknown)}; documents of one row are given as cu_seqlens")
        documents, input_ids = documents_of(cu_seqlens), input_ids.astype("int64")
        if labels is None:
            return ModelOutput(logits=self.model(input_ids, documents=documents).transpose([1, 0, 2]))
        counted = labels != IGNORED_LABEL
        labels = paddle.where(counted, labels, paddle.zeros_like(labels)).astype("int64")
        mask = counted.astype("float64" if self.config.precision() == "fp64" else "float32")
        mask = mask if loss_mask is None else mask * loss_mask.astype(mask.dtype)
        losses, main, mtp = microbatch_losses(self.model, self.auxiliary, input_ids, labels, mask, documents)
        loss = losses[0]
        for other in losses[1:]:
            loss = self.model.ops.attach_loss(loss, other, seed=1.0)
        return ModelOutput(loss=loss, main_loss=main.detach(), mtp_loss=mtp)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, config: DeepseekV4Config | None = None, policy: Policy | None = None,
        dtype: str | None = None, **settings: Any,
    ) -> DeepseekV4ForCausalLM:
        """A model with the weights of a folder in any format that `paddledsv4 convert` knows.

        ``settings`` are fields of the configuration.

        Raises:
            UserError: the folder has no config.json, its tensors do not fit it, or an unknown setting.
        """
        if config is None and not (Path(path) / "config.json").is_file():
            raise UserError(f"{path}: is no folder with a config.json; weights are not fetched from a hub")
        config = cls.config_class.from_pretrained(str(path)) if config is None else config
        settings = {name: value for name, value in settings.items() if name not in OF_PADDLEFORMERS}
        for name, value in settings.items():
            if not hasattr(config, name):
                raise UserError(f"from_pretrained: {name} is no field of the configuration")
            setattr(config, name, value)
        config.dtype = dtype or config.dtype
        with unset_parameters():
            model = cls(config, policy)
        load_checkpoint(model.model, Path(path))
        return model

    def save_pretrained(
        self, save_dir: str | Path, is_main_process: bool = True, save_to_hf: bool = True, **_: Any
    ) -> None:
        """Write the weights under our names, with an index and config.json, into a folder that may exist.

        ``save_to_hf`` False: in addition the one file that a Trainer without a ``load_checkpoint_format`` resumes from.

        Raises:
            UserError: it cannot be written, or the model has adapters. Weights that were there are there still.
        """
        if adapters(self.model):
            raise UserError("the model has adapters; LoRAModel.save_pretrained writes those, its weights are as before")
        folder = Path(save_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            hidden = Path(tempfile.mkdtemp(prefix=".weights.", dir=folder))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
        try:
            save_model(self.model, hidden / "weights")
            self.config.save_pretrained(hidden / "weights")
            if not save_to_hf:
                paddle.save(self.state_dict(), str(hidden / "weights" / PADDLE_WEIGHTS_NAME))
            _replace(hidden / "weights", folder)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def name_parameters(model: DeepseekV4Model) -> None:
    """Paddle counts parameters through; an optimizer's state would fit no model but the first of a process."""
    for name, parameter in model.named_parameters():
        parameter.name = name


def loss_config(config: DeepseekV4Config, **changes: Any) -> TrainConfig:
    """A training section with the losses of ``config``; what the rest of it says is in ``changes``."""
    values = {"sequence_length": 1, "micro_batch_size": 1, "steps": 1, "optimizer": {"lr": 0.0}}
    values |= {name: getattr(config, name) for name in LOSSES} | {"precision": config.precision()}
    return TrainConfig.from_dict(values | changes)


def _replace(new: Path, folder: Path) -> None:
    """Move a checkpoint into a folder; the index, which makes it whole, goes last and that of an old one first."""
    names = sorted((path.name for path in new.iterdir()), key=lambda name: name == INDEX)
    with contextlib.suppress(FileNotFoundError):
        (folder / INDEX).unlink()
    for old in folder.glob("model*.safetensors"):
        old.unlink()
    for name in names:
        os.replace(new / name, folder / name)
