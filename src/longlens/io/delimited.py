"""Tables of text with a header line: CSV and TSV, plain or compressed, from a file or standard input."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longlens.errors import SequenceError
from longlens.io.compression import READ_FAULTS, decompressed, is_broken, plain_name


@dataclass(frozen=True)
class DelimitedTable:
    """`rows` map columns to cells; `lines` are the numbers of the lines on which they end; `name` is for messages."""

    name: str
    columns: list[str]
    rows: list[dict[str, str]]
    lines: list[int]
    delimiter: str

    def place(self, row: int) -> str:
        """The file and line of row `row` (from 0), for messages."""
        return f"{self.name}, line {self.lines[row]}"

    def require(self, columns: Sequence[str]) -> None:
        """Raise `SequenceError` if a column is missing."""
        for column in columns:
            if column not in self.columns:
                raise SequenceError(
                    f"{self.name}: expected a column {column!r}, found {', '.join(self.columns) or 'none'}"
                )


def read_delimited(path: Path | str) -> DelimitedTable:
    """A table whose first line names the columns; "-" is standard input.

    Compression (`longlens.io.compression`) is recognised by the first bytes. The delimiter is a tab where the file's
    name, without the suffix of its compression, ends in .tsv or .tab, or where the header has tabs and no comma; else a
    comma.

    Raises:
        SequenceError: not UTF-8, compressed data that is cut off, a row with more cells than columns, two columns of
            one name, quotes that are never closed.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        text = decompressed(io.BytesIO(data), name).read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SequenceError(f"{name}: expected a CSV or TSV file in UTF-8, got other bytes ({error})") from None
    except READ_FAULTS as error:
        if is_broken(error):
            raise SequenceError(
                f"{name}: its compressed data is cut off or broken ({error}); fetch the file again"
            ) from None
        reason = error.strerror if isinstance(error, OSError) else None
        raise SequenceError(f"{name}: expected a CSV or TSV file, it cannot be read ({reason or error})") from None
    header = text.split("\n", 1)[0]
    tabs = plain_name(name).endswith((".tsv", ".tab")) or ("\t" in header and "," not in header)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",")
    columns: list[str] = []
    rows, lines, blank = [], [], []
    for cells in _cells(reader, name):
        if not cells:
            blank.append(reader.line_num)
            continue
        if not columns:
            columns = cells
            _refuse_repeated(columns, name)
            blank.clear()
            continue
        if len(columns) == 1:
            # a blank line within a table of one column is an empty cell
            rows += [{columns[0]: ""} for _ in blank]
            lines += blank
        blank.clear()
        if len(cells) > len(columns):
            raise SequenceError(
                f"{name}, line {reader.line_num}: expected {len(columns)} cells, got {len(cells)}; quote a cell that "
                "holds the delimiter"
            )
        # programs that write tables leave out empty cells at the end of a row
        cells += [""] * (len(columns) - len(cells))
        rows.append(dict(zip(columns, cells, strict=True)))
        lines.append(reader.line_num)
    return DelimitedTable(name, columns, rows, lines, "\t" if tabs else ",")


def _cells(reader: Iterator[list[str]], name: str) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise SequenceError(
            f"{name}: expected a CSV or TSV file, got a broken one ({error}); close a quotation mark that is left open"
        ) from None


def _refuse_repeated(columns: list[str], name: str) -> None:
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        raise SequenceError(
            f"{name}: expected columns of different names, got {', '.join(map(repr, repeated))} more than once; rename "
            "one of them"
        )


def write_delimited(table: DelimitedTable, more: Mapping[str, Sequence[str]]) -> str:
    """The text of a table with the columns `more` after its own."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", delimiter=table.delimiter)
    writer.writerow([*table.columns, *more])
    for number, row in enumerate(table.rows):
        writer.writerow([*(row[column] for column in table.columns), *(column[number] for column in more.values())])
    return text.getvalue()
