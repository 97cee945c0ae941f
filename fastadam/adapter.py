"""Optimizers around an `Adam`, for parameters that are kept in something other than arrays."""

import threading
from typing import Any

from .adam import Adam
from .saveable import lock_if_free


class Adapter:
    """An optimizer with an `Adam` inside, and an owner of parameters outside.

    `save`, `load` and `compile` take every adapter, and know none: they work on
    the `Adam` inside, and call these methods. An adapter for one kind of owner is
    a class derived from this one, which by itself stands for no owner at all.

    Attributes
    ----------
    optimizer : Adam
        The optimizer inside.
    """

    optimizer: Adam

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def _turn(self) -> threading.Lock:
        """Return a lock to be held while the adapter is used, as `Adam._turn`."""
        return lock_if_free(self._lock)

    def _check(self) -> None:
        """Refuse an owner whose arrays are not those that the optimizer updates.

        Raises
        ------
        ValueError
            The optimizer is then as it was.
        """

    def _pull(self) -> None:
        """Do the same, and read the owner's values into the optimizer's arrays.

        Raises
        ------
        TypeError, ValueError
            If the owner has something else now. The optimizer is then as it was.
        """

    def _push(self) -> None:
        """Write the values of the optimizer's arrays to the owner."""


def adapter_of(opt: Any) -> Adapter:
    """Return an optimizer as an adapter; around `Adam`, one that does nothing.

    Raises
    ------
    TypeError
        If it is no optimizer.
    """
    if isinstance(opt, Adapter):
        return opt
    if not isinstance(opt, Adam):
        advice = ""
        if type(opt).__module__.startswith("fastadam.torch"):
            advice = (
                " of fastadam.torch; it compiles in its first step, and is saved by torch.save"
            )
        raise TypeError(
            f"opt must be an optimizer of fastadam's, got {type(opt).__qualname__}{advice}"
        )
    adapter = Adapter()
    adapter.optimizer = opt
    return adapter
