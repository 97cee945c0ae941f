"""Unknown names of arguments and attributes: the error says which was probably meant."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from .hyperparameters import NAMES

# Names in other libraries and papers, and the name here.
_MEANT = {
    "alpha": "lr",
    "learning_rate": "lr",
    "step_size": "lr",
    "b1": "betas",
    "b2": "betas",
    "beta": "betas",
    "beta1": "betas",
    "beta2": "betas",
    "beta_1": "betas",
    "beta_2": "betas",
    "epsilon": "eps",
    "decay": "weight_decay",
    "decoupled": "decoupled_weight_decay",
    "l2": "weight_decay",
    "wd": "weight_decay",
    "clip": "max_grad_norm",
    "clip_grad": "max_grad_norm",
    "clip_grad_norm": "max_grad_norm",
    "clip_norm": "max_grad_norm",
    "clipnorm": "max_grad_norm",
    "global_clipnorm": "max_grad_norm",
    "max_norm": "max_grad_norm",
    "ema": "ema_decay",
    "ema_momentum": "ema_decay",
    "lr_schedule": "schedule",
    "lr_scheduler": "schedule",
    "scheduler": "schedule",
    "n_threads": "num_threads",
    "nthreads": "num_threads",
    "threads": "num_threads",
}

# Attributes of an optimizer that only its constructor can set.
_FIXED = ("params", "amsgrad", "ema_decay")

_F = TypeVar("_F", bound=Callable[..., Any])


def suggestion(name: object, known: Iterable[str]) -> str:
    """Return the end of a message: the known name that was probably meant, or nothing."""
    meant = _meant(name, list(known))
    return "" if meant is None else f"; did you mean {meant!r}?"


def _meant(name: object, known: list[str]) -> str | None:
    other = _MEANT.get(str(name).lower())
    if other in known:
        return other
    from difflib import get_close_matches  # only an error needs it

    return next(iter(get_close_matches(str(name).lower(), known, 1)), None)


def check_keywords(like: Callable[..., Any] | None = None) -> Callable[[_F], _F]:
    """Decorate a function: for an unknown keyword, its error names the one probably meant.

    A call takes a microsecond longer. With ``like``, the known keywords are
    those of that other function.
    """

    def decorate(function: _F) -> _F:
        known = list(inspect.signature(like or function).parameters)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name not in known:
                    raise TypeError(
                        f"{function.__qualname__}() got an unexpected keyword argument"
                        f" {name!r}{suggestion(name, known)}"
                    )
            return function(*args, **kwargs)

        return cast("_F", call)

    return decorate


class Absent:
    """An attribute that does not exist, whose error says what to use instead.

    ``__getattr__`` could do the same, but would make every other attribute
    of the class slower to find.
    """

    def __init__(self, hint: str) -> None:
        self._hint = hint

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    def __get__(self, opt: Any, kind: type) -> Any:
        raise AttributeError(
            f"{kind.__name__} has no attribute {self._name!r}; {self._hint}", name=self._name
        )


def check_attribute(kind: type, name: str) -> None:
    """Refuse to set an attribute that a class does not have, or that cannot be set.

    Raises
    ------
    AttributeError
        The message names the attribute that was probably meant.
    """
    found = getattr(kind, name, None)
    if isinstance(found, property) and found.fset is None:
        hint = "; give it to the constructor" if name in _FIXED else ""
        raise AttributeError(f"{kind.__name__}.{name} cannot be set{hint}")
    if found is not None:
        return
    if name.startswith("_") or name in kind.__annotations__:
        return
    if name in _FIXED:
        raise AttributeError(
            f"{kind.__name__} has no attribute {name!r} to set; give it to the constructor"
        )
    public = [known for known in dir(kind) if not known.startswith("_")]
    meant = _meant(name, [*public, *NAMES])
    hint = "" if meant is None else f"; did you mean {meant!r}?"
    if meant in NAMES and meant not in public:
        hint = f'; it is set by group, as in opt.param_groups[0]["{meant}"] = value'
    raise AttributeError(f"{kind.__name__} has no attribute {name!r} to set{hint}")
