"""Weights in and out of the model."""
