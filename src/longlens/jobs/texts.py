"""A text as the input of a job, and the language model that reads it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlens.errors import InputError, SequenceError
from longlens.hf.texts import TextModel, load_text_model
from longlens.io.alphabet import STANDARD as RESIDUES
from longlens.io.survey import RecordInfo, Survey
from longlens.io.texts import looks_like_fasta, read_text
from longlens.jobs.inputs import Proteins, ProteinSource, is_file, readable_twice

# the beginnings of paths, and the ends of the names of files of text, plain or compressed
_FILE_NAME = re.compile(
    r"(/|\.{1,2}/|~/).*|.*\.(txt|text|md|rst|html?|csv|tsv|json|log|tex|fa|fasta|gz|bz2|xz)", re.IGNORECASE
)


@dataclass(frozen=True)
class TextSource(ProteinSource):
    """A text as the only sequence of a job; `name` of its file, `count` of its tokens."""

    text: str
    name: str
    count: int

    @property
    def survey(self) -> Any:  # type: ignore[override]
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        entry = RecordInfo(1, self.name, Path(self.name).stem, "", self.count, digest, 0, 0)
        return Survey([entry], [], [{"name": self.name, "sha256": digest}])

    def sequences(self) -> Iterator[str]:
        return iter([self.text])


@contextmanager
def opened_text(source: str | Path, kind: str = "auto") -> Iterator[tuple[str, str]]:
    """A text, as it is in its file, and the name of the file: a path, "-" (standard input), or the text itself.

    A string is a file if it is "-" or names one that exists. Raises `SequenceError` for a file that cannot be read, is
    empty or not UTF-8, and for a string that looks like the name of a file that does not exist; `InputError` for what
    looks like proteins, unless `kind` is "text".
    """
    if kind not in ("auto", "text"):
        raise InputError(f"expected input 'auto' or 'text', got {kind!r}")
    if isinstance(source, str) and not source.strip():
        raise InputError("expected a text, got an empty one")
    if isinstance(source, str) and source != "-" and not _exists(source):
        _refuse_missing(source)
        yield source, "text"
        return
    with readable_twice([source]) as (path,):
        if kind == "auto" and looks_like_fasta(path):
            raise InputError(
                f"{source}: expected a text, got proteins (FASTA, which begins with '>'); their surprise is that of "
                "longlens embed --include surprise; if it is a text, say so with --input text"
            )
        yield read_text(path), Path(path).name


@contextmanager
def opened_source(source: Proteins, kind: str) -> Iterator[tuple[tuple[str, str] | None, Proteins]]:
    """The text and the name of its file, or None and the proteins. `kind`: "proteins", "text", or "auto": proteins,
    unless it is a file that does not look like FASTA. With "text", a string that names no file is the text itself.

    Raises `InputError` for another `kind`.
    """
    if kind not in ("auto", "proteins", "text"):
        raise InputError(f"expected input 'auto', 'proteins' or 'text', got {kind!r}")
    if not isinstance(source, str | Path) or not (
        kind != "text" or isinstance(source, Path) or source == "-" or _exists(source)
    ):
        if kind == "text" and isinstance(source, str):
            _refuse_missing(source)
        yield ((str(source), "text") if kind == "text" else None), source
        return
    if kind != "text" and not is_file(source):
        yield None, source
        return
    with readable_twice([source]) as (path,):
        if kind == "proteins" or (kind == "auto" and looks_like_fasta(path)):
            # a Path, so that the string cannot be read as a protein
            yield None, Path(path)
        else:
            yield (read_text(path), Path(path).name), source


def _refuse_missing(text: str) -> None:
    """Raise `SequenceError` for a text that looks like the name of a file: one line with such a beginning or end."""
    if len(text) < 256 and _FILE_NAME.fullmatch(text):
        raise SequenceError(f"{text}: expected a file or a text, found no file of this name")


def _exists(name: str) -> bool:
    return "\n" not in name and len(name) < 256 and Path(name).exists()


def load_language_model(name: str | Path, place: str, *, dtype: str, device: str) -> TextModel:
    """A model of text. Raises `InputError` for one of proteins, and as `load_text_model`."""
    if str(name) in ("tiny", "antiberty"):
        raise InputError(
            f"{place}: expected --model to name a model of text (a transformers folder or hub name), got {name}, a "
            "model of proteins"
        )
    loaded = load_text_model(str(name), dtype=dtype, device=device)
    refuse_protein_model(loaded, place)
    return loaded


def refuse_protein_model(model: TextModel, name: str) -> None:
    """Refuse a tokenizer of residues, which turns words into unknown tokens."""
    vocabulary = model.tokenizer.get_vocab()
    if len(vocabulary) < 100 and all(residue in vocabulary for residue in RESIDUES):
        raise InputError(
            f"{name}: expected a model of text, got {model.name}, whose tokens are residues of proteins; give a model "
            "of text, or, for a protein, a file that begins with a line such as >name"
        )
