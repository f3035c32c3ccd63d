"""Supervised fine-tuning: DeepSeek-V4's message encoding, loss masks, conversations on disk, packing.

Nothing here imports Paddle, so that workers which only tokenise start fast.
"""
