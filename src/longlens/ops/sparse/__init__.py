"""Sparse attention: the exact softmax over the pairs of a pattern. One pattern to a file."""
