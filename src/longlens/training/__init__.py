"""Masked language modelling over proteins: objective, data, loop, checkpoints."""
