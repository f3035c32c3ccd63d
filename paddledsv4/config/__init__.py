"""Typed, frozen configurations: what is computed, how it is trained, and the recipe that names both."""

from paddledsv4.config.checkpoint import CheckpointConfig
from paddledsv4.config.lora import LoraConfig
from paddledsv4.config.model import ModelConfig, RopeScaling
from paddledsv4.config.recipe import DataConfig, Recipe
from paddledsv4.config.training import OptimizerConfig, ParallelConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Recipe",
    "RopeScaling",
    "TrainConfig",
]
