"""Learning a property of proteins from examples: targets, splits, probe, head, low-rank adaptation, metrics."""
