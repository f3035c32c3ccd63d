"""A Megatron of a few lines: the classes, modules and methods that capture watches, around a model of one layer."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace

from small_bundle import SMALL

PREFIX = "megatron.core"
VOCABULARY, HIDDEN, EXPERTS = SMALL["vocab_size"], SMALL["hidden_size"], SMALL["n_routed_experts"]

SOURCE = '''
import torch
from torch import nn

def topk_routing_with_score_function(logits, topk, score_function="softmax", expert_bias=None):
    scores = nn.functional.softplus(logits).sqrt()
    chosen = (scores if expert_bias is None else scores + expert_bias).topk(topk, dim=1).indices
    return scores, torch.zeros_like(scores).scatter(1, chosen, 1.0).bool()

def learned_output_contract(streams, scale):
    return streams * scale

class HyperConnectionModule(nn.Module):
    compute_h_eps = 1e-6
    def compute_mappings(self, x): return x * 0.5, x * 0.25, x * 0.125
    def aggregate(self, x, h_pre): return x + h_pre
    def forward(self, x):
        h_pre, _, _ = self.compute_mappings(x)
        return self.aggregate(x, h_pre), x

class TopKRouter(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config.num_moe_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_moe_experts))
        self.topk = config.moe_router_topk
    def gating(self, x): return x @ self.weight.t()
    def forward(self, x):
        logits = self.gating(x).reshape(-1, self.weight.shape[0])
        bias, score = self.expert_bias, "sqrtsoftplus"
        return topk_routing_with_score_function(logits, self.topk, score_function=score, expert_bias=bias)

class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attention_hyper_connection = HyperConnectionModule()
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.mlp = nn.Module()
        self.mlp.router = TopKRouter(config)
    def forward(self, *args, **kwargs):
        x, _ = self.self_attention_hyper_connection(kwargs["hidden_states"])
        x = self.input_layernorm(x)
        probs, _ = self.mlp.router(x)
        return x * probs.sum(-1).reshape(x.shape[:2] + (1,)), None

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([Layer(config)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size)
        self.scale = nn.Parameter(torch.ones(1))
    def forward(self, x):
        x, _ = self.layers[0](hidden_states=x)
        return self.final_layernorm(learned_output_contract(x, self.scale))

class MTPLossLoggingHelper:
    seen = []
    @staticmethod
    def save_loss_to_tracker(loss_sum, num_tokens, layer_number): MTPLossLoggingHelper.seen.append(layer_number)

class GPTModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.vocab_size = config, config.vocab
        self.embedding = nn.Embedding(config.vocab, config.hidden_size)
        self.decoder = Block(config)
        self.output_layer = nn.Linear(config.hidden_size, config.vocab, bias=False)
    def forward(self, input_ids, position_ids, attention_mask, labels=None, loss_mask=None):
        logits = self.output_layer(self.decoder(self.embedding(input_ids).transpose(0, 1)))
        loss = nn.functional.cross_entropy(logits.transpose(0, 1).flatten(0, 1), labels.flatten(), reduction="none")
        if self.config.mtp_num_layers:
            MTPLossLoggingHelper.save_loss_to_tracker(2 * loss.sum(), loss_mask.sum(), 0)
        return loss.view(labels.shape)

class MegatronOptimizer:
    def __init__(self, optimizer, config): self.optimizer, self.config = optimizer, config
    @property
    def param_groups(self): return self.optimizer.param_groups
    def step(self): raise NotImplementedError

class FP32Optimizer(MegatronOptimizer):
    def step(self):
        norm = nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1e9)
        self.optimizer.step()
        return True, norm, None
'''

PLACES = {
    "models.gpt.gpt_model": ["GPTModel"],
    "optimizer.optimizer": ["MegatronOptimizer"],
    "transformer.multi_token_prediction": ["MTPLossLoggingHelper"],
}


def config() -> SimpleNamespace:
    """The fields of a transformer config that a bundle is described from."""
    return SimpleNamespace(
        vocab=VOCABULARY, hidden_size=HIDDEN, num_layers=1, mtp_num_layers=1, bf16=False, csa_compress_ratios=[4, 0],
        num_attention_heads=2, v_head_dim=8, qk_pos_emb_head_dim=4, q_lora_rank=8, o_groups=2, o_lora_rank=4,
        csa_window_size=8, rotary_base=10000, csa_compress_rotary_base=40000.0, dsa_indexer_n_heads=2,
        dsa_indexer_head_dim=8, dsa_indexer_topk=2, num_residual_streams=2, mhc_sinkhorn_iterations=3,
        layernorm_epsilon=1e-6, num_moe_experts=EXPERTS, moe_router_topk=2,
        moe_ffn_hidden_size=8, moe_n_hash_layers=0, moe_router_score_function="sqrtsoftplus",
        moe_router_topk_scaling_factor=1.5, activation_func_clamp_value=10.0, init_method_std=0.02,
        moe_shared_expert_intermediate_size=8, rotary_scaling_factor=4, original_max_position_embeddings=65536,
        beta_fast=32, beta_slow=1, mtp_loss_scaling_factor=0.1, dsa_indexer_loss_coeff=0.01,
        dsa_indexer_use_sparse_loss=True, moe_aux_loss_coeff=1e-4, moe_router_bias_update_rate=1e-3,
    )  # fmt: skip


def install(monkeypatch) -> SimpleNamespace:
    """Put the fake into sys.modules; returns its names."""
    everything = types.ModuleType(f"{PREFIX}.everything")
    exec(SOURCE, vars(everything))
    modules = {"megatron": types.ModuleType("megatron"), PREFIX: types.ModuleType(PREFIX),
               everything.__name__: everything}  # fmt: skip
    for place, names in PLACES.items():
        module = types.ModuleType(f"{PREFIX}.{place}")
        for name in names:
            setattr(module, name, getattr(everything, name))
        modules[module.__name__] = module
        parts = module.__name__.split(".")
        for i in range(2, len(parts)):
            modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    for name, module in modules.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "megatron.core.parallel_state", raising=False)
    return SimpleNamespace(**vars(everything))
