"""PaddleFormers' LoRAModel with our adapters: its own ones know paddle.nn.Linear alone and multiply past the policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

from paddleformers import peft

from paddledsv4.config.lora import ATTENTION, EXPERTS, LoraConfig
from paddledsv4.errors import UserError
from paddledsv4.formers.model import DeepseekV4ForCausalLM, name_parameters
from paddledsv4.sft.adapter import SavedAdapter, load_adapter, save_adapter
from paddledsv4.sft.lora import ALL_LINEAR, attach

# What PaddleFormers can ask for and our adapters cannot: key -> the values that ask for nothing.
PLAIN = {
    "trainable_modules": (None, []), "trainable_bias": (None,), "enable_lora_list": (None,), "do_qat": (False,),
    "merge_weights": (False,), "rslora": (False,), "loraga": (False,), "lora_plus_scale": (1.0,),
}  # fmt: skip


def adapter_config(config: peft.LoRAConfig) -> LoraConfig:
    """Our configuration of the same adapters.

    Raises:
        UserError: it asks for more than plain LoRA, or names no target.
    """
    for name, plain in PLAIN.items():
        if getattr(config, name) not in plain:
            raise UserError(f"LoRAConfig.{name} = {getattr(config, name)!r}: is not supported; only plain LoRA is")
    if not config.target_modules:
        raise UserError("LoRAConfig.target_modules is empty: must be expressions for paths, such as .*linear_q_up_proj")
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    return LoraConfig(
        r=config.r, lora_alpha=float(config.lora_alpha), lora_dropout=float(config.lora_dropout),
        target_modules="|".join(f"(?:{pattern})" for pattern in wanted),
    )  # fmt: skip


class LoRAModel(peft.LoRAModel):
    """Adapters of :mod:`paddledsv4.sft.lora` on a :class:`DeepseekV4ForCausalLM`, whose own weights are frozen.

    ``lora_config.target_modules``: expressions for whole paths of our layers, such as ``.*linear_q_up_proj``.
    ``seed``: of the initial adapters. Expert biases stand still.

    Raises:
        UserError: a target that no layer has, or more than plain LoRA.
    """

    def __init__(self, model: DeepseekV4ForCausalLM, lora_config: peft.LoRAConfig, seed: int = 0):
        self._seed = seed
        super().__init__(model, lora_config)

    def get_lora_model(self, model: DeepseekV4ForCausalLM, lora_config: peft.LoRAConfig) -> DeepseekV4ForCausalLM:
        self.adapter_config = adapter_config(lora_config)
        attach(model.model, self.adapter_config, self._seed)
        name_parameters(model.model)
        model.config.expert_bias_update_rate = 0.0
        return model

    def mark_only_lora_as_trainable(self) -> None:
        """Done by attaching."""

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write adapters as peft has them, which `paddledsv4 convert --adapter` merges, and lora_config.json.

        Raises:
            UserError: they cannot be written.
        """
        save_adapter(self.model.model, self.adapter_config, Path(save_directory))
        self.lora_config.save_pretrained(str(save_directory))

    @classmethod
    def from_pretrained(cls, model: DeepseekV4ForCausalLM, lora_path: str | Path, **_: Any) -> LoRAModel:
        """``model`` with the adapters of a folder, ours or that of a `paddledsv4 sft` run.

        Raises:
            UserError: they cannot be read, or do not fit.
        """
        saved = SavedAdapter.read(Path(lora_path)).config
        targets = (*ATTENTION, *EXPERTS) if saved.target_modules == ALL_LINEAR else saved.target_modules
        patterns = targets if isinstance(targets, str) else [rf"(.*\.)?{re.escape(name)}" for name in targets]
        config = peft.LoRAConfig(r=saved.r, lora_alpha=saved.lora_alpha, target_modules=patterns)
        loaded = cls(model, config)
        load_adapter(model.model, Path(lora_path))
        return loaded

    def _elsewhere(self, *_: Any, **__: Any) -> NoReturn:
        raise UserError(
            "our adapters cannot be switched or merged in place; save_pretrained writes them, "
            "`paddledsv4 convert BASE OUT --to paddledsv4 --adapter FOLDER` merges them"
        )

    merge = unmerge = get_merge_state_dict = restore_original_model = disable_lora = enable_lora = _elsewhere
