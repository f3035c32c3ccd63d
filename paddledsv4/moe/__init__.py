"""Mixture of experts: routers, experts, shared expert."""
