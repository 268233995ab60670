"""Lists of contacts, for `longlens contacts fit`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from esm_peer import protein


def contact_list(folder: Path, count: int = 3) -> list[str]:
    """Random contacts of `count` random proteins, written to `folder`: arguments of `contacts fit`."""
    draw = np.random.default_rng(0)
    i, j = np.triu_indices(60, 6)
    lines, records = ["id,i,j"], []
    for number in range(count):
        records.append(f">p{number}\n{protein(60, number)}\n")
        lines += [f"p{number},{i[place] + 1},{j[place] + 1}" for place in draw.permutation(len(i))[:12]]
    (folder / "c.csv").write_text("\n".join(lines) + "\n")
    (folder / "c.fasta").write_text("".join(records))
    return [str(folder / "c.csv"), "--fasta", str(folder / "c.fasta")]
