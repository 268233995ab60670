"""The steps of `gpu.py`, one module to a subject; of longlens they use `ops`, `lens`, `models` and `testing` only."""
