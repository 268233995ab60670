"""How far each family of models is from its reference, layer by layer, with random weights in its checkpoint's format.

    python benchmarks/parity.py            # writes the table of docs/models.md

Proteins of three lengths run packed here and alone in the reference. A difference is |ours - reference| / |reference|,
norms over a protein, the largest over the proteins. The peers are those of the tests (tests/models/families).
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TESTS = (ROOT / "tests", ROOT / "tests" / "models" / "families")


@dataclass(frozen=True)
class Case:
    """A family's name, its reference, and a function that writes a folder and returns the reference's states."""

    family: str
    reference: str
    make: Callable[[Path], Callable[[Any], Any]]


@dataclass(frozen=True)
class Parity:
    """Largest differences: of the embedding, of all layers, of the logits (None without a head)."""

    embedding: float
    layers: float
    logits: float | None


@contextmanager
def tests_on_path() -> Iterator[None]:
    """The modules of the tests can be imported meanwhile."""
    before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in TESTS]
    try:
        yield
    finally:
        sys.path[:] = before


def cases() -> list[Case]:
    """Every family that `longlens models` lists, by its name there."""
    with tests_on_path():
        peer, esm_peer = importlib.import_module("family_peer"), importlib.import_module("esm_peer")
        esm1, esmc, amplify, bert, saprot = (
            importlib.import_module(f"test_{name}") for name in ("esm1", "esmc", "amplify", "bert_family", "saprot")
        )
        t5 = importlib.import_module("t5_peer")

    def of_transformers(build: Callable[[], Any]) -> Callable[[Path], Callable[[Any], Any]]:
        def make(folder: Path) -> Callable[[Any], Any]:
            model = build().float()
            model.save_pretrained(folder)
            return peer.of_transformers(model.double().eval())

        return make

    def of_amplify(folder: Path) -> Callable[[Any], Any]:
        amplify.write(folder)
        return lambda tokens: amplify.literal(tokens, amplify.weights())

    def of_t5(name: str) -> Callable[[Path], Callable[[Any], Any]]:
        def make(folder: Path) -> Callable[[Any], Any]:
            model = t5.encoder(name)
            t5.save(model, folder, name)
            return t5.states_of(t5.in_float64(model))

        return make

    return [
        Case("ESM-2", "transformers", of_transformers(lambda: esm_peer.esm(3, 64, 4))),
        Case("SaProt", "transformers", saprot.write),
        Case("ESM-1b", "transformers", of_transformers(lambda: esm1.peer(normed=True))),
        Case("ESM-1v", "transformers", of_transformers(lambda: esm1.peer(normed=False))),
        Case("ESM-C", "transformers", of_transformers(esmc.peer)),
        Case("AMPLIFY", "its formulas", of_amplify),
        Case("ProtT5", "transformers", of_t5("ProtT5")),
        Case("Ankh", "transformers", of_t5("Ankh")),
        Case("BERT", "transformers", bert.make),
    ]


def measure(case: Case) -> dict[str, Parity]:
    """Differences by dtype: float64, and float32 from the reference in float64."""
    with tests_on_path():
        peer = importlib.import_module("family_peer")
    from longlens.models.pretrained import load

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        states = case.make(folder)
        found = {}
        for dtype, ours in (("float64", peer.load_float64(folder)), ("float32", load(folder, dtype="float32"))):
            differences = peer.differences(ours, ours.pack(peer.PROTEINS), states)
            logits = differences.pop() if ours.predicts else None
            found[dtype] = Parity(differences[0], max(differences[1:]), logits)
    return found


def page_text(measured: dict[str, tuple[str, dict[str, Parity]]]) -> str:
    """The table of docs/models.md."""
    from harness.pages import table

    def cells(parity: Parity) -> list[str]:
        values = (parity.embedding, parity.layers, parity.logits)
        return ["-" if value is None else f"{value:.0e}" if value else "0" for value in values]

    head = ["family", "reference", *(f"{part}, {dtype}" for dtype in ("float64", "float32")
                                     for part in ("embedding", "layers", "logits"))]  # fmt: skip
    rows = [
        [family, reference, *cells(found["float64"]), *cells(found["float32"])]
        for family, (reference, found) in measured.items()
    ]
    return table(head, rows)


def main() -> None:
    """Measure all families and fill the page."""
    from harness.pages import fill

    measured = {case.family: (case.reference, measure(case)) for case in cases()}
    fill(ROOT / "docs" / "models.md", "parity.py", page_text(measured))
    print(page_text(measured))


if __name__ == "__main__":
    main()
