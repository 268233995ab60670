"""Files of made-up proteins whose targets follow from their sequences by a rule: tasks with a known answer."""

from __future__ import annotations

import random
from pathlib import Path

STANDARD = "ACDEFGHIKLMNPQRSTVWY"


def residues(count: int, draw: random.Random) -> list[str]:
    """Residues, each drawn evenly."""
    return [draw.choice(STANDARD) for _ in range(count)]


def motif_file(path: Path, count: int = 150, motif: str = "HEK", seed: int = 0) -> Path:
    """Residues of `motif` are M where they stand in its order; the same residues in other orders are not."""
    draw, lines = random.Random(seed), []
    for number in range(count):
        sequence = residues(draw.randint(18, 24), draw)
        labels = ["-"] * len(sequence)
        for start in draw.sample(range(0, len(sequence) - 3, 3), 3):
            real = draw.random() < 0.5
            letters = list(motif)
            while "".join(letters) == motif and not real:
                draw.shuffle(letters)
            sequence[start : start + 3] = letters
            labels[start : start + 3] = ("M" if real else "-") * 3
        lines.append(f">p{number} TARGET={''.join(labels)}\n{''.join(sequence)}\n")
    path.write_text("".join(lines))
    return path


def composition_file(path: Path, count: int = 160, *, classes: bool = False, seed: int = 0) -> Path:
    """The target is the share of lysine and glutamate, or whether it is above a fifth."""
    draw = random.Random(seed)
    rows = ["id,sequence,target"]
    for number in range(count):
        charged = draw.random() * 0.4
        sequence = ["KE"[draw.random() < 0.5] if draw.random() < charged else draw.choice("ACDFGHILMNPQRSTVWY")
                    for _ in range(draw.randint(30, 60))]  # fmt: skip
        share = sum(residue in "KE" for residue in sequence) / len(sequence)
        rows.append(f"p{number},{''.join(sequence)},{('yes' if share > 0.2 else 'no') if classes else share}")
    path.write_text("\n".join(rows) + "\n")
    return path
