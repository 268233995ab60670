"""The tables of attention in docs/benchmarks.md, between its marks, from the newest results.

python benchmarks/tables.py [ATTENTION.json [CLAIMS.json]]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from contenders import BY_NAME, CONTENDERS, Contender
from harness import DOCS, fill, newest, show_bytes, show_ratio, show_seconds, table
from plots import TITLES

PAGE = DOCS / "benchmarks.md"
THEMES = {**TITLES, "variants": "Exact attention with what turns PyTorch quadratic"}
CLAIMS = {
    "peak_memory": "Peak growth at N = 16,384, one head, D = 64, float32, forward",
    "speed_exact": "Exact attention against PyTorch's fused kernel, 8 heads, D = 64, forward",
    "speed_window": "`Window(256)` at N = 16,384, 8 heads, D = 64, against compiled FlexAttention",
    "speed_approximate": "Approximators against their peer packages at N = 8,192, 8 heads, D = 64, float32, forward",
    "speed_sparse": "Sparse patterns against packages with the same pattern, N = 16,384, 8 heads, float32, forward",
    "million_tokens": "1,048,576 tokens, 8 heads, D = 64, bfloat16, forward: resident memory of the whole process",
}
# why a figure that was wanted is not reached, from a profile of the same call
WHY = {
    "speed_approximate": """\
