"""What a model is told of the proteins of a job beside their sequences, and how it reads rare residues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from longlens.errors import InputError
from longlens.io.alphabet import clean_protein
from longlens.io.structure_alphabet import StructureAlphabet
from longlens.io.structure_letters import read_structure_letters
from longlens.jobs.inputs import ProteinSource
from longlens.models.language_model import MaskedLM

Structures = str | Path | Sequence[str | Path] | Mapping[str, str]


def prepare_model(
    model: MaskedLM,
    source: ProteinSource,
    structures: Structures | None = None,
    min_plddt: float | None = None,
    *,
    rare_as_x: bool = False,
) -> MaskedLM:
    """The model with the structures of the proteins, and with U, Z, O and B read as X if `rare_as_x`.

    `structures`: files or folders (`longlens.io.structure_letters`), or letters by sequence. The model that is given
    stays as it is. Raises `InputError` for structures that do not fit, or a model that takes none.
    """
    alphabet = model.alphabet
    if rare_as_x:
        alphabet = replace(alphabet, rare_as="X")
    if structures is not None:
        if not isinstance(alphabet, StructureAlphabet):
            raise InputError(f"expected a model that reads structures, such as SaProt, got {model.source}")
        if isinstance(structures, Mapping):
            letters: dict[str, str] = {}
            for text, word in structures.items():
                if letters.setdefault(clean_protein(text).sequence, word.lower()) != word.lower():
                    raise InputError(f"expected one structure of each sequence, got two of {text[:20]}...")
        else:
            paths = [structures] if isinstance(structures, str | Path) else list(structures)
            for path in paths:
                if not Path(path).exists():
                    raise InputError(f"expected structures, a folder or a FASTA file of letters, found no {path}")
            names = [entry.id or f"record {entry.number}" for entry in source.survey.entries]
            proteins = dict(zip(names, source.sequences(), strict=True))
            letters = read_structure_letters([Path(path) for path in paths], proteins, min_plddt=min_plddt)
        alphabet = alphabet.with_structures(letters)
    elif min_plddt is not None:
        raise InputError("expected --min-plddt only with --structures")
    return model if alphabet is model.alphabet else model.with_alphabet(alphabet)
