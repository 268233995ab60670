"""The public conformance suite: run any attention function, ours or a stranger's, through the same checks."""
