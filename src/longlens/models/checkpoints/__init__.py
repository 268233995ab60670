"""The formats of checkpoints, and the models built from them; `longlens.load` chooses the format."""
