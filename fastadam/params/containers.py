"""The containers that parameters and gradients come in: array, sequence, mapping, groups."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import is_not, itemgetter
from typing import Any

from .arrays import hint
from .kinds import is_array


class FixedSequence(tuple[Any, ...]):
    """Arrays to be written to, not replaced; ``arrays[0] += 1`` is allowed."""

    __slots__ = ()

    def __setitem__(self, place: Any, value: Any) -> None:
        check_same(self[place], value, f"entry {place!r}")


class FixedMapping(Mapping[str, Any]):
    """The same by name."""

    def __init__(self, items: Iterable[tuple[str, Any]]) -> None:
        self._arrays = dict(items)

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __setitem__(self, name: str, value: Any) -> None:
        check_same(self._arrays[name], value, f"entry {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return repr(self._arrays)


def check_same(array: Any, value: Any, label: str) -> None:
    """Refuse to replace an array; let pass what an augmented assignment assigns.

    Raises
    ------
    TypeError
        If the value is another object.
    """
    if value is not array:
        raise TypeError(
            f"{label} must stay the object it is, got {type(value).__qualname__}; to change an"
            f" array, write into it, as in array[...] = values"
        )


_NO_GRADIENT = (
    "has the backward function returned nothing? (In torch, .grad is None before backward() and"
    " after zero_grad().)"
)


def check_any_given(grads: tuple[Any, ...]) -> None:
    """Refuse gradients that are all None: no step would be taken, and no one would know.

    Raises
    ------
    ValueError
        If they are.
    """
    if not any(map(is_not, grads, repeat(None))):
        each = "the one parameter" if len(grads) == 1 else f"all {len(grads)} parameters"
        raise ValueError(
            f"at least one gradient must be given, got None for {each}; {_NO_GRADIENT}"
        )


def check_given(grads: Any, label: str) -> None:
    """Refuse None in the place of a container.

    Raises
    ------
    ValueError
        If it is None.
    """
    if grads is None:
        raise ValueError(
            f"{label} must have a gradient for each parameter, in the container that params is,"
            f" got None; {_NO_GRADIENT}"
        )


def grads_hint(grads: Any) -> str:
    """Return the end of a message: what to give in the place of what are no gradients."""
    if callable(getattr(type(grads), "grads", None)):
        return "; give what its .grads() returns"
    return "; give what it returns" if callable(grads) else ""


class Container:
    """The shape in which one group's parameters came, and in which its gradients must come.

    Raises
    ------
    TypeError
        If ``params`` is neither an array, nor a mapping, nor an iterable.
    """

    def __init__(self, params: Any, label: str) -> None:
        self.names: list[str] | None = None
        self.single = False
        if is_array(params):
            self.single = True
            self.arrays: list[Any] = [params]
        elif isinstance(params, Mapping):
            self.names, self.arrays = list(params), list(params.values())
            for name in self.names:
                if not isinstance(name, str):
                    raise TypeError(f"{label} must be keyed by str, got key {name!r}")
        elif isinstance(params, Iterable) and not isinstance(params, str | bytes | set):
            # Arrays of other libraries are iterable too: they are one array, not rows.
            self.single = hasattr(params, "dtype") and hasattr(params, "shape")
            self.arrays = [params] if self.single else list(params)
        else:
            raise TypeError(
                f"{label} must be an array, a sequence or a mapping of arrays, got"
                f" {type(params).__qualname__}{hint(params)}"
            )

    def labels(self, label: str) -> list[str]:
        """Return how each array is called in messages."""
        if self.single:
            return [label]
        keys = range(len(self.arrays)) if self.names is None else self.names
        return [f"{label}[{key!r}]" for key in keys]

    def wrap(self, arrays: Sequence[Any]) -> Any:
        """Return other arrays in such a container, whose arrays cannot be replaced."""
        if self.single:
            return arrays[0]
        if self.names is not None:
            return FixedMapping(zip(self.names, arrays, strict=True))
        return FixedSequence(arrays)

    def flatten(self, grads: Any, group: int | None = None) -> tuple[Any, ...]:
        """Return the gradients in the order of the parameters, in a tuple of our own.

        ``group`` is the number of the group, for messages, where there are several.

        Raises
        ------
        TypeError
            If they come in another kind of container.
        ValueError
            If their number or their names are not the parameters'.
        """
        # First what is usual, in as few steps of Python as can be.
        if type(grads) is list or type(grads) is tuple:
            if self.names is None and not self.single and len(grads) == len(self.arrays):
                return tuple(grads)
        elif self.single:
            return (grads,)
        elif self.names and type(grads) is dict and len(grads) == len(self.names):
            try:
                values = itemgetter(*self.names)(grads)
            except KeyError:
                pass  # the message comes below
            else:
                return values if len(self.names) > 1 else (values,)
        return self._flatten_with_care(grads, "grads" if group is None else f"grads[{group}]")

    def _flatten_with_care(self, grads: Any, label: str) -> tuple[Any, ...]:
        if self.single:
            return (grads,)
        check_given(grads, label)
        if self.names is not None:
            if not isinstance(grads, Mapping):
                raise TypeError(
                    f"{label} must be a mapping by name, as params is, got"
                    f" {type(grads).__qualname__}{grads_hint(grads)}"
                )
            if grads.keys() == set(self.names):
                return tuple(grads[name] for name in self.names)
            missing = [name for name in self.names if name not in grads]
            unknown = [name for name in grads if name not in self.names]
            wrong = [
                f"{what} {_listed(names)}"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            ]
            raise ValueError(
                f"{label} must have the names of params (None where there is no gradient):"
                f" {'; '.join(wrong)}"
            )
        refused = (Mapping, str, bytes, set)
        if is_array(grads) or isinstance(grads, refused) or not isinstance(grads, Iterable):
            raise TypeError(
                f"{label} must be a sequence, as params is, got"
                f" {type(grads).__qualname__}{grads_hint(grads)}"
            )
        flat = tuple(grads)
        if len(flat) != len(self.arrays):
            raise ValueError(
                f"{label} must have {len(self.arrays)} entries (None where there is no"
                f" gradient), got {len(flat)}"
            )
        return flat


def _listed(names: Sequence[Any]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
