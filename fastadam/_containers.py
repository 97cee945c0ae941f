"""The containers that parameters and gradients come in: array, sequence, mapping, groups."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


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
        if isinstance(params, np.ndarray):
            self.single = True
            self.arrays: list[Any] = [params]
        elif isinstance(params, Mapping):
            self.names, self.arrays = list(params), list(params.values())
            self._known = set(self.names)
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
                f" {type(params).__qualname__}"
            )

    def labels(self, label: str) -> list[str]:
        """Return how each array is called in messages."""
        if self.single:
            return [label]
        keys = range(len(self.arrays)) if self.names is None else self.names
        return [f"{label}[{key!r}]" for key in keys]

    def flatten(self, grads: Any, label: str) -> list[Any]:
        """Return the gradients in the order of the parameters.

        Raises
        ------
        TypeError
            If they come in another kind of container.
        ValueError
            If their number or their names are not the parameters'.
        """
        if self.single:
            return [grads]
        if self.names is not None:
            if not isinstance(grads, Mapping):
                raise TypeError(
                    f"{label} must be a mapping by name, as params is, got"
                    f" {type(grads).__qualname__}"
                )
            if grads.keys() == self._known:
                return [grads[name] for name in self.names]
            missing = [name for name in self.names if name not in grads]
            unknown = [name for name in grads if name not in self._known]
            raise ValueError(
                f"{label} must have the names of params (None where there is no gradient),"
                f" got {len(missing)} missing {missing[:5]} and {len(unknown)} unknown"
                f" {unknown[:5]}"
            )
        refused = (Mapping, str, bytes, set, np.ndarray)
        if isinstance(grads, refused) or not isinstance(grads, Iterable):
            raise TypeError(
                f"{label} must be a sequence, as params is, got {type(grads).__qualname__}"
            )
        flat = list(grads)
        if len(flat) != len(self.arrays):
            raise ValueError(
                f"{label} must have {len(self.arrays)} entries (None where there is no"
                f" gradient), got {len(flat)}"
            )
        return flat
