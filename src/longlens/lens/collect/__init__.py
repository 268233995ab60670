"""What to collect of the attention matrix: a collector and its result to a statistic."""
