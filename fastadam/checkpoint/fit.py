"""A checkpoint beside an optimizer: which tensor goes where, and what does not fit."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..state.param_state import ParamState
from ..state.roles import PARAM
from ..state.state_dict import group_mismatches, import_options
from .description import Checkpoint, Key, checked_key

if TYPE_CHECKING:
    from ..adam import Adam

Rename: TypeAlias = Mapping[Any, Any] | Callable[[Any], Any] | None


class Fit:
    """What of a file is to be loaded into an optimizer, and why it cannot be.

    Attributes
    ----------
    wrong : list of str
        Every mismatch.
    hint : str
        What to do about it.
    keys : dict
        What the parameters that are loaded are called in the file, by what
        they are called in the optimizer.
    tensors : list of (array, str)
        The optimizer's arrays that are written, and the file's tensors for them.
    options, settings
        As in `LoadedState`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        opt: "Adam",
        rename: Rename,
        *,
        params: bool,
        state: bool,
        hyperparameters: bool,
        partial: bool,
    ) -> None:
        self._file, self._opt, self._partial = checkpoint, opt, partial
        self._contents = opt._contents()
        self.wrong: list[str] = []
        self.hint = ""
        self.tensors: list[tuple[Any, str]] = []
        self.options: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.keys = self._pair(rename)
        self._has_params = any(name.startswith(f"{PARAM}/") for name in checkpoint.tensors)
        if params and self.keys and not self._has_params:
            self.wrong.append("the file has no parameters: load with params=False")
        if state:
            self._check_kinds()
        states = [s for s in self._contents.states if s.key in self.keys]
        for each in states:
            self._take(each, params, state)
        if hyperparameters:
            self._take_options()
            self._take_settings()

    def _pair(self, rename: Rename) -> dict[Key, Key]:
        if isinstance(rename, Mapping):
            absent = [key for key in rename if key not in self._file.steps]
            self._note(absent, "rename has {}, which the file has not")
        renamed = {key: _renamed(key, rename) for key in self._file.steps}
        kept = {key: new for key, new in renamed.items() if new is not None}
        twice = [key for key, count in Counter(kept.values()).items() if count > 1]
        self._note(twice, "rename makes {} of several parameters")
        found = {new: key for key, new in kept.items()}
        own = [state.key for state in self._contents.states]
        missing = [key for key in own if key not in found]
        known = set(own)
        unknown = [key for key in found if key not in known]
        if not self._partial or len(missing) == len(own) > 0:
            self._note(missing, "the file has no {}")
            self._note(unknown, "the file has {}, which the optimizer has not")
            if self.wrong:
                self.hint = " (rename= maps names, partial=True takes what both have)"
        return {key: found[key] for key in own if key in found}

    def _note(self, keys: Iterable[Any], text: str) -> None:
        names = ", ".join(map(_called, keys))
        if names:
            self.wrong.append(text.format(names))

    def _check_kinds(self) -> None:
        """Compare what there is to a parameter in either."""
        file, opt = self._file, self._opt
        if file.amsgrad != opt.amsgrad:
            self.wrong.append(f"amsgrad is {file.amsgrad} in the file, not {opt.amsgrad}")
        if (file.ema_decay is None) != (opt.ema_decay is None) and not self._partial:
            self.wrong.append(f"ema_decay is {file.ema_decay} in the file, not {opt.ema_decay}")

    def _take(self, state: ParamState, params: bool, moments: bool) -> None:
        """Find the tensors for a parameter and its state."""
        wanted = state.arrays(param=True)
        kinds = [kind for kind in wanted if (params if kind == PARAM else moments)]
        different = []
        for kind in kinds:
            target, name = wanted[kind], f"{kind}/{self.keys[state.key]}"
            if kind == "ema" and name not in self._file.tensors and self._partial:
                if not params:
                    continue  # its own
                name = f"{PARAM}/{self.keys[state.key]}"  # it begins as a copy of them
            if isinstance(target, np.ndarray) and not target.flags.writeable:
                self.wrong.append(f"{kind} of {state.key!r} is read-only in the optimizer")
            if name in self._file.tensors:
                dtype, shape = self._file.tensors[name]
                if (dtype, shape) != (target.dtype, target.shape):
                    different.append(
                        f"{dtype.name} {shape} in the file, not {target.dtype.name} {target.shape}"
                    )
                self.tensors.append((target, name))
            elif kind not in ("max_exp_avg_sq", "ema") and (  # those are told already
                kind != PARAM or self._has_params
            ):
                self.wrong.append(f"the file has no {name!r}")
        for text in dict.fromkeys(different):
            self.wrong.append(f"{state.key!r} is {text}")

    def _take_options(self) -> None:
        places = {key: own for own, key in self.keys.items()}
        groups = [
            {**group, "params": [places[key] for key in group["params"] if key in places]}
            for group in self._file.param_groups
        ]
        states, own = self._contents.states, self._contents.options
        if not self.hint or len(groups) != len(own):  # else it is told already
            self.wrong += group_mismatches(groups, states, len(own))
        if not self.wrong:
            try:
                self.options = import_options(groups, states, "param_groups")
            except ValueError as error:  # not in the range of the parameters' dtype
                self.wrong.append(str(error))

    def _take_settings(self) -> None:
        file, opt = self._file, self._opt
        self.settings = {"_max_grad_norm": file.max_grad_norm, "_nonfinite": file.nonfinite}
        if not isinstance(file.schedule, str):
            self.settings["_schedule"] = file.schedule
        elif opt.schedule is None:
            text = f"schedule was {file.schedule:.60}, which the optimizer must be given"
            self.wrong.append(text)
        if file.ema_decay != opt.ema_decay and None not in (file.ema_decay, opt.ema_decay):
            self.wrong.append(f"ema_decay is {file.ema_decay} in the file, not {opt.ema_decay}")


def _called(key: Any) -> str:
    """Return what a parameter is called in a message: its name, or its place."""
    return f"parameter {key}" if isinstance(key, int) else repr(key)


def _renamed(key: Key, rename: Rename) -> Key | None:
    if rename is None:
        return key
    new = rename.get(key, key) if isinstance(rename, Mapping) else rename(key)
    return None if new is None else checked_key(new)
