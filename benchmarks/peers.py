"""The two engines behind one face: build once, then ``step(number) -> loss``. Engines are imported on building."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import setup as shared
from benchmarks.setup import Setup, hash_table, model_dict, tokens

INSTALL = "pip install torch transformers==5.23.0 huggingface_hub tokenizers regex tqdm"


class Ours:
    """paddledsv4: the training step that the trainer runs."""

    def __init__(self, setup: Setup):
        from paddledsv4.host import prepare_host

        prepare_host()
        import paddle

        from paddledsv4.config import ModelConfig
        from paddledsv4.config.training import OptimizerConfig, TrainConfig
        from paddledsv4.model import DeepseekV4Model
        from paddledsv4.numerics.policy import Policy
        from paddledsv4.training.optimizer import Optimizer

        on = float(setup.losses)
        self.setup = setup
        self.train = TrainConfig(
            sequence_length=setup.sequence, micro_batch_size=setup.batch, steps=1000, clip_grad_norm=shared.CLIP,
            indexer_loss_coeff=0.01 * on, seq_aux_loss_coeff=1e-4 * on, expert_bias_update_rate=1e-3 * on,
            optimizer=OptimizerConfig(lr=shared.LEARNING_RATE, betas=shared.BETAS, eps=shared.EPSILON,
                                      weight_decay=shared.WEIGHT_DECAY),
        )  # fmt: skip
        paddle.seed(0)
        self.model = DeepseekV4Model(
            ModelConfig.from_dict(model_dict(setup)), Policy.preset(setup.numerics), precision="fp32"
        )
        if setup.weights and Path(setup.weights).exists():
            self._load(setup.weights)
        self.optimizer = Optimizer(self.model, self.train)
        self.parameters = sum(p.size for p in self.model.parameters())

    def _load(self, path: str) -> None:
        from safetensors.numpy import load_file

        from paddledsv4.weights.load import load_megatron_state
        from paddledsv4.weights.state import rename

        load_megatron_state(self.model, rename(load_file(path), self.model.config, "hf"))

    def step(self, number: int) -> float:
        from paddledsv4.training.step import train_step

        result = train_step(self.model, self.optimizer, self.train, number, lambda _: tokens(self.setup, number),
                            shared.LEARNING_RATE)  # fmt: skip
        return result.losses[0].main


class HuggingFace:
    """transformers' DeepSeek-V4 with torch's fused AdamW, the Trainer's default; writes its weights for our engine."""

    def __init__(self, setup: Setup):
        if setup.peer_host:
            from paddledsv4.host import prepare_host

            prepare_host()
        import torch
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

        torch.set_num_threads(setup.threads)
        torch.manual_seed(0)
        self.setup, self.torch = setup, torch
        self.model = DeepseekV4ForCausalLM(DeepseekV4Config(**model_dict(setup))).float().train()
        for name, buffer in self.model.named_buffers():
            if name.endswith("tid2eid"):  # zeros otherwise: every token would go to expert 0
                buffer.copy_(torch.from_numpy(hash_table()))
        named = list(self.model.parameters())
        groups = [
            {"params": [p for p in named if p.ndim >= 2], "weight_decay": shared.WEIGHT_DECAY},
            {"params": [p for p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=shared.LEARNING_RATE, betas=shared.BETAS, eps=shared.EPSILON, fused=True
        )
        self.parameters = sum(p.numel() for p in named)
        if setup.weights:
            self._save(setup.weights)

    def _save(self, path: str) -> None:
        from safetensors.numpy import save_file

        state = {n: np.ascontiguousarray(t.numpy()) for n, t in self.model.state_dict().items()}
        save_file(state, path)

    def step(self, number: int) -> float:
        inputs, labels = (self.torch.from_numpy(np.ascontiguousarray(x)) for x in tokens(self.setup, number))
        logits = self.model(input_ids=inputs, use_cache=False).logits
        loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), shared.CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)


ENGINES = {"paddledsv4": Ours, "transformers": HuggingFace}


def missing_peer() -> str | None:
    """One line on how to install Hugging Face's engine, or None when this interpreter has it."""
    from importlib.util import find_spec

    if find_spec("torch") and find_spec("transformers") and find_spec("transformers.models.deepseek_v4"):
        return None
    return f"Hugging Face's DeepSeek-V4 is not installed here; to measure beside it: {INSTALL}"
