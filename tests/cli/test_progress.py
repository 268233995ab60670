"""Progress without a terminal: a line now and then, the last one always; notices at once."""

from __future__ import annotations

import io

from longlens.cli.progress import ProgressLines
from longlens.jobs.progress import Notice, StageProgress


def test_a_line_now_and_then_and_the_last_one_always() -> None:
    file, now = io.StringIO(), [0.0]
    show = ProgressLines(file, every=30, clock=lambda: now[0])
    for second in range(100):
        now[0] = float(second)
        show(StageProgress("embed", 10 * second, 990))
    assert file.getvalue().splitlines() == [
        "longlens: embed: 300 of 990 residues, 10 a second",
        "longlens: embed: 600 of 990 residues, 10 a second",
        "longlens: embed: 900 of 990 residues, 10 a second",
        "longlens: embed: 990 of 990 residues, 10 a second",
    ]


def test_notices_are_shown_at_once() -> None:
    file = io.StringIO()
    show = ProgressLines(file)
    show(Notice("model tiny"))
    show(Notice("odd", warning=True))
    assert file.getvalue() == "longlens: model tiny\nlonglens: warning: odd\n"