Linear and Nystrom stay below 1.5x in float32 because most of their time is in matrix products that the peer computes as
well: in a profile of one forward call (two threads) they take 9 of 17 ms for Linear (features times values, and queries
times the sum) and 16 of 24 ms for Nystrom (queries and keys against the landmarks, and both weights times values). What
can differ is the rest, reading the inputs and writing the output among it. In bfloat16 our approximators compute in
float32, which costs speed against peers that multiply in bfloat16; the Performer's error is 1.6e-3 there, that of the
same formula in plain bfloat16 1e-2 or more.
""",
}


def grid(data: dict[str, Any], theme: str, which: str, dtype: str, table_name: str, value: str) -> str:
    """Contenders down, lengths across; "" where nothing was measured."""
    lines = [line for line in CONTENDERS if line.theme == theme]
    rows = [row for row in data[table_name] if row["dtype"] == dtype and row["pass"] == which]
    cells = {(row["contender"], row["length"]): row for row in rows}
    lengths = sorted({row["length"] for row in rows if value in row})
    if not lengths:
        return ""
    show = show_seconds if value == "median_s" else show_bytes
    heads = {row["length"]: row["heads"] for row in rows}
    head = [dtype] + [f"{n:,}" + (f" (H={heads[n]})" if table_name == "time" else "") for n in lengths]
    body, missing = [], []
    for line in lines:
        found = {length: cells.get((line.name, length), {}) for length in lengths}
        if any(value in row for row in found.values()):
            body.append([_name(line), *(show(row[value]) if value in row else "-" for row in found.values())])
        reasons: dict[str, list[int]] = {}
        for length, row in found.items():
            if "not_run" in row:
                reasons.setdefault(row["not_run"], []).append(length)
        for reason, at in reasons.items():
            where = "" if len(at) == len(lengths) else " at " + ", ".join(f"{n:,}" for n in at)
            missing.append(f"- {line.name}{where}: {reason}")
    text = table(head, body) if body else ""
    if missing:
        text += "\n<details><summary>Not measured</summary>\n\n" + "\n".join(missing) + "\n\n</details>\n"
    return text


def _name(line: Contender) -> str:
    return f"**{line.name}**" if line.ours else line.name


def error_table(data: dict[str, Any], theme: str, length: int) -> str:
    rows = []
    for line in CONTENDERS:
        if line.theme != theme:
            continue
        cells = []
        for which, value in (("forward", "error"), ("forward+backward", "error_query_grad")):
            for dtype in ("float32", "bfloat16"):
                found = [row.get(value) for row in data["time"] if row["contender"] == line.name
                         and row["length"] == length and row["dtype"] == dtype and row["pass"] == which]  # fmt: skip
                cells.append(f"{found[0]:.2g}" if found and found[0] is not None else "-")
        if set(cells) != {"-"}:
            rows.append([_name(line), *cells])
    if not rows:
        return ""
    if theme == "approximate":
        mean = [row for row in data["mean"] if row["length"] == length and row["dtype"] == "float32"]
        if mean:
            rows.append(["mean of the values", f"{mean[0]['error_full']:.2g}", "-", "-", "-"])
    head = [f"N = {length:,}", "float32", "bfloat16", "query gradient, float32", "query gradient, bfloat16"]
    return table(head, rows)


def claim_table(rows: list[dict[str, Any]], claim: str) -> str:
    mine = [row for row in rows if row["claim"] == claim]
    if not mine:
        return ""
    body = []
    for row in mine:
        verdict = {True: "yes", False: "**no**", None: ""}[row.get("holds")]
        peer, ours = row.get("peer", ""), row.get("ours", "")
        if "not_run" in row:
            body.append([row["what"], ours, peer, f"not run: {row['not_run']}", "", row.get("wanted") or "", ""])
        elif "ratio_low" in row:
            error = " / ".join(
                "-" if row.get(f"{who}_error") is None else f"{row[f'{who}_error']:.1g}" for who in ("ours", "peer")
            )
            body.append([
                row["what"], f"{ours}: {show_seconds(row['ours_median_s'])}",
                f"{peer}: {show_seconds(row['peer_median_s'])}",
                show_ratio(row), error,
                row["wanted"] or "", verdict,
            ])  # fmt: skip
        elif "ours_mib" in row:
            body.append([
                row["what"], f"{ours}: {row['ours_mib']} MiB", f"{peer}: {row['peer_mib']} MiB",
                f"{row['ratio']:.0f}x less", "", row["wanted"], verdict,
            ])  # fmt: skip
        elif "peak_gib" in row:
            body.append([
                row["what"], f"{row['peak_gib']} GiB in {row['seconds']:.0f} s", "", "", "", row["wanted"], verdict,
            ])  # fmt: skip
        else:
            time_ = show_seconds(row["ours_median_s"]) if "ours_median_s" in row else row.get("ours_says", "")
            says = f"{peer}: {row.get('peer_says', 'gives gradients too')}"
            body.append([row["what"], f"{ours}: {time_}", says, "", "", row["wanted"], verdict])
    head = ["", "longlens", "peer", "ratio (lowest to highest round)", "error, ours / peer", "wanted", "holds"]
    return table(head, body)


def machine_text(data: dict[str, Any]) -> str:
    """The machine, the commits and the packages."""
    machine = data["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['gpu'] or machine['cpu']} ({', '.join(machine['cpu_flags'])}), {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, Python {machine['python']}, {machine['date']}, "
        f"commit {', '.join(data['commits'])}. {packages}.\n"
    )


def claims_text(claims: dict[str, Any]) -> str:
    """A table for each claim, and why a claim does not hold where that is known."""
    parts = [machine_text(claims)]
    for claim, title in CLAIMS.items():
        text = claim_table(claims["claims"], claim)
        if text:
            parts += [f"{title}:\n", text]
            if claim in WHY and any(row["claim"] == claim and row.get("holds") is False for row in claims["claims"]):
                parts.append(WHY[claim])
    return "\n".join(parts)


def contenders_text(data: dict[str, Any]) -> str:
    """Time, memory and error of all contenders, a section for each family."""
    parts = [machine_text(data)]
    dtypes = ("float32", "bfloat16")
    for theme, title in THEMES.items():
        parts.append(f"## {title}\n")
        if theme in TITLES:
            parts.append(f"![{title}: time and memory against length](images/benchmarks-{theme}.svg)\n")
        for heading, table_name, value in (
            ("Time", "time", "median_s"),
            ("Peak memory growth", "memory", "growth_bytes"),
        ):
            for which in ("forward", "forward+backward"):
                texts = [grid(data, theme, which, dtype, table_name, value) for dtype in dtypes]
                if any(texts):
                    parts += [f"### {heading}, {which}\n", *filter(None, texts)]
        lengths = sorted({row["length"] for row in data["time"] if row.get("error") is not None})
        middle = 8192 if 8192 in lengths else lengths[-1] if lengths else 0
        errors = error_table(data, theme, middle) if middle else ""
        if errors:
            parts += ["### Error\n", errors]
        notes = [f"- {line.name}: {line.note}" for line in CONTENDERS if line.theme == theme and line.note]
        if notes:
            parts.append("Notes:\n\n" + "\n".join(notes) + "\n")
    failed = [row for row in data["checks"] if row["wrong"] and row["contender"] in BY_NAME]
    if failed:
        parts.append("## Not reported: the quick check failed\n")
        parts.append(
            "\n".join(f"- {row['contender']}, {row['dtype']}, {row['pass']}: {row['wrong']}" for row in failed) + "\n"
        )
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    paths = [Path(text) for text in argv or []]
    attention = paths[0] if paths else newest("attention_*")
    claims = paths[1] if len(paths) > 1 else newest("claims_*")
    if attention is None:
        print("tables: no results yet; `python benchmarks/run.py` makes them")
        return
    read = json.loads(claims.read_text()) if claims is not None else None
    fill(PAGE, "tables.py: contenders", contenders_text(json.loads(attention.read_text())))
    if read is not None:
        fill(PAGE, "tables.py: claims", claims_text(read))
    print("tables: docs/benchmarks.md")


if __name__ == "__main__":
    main(sys.argv[1:])
