"""Schedules as plain data, to be kept in files."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .. import schedules
from .base import Base, Schedule

_KINDS = {
    name: kind
    for name in schedules.__all__
    if isinstance(kind := getattr(schedules, name), type) and issubclass(kind, Base)
}


def to_plain(schedule: Schedule | None) -> Any:
    """Return what `from_plain` makes the same schedule of.

    Raises
    ------
    TypeError
        If it is, or holds, another callable than those of `fastadam.schedules`.
    """
    if schedule is None:
        return None
    kind = type(schedule)
    if _KINDS.get(kind.__name__) is not kind:
        raise TypeError(f"schedule must be one of fastadam.schedules, got {schedule!r}")
    arguments = {field.name: getattr(schedule, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return {"name": kind.__name__, **{name: _plain(value) for name, value in arguments.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return to_plain(value) if callable(value) else value


def from_plain(plain: Any) -> Schedule | None:
    """Return the schedule of which `to_plain` made this.

    Raises
    ------
    TypeError, ValueError, LookupError
        If it is nothing that `to_plain` returns.
    """
    if plain is None:
        return None
    arguments = {name: _made(value) for name, value in plain.items() if name != "name"}
    kind: Any = _KINDS[plain["name"]]
    if kind is schedules.chain:
        return schedules.chain(*arguments["parts"], arguments["last"])
    return kind(**arguments)  # type: ignore[no-any-return]


def _made(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_made(item) for item in value)
    return from_plain(value) if isinstance(value, Mapping) else value
