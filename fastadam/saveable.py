"""What is kept of an optimizer: its state_dict, checkpoints, pickles and deep copies."""

import sys
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import backends
from .params.groups import Groups, ParamGroup
from .runtime import Unchanged, kernel_lock, register_after_fork, signals_deferred
from .state.param_state import ParamState, by_group, rehouse
from .state.state_dict import LoadedState, export_state, import_state
from .state.torch_load import allow_arrays_in_torch_load


class Contents(NamedTuple):
    """The parameters of an optimizer with their state, each group's options, each one's steps."""

    states: list[ParamState]
    options: list[ParamGroup]
    steps: npt.NDArray[np.int64]


class Saveable:
    """The part of `Adam` that gives its state away and takes it over.

    Beside the public methods, the rest of the package uses `_turn`, `_contents`,
    `_take_over` and `_export_state`, and `runtime.Unchanged` uses `_version` and `_copies`.
    """

    _groups: Groups
    _stepper: backends.Stepper
    _lock: threading.Lock
    _loads = 0  # how often a state was taken over

    @property
    def _backend(self) -> backends.Backend:
        return backends.of(self._groups.arrays)

    @property
    def step_count(self) -> int:
        """Steps taken so far, without those skipped: what the schedule is asked for next."""
        return int(self._stepper.step_count[0])

    def _install(self, groups: Groups, steps: Any, step_count: int) -> None:
        """Make what takes the steps; raise before anything is replaced."""
        raise NotImplementedError

    @property
    def state(self) -> dict[int | str, dict[str, Any]]:
        """What `state_dict` holds of each parameter, by name or place; the arrays are live."""
        states, steps = self._groups.states, self._stepper.steps
        return {
            state.key: {"step": int(step), **state.own}
            for state, step in zip(states, steps, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: what the constructor's arguments do not say.

        Returns
        -------
        dict
            ``"state"``: by name, or by place where there are no names, a dict
            with ``"step"`` (int), ``"exp_avg"``, ``"exp_avg_sq"`` and, where
            they are kept, ``"max_exp_avg_sq"`` and ``"ema"`` (arrays of the
            parameter's shape and dtype); ``"param_groups"``: the
            hyperparameters, with the names or places as ``"params"``;
            ``"step_count"`` (int).

        Raises
        ------
        RuntimeError
            If a step is under way.

        Examples
        --------
        >>> import numpy as np, fastadam
        >>> opt = fastadam.Adam({"w": np.zeros(2)})
        >>> _ = opt.step({"w": np.ones(2)})
        >>> opt.state_dict()["state"]["w"]["exp_avg"]
        array([0.1, 0.1])
        """
        allow_state_in_torch_load()
        with lock_if_free(self._lock):
            return self._export_state()

    def _export_state(self) -> dict[str, Any]:
        groups = self._groups
        return export_state(
            groups.states,
            self._stepper.steps,
            groups.options,
            self.step_count,
            self._backend.to_host,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state that `state_dict` returned, by name where there are names.

        Copies into the optimizer's own arrays; parameters are not touched.

        Raises
        ------
        TypeError, ValueError
            If names, shapes, dtypes, groups or hyperparameters do not fit, with
            every mismatch in the message. The optimizer is then as it was.
        RuntimeError
            If a step is under way.

        Examples
        --------
        >>> import numpy as np, fastadam
        >>> old = fastadam.Adam({"w": np.zeros(2)})
        >>> _ = old.step({"w": np.ones(2)})
        >>> new = fastadam.Adam({"w": np.zeros(2)})
        >>> new.load_state_dict(old.state_dict())
        >>> new.step_count, new.state["w"]["step"]
        (1, 1)
        """
        with lock_if_free(self._lock):
            groups = self._groups
            loaded = import_state(
                state_dict, groups.states, groups.options, backends.as_host, backends.as_array
            )
            self._take_over(loaded)

    def _turn(self) -> threading.Lock:
        """Return the lock to be held while the contents are used, unless a step is under way."""
        return lock_if_free(self._lock)

    def _contents(self) -> Contents:
        """Return what a checkpoint is made of: live arrays and options, a copy of the steps."""
        return Contents(self._groups.states, self._groups.options, self._stepper.steps)

    def _take_over(self, loaded: LoadedState) -> None:
        """Write all of a state that fits, or nothing, whatever signals arrive."""
        backend, stepper = self._backend, self._stepper
        with kernel_lock, signals_deferred():
            self._loads += 1
            while loaded.targets:  # each source is let go as soon as it is written
                backend.assign(loaded.targets.pop(), loaded.sources.pop())
            stepper.steps, stepper.step_count[0] = loaded.steps, loaded.step_count
            # No options at all: they stay as they are.
            for options, new in zip(self._groups.options, loaded.options, strict=False):
                options.update(new)
            for name, value in loaded.settings.items():
                setattr(self, name, value)

    def _version(self) -> tuple[Any, ...]:
        """Return a value that differs after every step and load; raise in the middle of one."""
        lock_if_free(self._lock)
        return self._stepper, self.step_count, self._loads

    def _copies(self, memo: Mapping[int, Any]) -> Iterable[tuple[Any, Any]]:
        """Return the parameters that `copy.deepcopy` has copied, and their copies."""
        params = [state.param for state in self._groups.states]
        return [(param, memo[id(param)]) for param in params if id(param) in memo]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds addresses: a copy must not write to the original's arrays."""
        self._backend.check_copyable()
        unchanged = Unchanged(self)
        left_out = ("_lock", "_stepper", "_scalars", "_flatten", "_grads", "_own_grads")
        kept = {name: value for name, value in vars(self).items() if name not in left_out}
        counts = {"steps": self._stepper.steps, "step_count": self.step_count}
        return {**kept, **counts, "unchanged": unchanged}  # to be copied last

    def __setstate__(self, kept: dict[str, Any]) -> None:
        """Find the arrays of the copy where they lie now."""
        steps, step_count = kept.pop("steps"), kept.pop("step_count")
        kept.pop("unchanged", None)
        vars(self).update(kept)
        groups = self._groups
        for members in by_group(groups.states, len(groups.options)):
            rehouse(members, groups.state_options, self._backend)
        self._install(self._groups, steps, step_count)
        self._lock = threading.Lock()
        register_after_fork(self)

    def __copy__(self) -> "Saveable":
        raise TypeError("copy.copy would share params and state: use copy.deepcopy")


def allow_state_in_torch_load() -> None:
    """Have ``torch.load`` take a state_dict, in a program that uses torch."""
    if "torch" in sys.modules:
        allow_arrays_in_torch_load()


def lock_if_free(lock: threading.Lock) -> threading.Lock:
    """Return an optimizer's lock, for a with statement to hold; raise if it is held already.

    The lock itself, since Python cannot be interrupted between its being taken
    and the with statement's knowing so.

    Raises
    ------
    RuntimeError
        Rather than wait: it may be the step's own schedule that asks.
    """
    if lock.locked():
        raise RuntimeError(
            "an optimizer must not be used in the middle of its own step, save or load"
        )
    return lock
