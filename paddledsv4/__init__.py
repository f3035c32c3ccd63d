"""paddledsv4: a DeepSeek-V4 training stack on PaddlePaddle, aligned with Megatron-LM."""

__version__ = "0.1.0"
