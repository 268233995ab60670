"""Names that people know from other tools, for commands of ours; and the nearest name for one that is mistyped."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# name elsewhere -> our command, and the tools that have the name
ALIASES = {
    "env": ("doctor", "transformers env, accelerate env"),
    "extract": ("embed", "esm-extract"),
    "list-models": ("models", "protembedder"),
    "perplexity": ("surprise", "llama-perplexity, lmppl"),
    "predict-contacts": ("contacts", "predict_contacts of fair-esm and transformers"),
    "surprisal": ("surprise", "minicons"),
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one, or None if none is like it."""
    return next(iter(get_close_matches(name, sorted(known), n=1, cutoff=0.6)), None)
