"""Protein models that `longlens.load` does not serve, and what does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Other:
    """A model: the words by which its configuration is known, why it is not loaded, whether `attach` serves it.

    A word is looked for anywhere in the model type and the names of classes, and as a word of the checkpoint's own
    name, without the folders above it: /home/margarita/esm2 is no RITA, lightonai/RITA_s is.
    """

    name: str
    words: tuple[str, ...]
    reason: str
    attach: bool = False


_OWN_CODE = "its code is its own, not transformers'"

OTHERS: tuple[Other, ...] = (
    Other("ProtGPT2", ("protgpt2",), "it is a GPT-2, whose tokens are not residues", attach=True),
    Other("ProGen2", ("progen",), _OWN_CODE),
    Other("RITA", ("rita",), _OWN_CODE),
    Other("ESM-3", ("esm3",), "it reads structure and function too, and is not in transformers"),
    Other("ESM-IF1", ("esm_if1", "gvp_transformer"), "it reads structures"),
    Other("MSA Transformer", ("msa_transformer", "esm_msa"), "it reads alignments, along rows and columns"),
    Other("gLM2", ("glm2",), f"{_OWN_CODE}, and it reads DNA in lower case"),
    Other("E1", ("e1formaskedlm", "e1model"), f"{_OWN_CODE}, and it reads related sequences beside the protein"),
    Other("DPLM", ("dplm",), "its layers are ESM-2's, but it has not been compared with its own code"),
)


def other_named(entries: Mapping[str, Any]) -> Other | None:
    """The model of these entries of a config.json, if it is one of `OTHERS`."""
    names = entries.get("architectures")
    said = [entries.get("model_type"), *(names if isinstance(names, list) else [])]
    classes = [name.lower() for name in said if isinstance(name, str)]
    path = entries.get("_name_or_path")
    own = re.split(r"[/\\]", path.rstrip("/\\"))[-1].lower() if isinstance(path, str) else ""

    def is_named(word: str) -> bool:
        as_word = re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z])", own)
        return as_word is not None or any(word in name for name in classes)

    return next((other for other in OTHERS if any(map(is_named, other.words))), None)
