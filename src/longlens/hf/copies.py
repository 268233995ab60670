"""The marks of an attachment on a model, in a form that copies of the model do not share.

A copy of an attached model (`copy.deepcopy`, `pickle`, `torch.save`, its configuration) is not attached: it runs on the
attention that the model had before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self
from weakref import ref


class AttachedName(str):
    """The name of an attachment's attention function in a configuration. `before`: the name that it replaced."""

    before: str | None
    attachment: ref[Any]

    def __new__(cls, name: str, before: str | None, attachment: object) -> Self:
        instance = super().__new__(cls, name)
        instance.before, instance.attachment = before, ref(attachment)
        return instance

    def restored(self) -> str | None:
        """The name of the last earlier attachment that is still attached, or the name before all attachments."""
        before = self.before
        while isinstance(before, AttachedName):
            outer = before.attachment()
            if outer is not None and outer.attached:
                break
            before = before.before
        return before

    def __copy__(self) -> Any:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.before.__deepcopy__(memo) if isinstance(self.before, AttachedName) else self.before

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain, (self.__deepcopy__({}),)


class ForwardHook:
    """A hook on a module of an attached model; in a copy it does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return do_nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _get_nothing, ()


def do_nothing(*args: Any) -> None:
    """Takes the place of a hook in a copy, and does nothing."""


def _get_nothing() -> Callable[..., None]:
    return do_nothing


def _plain(name: str | None) -> str | None:
    return name
