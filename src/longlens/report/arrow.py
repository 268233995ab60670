"""Tables for programs that read Arrow: polars, pandas, DuckDB, pyarrow and others take any object with
`__arrow_c_stream__` (the Arrow PyCapsule interface), without a copy and without longlens knowing them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class ArrowTable:
    """A result that is a table: `polars.DataFrame(result)`, `pandas.DataFrame.from_arrow(result)`, and so on.

    A subclass defines `_arrow`, a pyarrow Table or, where the table may be long, a RecordBatchReader.
    """

    def _arrow(self) -> Any:
        raise NotImplementedError

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """The table as an Arrow C stream."""
        return self._arrow().__arrow_c_stream__(requested_schema)


def arrow_table(columns: Mapping[str, Any]) -> Any:
    """A pyarrow Table of columns of equal length."""
    import pyarrow as pa

    return pa.table(dict(columns))


def with_vectors(table: Any, arrays: Mapping[str, Any]) -> Any:
    """A pyarrow Table with a column of lists of fixed size for each array (rows, d), as float32; rows of the table
    beyond an array's have null."""
    import numpy as np
    import pyarrow as pa

    for name, array in arrays.items():
        rows, width = array.shape
        missing = len(table) - rows
        # many readers of Arrow lack float16
        values = np.asarray(array, np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
        nulls = pa.nulls(missing, pa.list_(pa.float32(), width))
        table = table.append_column(name, pa.chunked_array([column, nulls] if missing else [column], type=column.type))
    return table


def stream_of(tables: Iterable[Any], schema: Any) -> Any:
    """A RecordBatchReader of pyarrow Tables of one schema that are made while they are read."""
    import pyarrow as pa

    return pa.RecordBatchReader.from_batches(schema, (batch for table in tables for batch in table.to_batches()))
