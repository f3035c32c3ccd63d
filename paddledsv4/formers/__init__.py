"""Our model where PaddleFormers looks for DeepSeek-V4: its Auto classes, Trainer and LoRA.

Importing this package registers the config and the model. PaddleFormers' own model of that name cannot be imported
without a package that is on no public index.
"""

from paddledsv4.errors import UserError
from paddledsv4.host import prepare_host

prepare_host()
try:
    from paddledsv4.formers.config import DeepseekV4Config
    from paddledsv4.formers.data import rows
    from paddledsv4.formers.lora import LoRAModel
    from paddledsv4.formers.model import DeepseekV4ForCausalLM
    from paddledsv4.formers.register import register, synchronize_on_cpu
    from paddledsv4.formers.trainer import ExpertBias, MegatronAdamW, Schedule, optimizers, train_config
except ImportError as error:
    raise UserError(
        f'PaddleFormers cannot be imported ({error}); in an environment of its own: pip install "paddledsv4[formers]"'
    ) from None

register(DeepseekV4Config, DeepseekV4ForCausalLM)
synchronize_on_cpu()

__all__ = [
    "DeepseekV4Config",
    "DeepseekV4ForCausalLM",
    "ExpertBias",
    "LoRAModel",
    "MegatronAdamW",
    "Schedule",
    "optimizers",
    "rows",
    "train_config",
]
