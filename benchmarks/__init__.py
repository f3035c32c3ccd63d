"""Measurements of speed and memory; nothing in the package imports them."""
