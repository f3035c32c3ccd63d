"""Layers that read like the paper: they own parameters and call ops, nothing else."""
