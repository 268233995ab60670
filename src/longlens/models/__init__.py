"""Transformer models as PyTorch modules, their checkpoints, and loading."""
