"""The exceptions that longlens raises.

    LonglensError
    |-- InputError (ValueError)           a shape, length, value or device that does not fit
    |   |-- MaskError                     a mask, packing or bias that does not fit
    |   |-- MethodError                   a method name or parameter that does not exist
    |   |-- SequenceError                 a residue or record that cannot be read
    |   |   `-- TruncatedInputError       compressed input that is cut off; says how much was read before
    |   |   `-- VariantError              a variant that cannot be scored; `reason` says why in a few words
    |   `-- CheckpointError               weights that are not those of the model
    |-- LensError (RuntimeError)          weights rebuilt by the lens are not those that the model used
    |-- DtypeError (TypeError)            dtypes that differ or are not served
    `-- UnsupportedError (NotImplementedError)   the method cannot do what was asked; says why, and who can

`LonglensWarning` (UserWarning) tells of doubtful input. Every message says what was expected, what was given and what
to do. An unknown keyword is Python's own `TypeError`.
"""

from __future__ import annotations

from typing import Any


class LonglensError(Exception):
    """Base of every error raised on purpose by longlens."""


class InputError(LonglensError, ValueError):
    """A shape, length, value or device that does not fit."""


class MaskError(InputError):
    """A mask, packing or bias that does not fit."""


class MethodError(InputError):
    """A method name or parameter that does not exist."""


class SequenceError(InputError):
    """A residue or record that cannot be read."""


class TruncatedInputError(SequenceError):
    """Compressed input that is cut off or broken; `records` and `residues` were read before, whole."""

    def __init__(self, message: str, *, records: int, residues: int) -> None:
        super().__init__(message)
        self.records = records
        self.residues = residues

    def __reduce__(self) -> tuple[Any, ...]:
        # an exception is unpickled from its arguments, which cannot be keywords; its attributes follow
        return _truncated, (str(self), self.records, self.residues)


def _truncated(message: str, records: int, residues: int) -> TruncatedInputError:
    return TruncatedInputError(message, records=records, residues=residues)


class VariantError(SequenceError):
    """A variant that cannot be read or scored; `reason` says why in a few words, for a column of a table."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[VariantError], tuple[str, str]]:
        # so that it can be pickled: an exception is rebuilt from its arguments
        return VariantError, (str(self), self.reason)


class CheckpointError(InputError):
    """Weights that are not those of the model."""


class LonglensWarning(UserWarning):
    """A doubtful input or result; on the command line a line on standard error."""


class LensError(LonglensError, RuntimeError):
    """The weights that the lens rebuilt are not those that the model used."""


class DtypeError(LonglensError, TypeError):
    """Dtypes that differ, or that are not served."""


class UnsupportedError(LonglensError, NotImplementedError):
    """The method cannot do what was asked.

    The message names the method, the inputs, each reason, and the methods that can.
    """
