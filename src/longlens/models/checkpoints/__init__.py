"""Checkpoints in the formats that they come in, and models built from them; `longlens.load` chooses among them."""
