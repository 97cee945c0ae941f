"""Between fastadam and torch: state in both directions, and parameters on the CPU.

Once this module is imported, ``torch.load(weights_only=True)``, torch's default, takes
NumPy arrays: those of a ``state_dict`` that ``torch.save`` has written.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from ..adam import Adam
from ..params import checks, hyperparameters

__all__ = ["CPUParams", "from_torch", "to_torch"]

# What torch.optim.Adam's groups hold beside fastadam's hyperparameters: as torch makes them.
_TORCHS_OWN = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
_LARGEST = "max_exp_avg_sq"
# torch counts in float32, where adding 1 to this leaves it as it is.
_LAST_STEP = 2**24
# So that each hyperparameter is checked whatever the others are.
_VALID = {
    "lr": 0.0,
    "betas": (0.0, 0.0),
    "eps": 0.0,
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
    "maximize": False,
}


def __dir__() -> list[str]:
    return sorted(__all__)


@functools.cache
def have_torch_load_arrays() -> None:
    """Add what a pickled array of float32 or float64 is made of to what torch loads."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: a library of torch's is missing
        return
    rebuild: Any = np.zeros(0).__reduce__()[0]
    dtypes = [type(np.dtype(name)) for name in ("float32", "float64")]
    # Of torch 2.4; older ones need none.
    add: Any = getattr(getattr(torch, "serialization", None), "add_safe_globals", None)
    if add is not None:
        add([rebuild, np.ndarray, np.dtype, *dtypes])


have_torch_load_arrays()


class CPUParams:
    """Parameters of a torch module on the CPU, as arrays that fastadam updates.

    Torch's parameters and these arrays share memory. The arrays hold on to
    where a parameter lay when this was made, and torch may give it other memory
    later: ``param.data = other``, ``module.to(...)`` and ``module.half()`` do.
    `grads` then raises, rather than let the optimizer go on in the old memory.

    Parameters
    ----------
    named_parameters : iterable of (str, tensor), or mapping
        As of ``module.named_parameters()``.

    Attributes
    ----------
    arrays : dict
        The parameters by name: what to give to `Adam`.

    Raises
    ------
    TypeError
        If there are no names, as of ``module.parameters()``.
    ValueError
        If a parameter is not on the CPU. (`Adam` takes CUDA tensors as they
        are.)

    Examples
    --------
    >>> import torch, fastadam                            # doctest: +SKIP
    >>> from fastadam.torch import CPUParams
    >>> model = torch.nn.Linear(3, 1)                     # doctest: +SKIP
    >>> params = CPUParams(model.named_parameters())      # doctest: +SKIP
    >>> opt = fastadam.Adam(params.arrays)                # doctest: +SKIP
    >>> model(torch.ones(3)).sum().backward()             # doctest: +SKIP
    >>> opt.step(params.grads()).step                     # doctest: +SKIP
    0
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Any]] | Mapping[str, Any]) -> None:
        given: Any = named_parameters
        pairs = list(given.items() if isinstance(given, Mapping) else _entries(given))
        for pair in pairs:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise TypeError(_NAMED.format(f"a {type(pair).__qualname__} in it"))
        self._tensors = dict(pairs)
        for name, tensor in self._tensors.items():
            if tensor.device.type != "cpu":
                raise ValueError(f"{name!r} must be on the CPU, got one on {tensor.device}")
        self._places = {name: tensor.data_ptr() for name, tensor in self._tensors.items()}
        self.arrays = {name: tensor.detach().numpy() for name, tensor in self._tensors.items()}

    def grads(self) -> dict[str, npt.NDArray[Any] | None]:
        """Return every parameter's ``.grad`` as an array that shares its memory.

        Returns
        -------
        dict
            The gradients by name, None where torch has none: what to give to
            `Adam.step`.

        Raises
        ------
        ValueError
            If a parameter has been given other memory.
        """
        grads: dict[str, npt.NDArray[Any] | None] = {}
        for name, tensor in self._tensors.items():
            if tensor.data_ptr() != self._places[name]:
                raise ValueError(
                    f"{name!r} must keep the memory that it had when CPUParams was made, got"
                    f" other memory; param.data = other, module.to() and the like replace it:"
                    f" copy with param.data.copy_(other), or make CPUParams and the optimizer anew"
                )
            grad = tensor.grad
            grads[name] = None if grad is None else grad.numpy()
        return grads


_NAMED = "named_parameters must be pairs of name and tensor, got {}; give model.named_parameters()"


def _entries(given: Any) -> Iterable[Any]:
    # A module may be iterable, too.
    if hasattr(given, "named_parameters") or not isinstance(given, Iterable):
        raise TypeError(_NAMED.format(type(given).__qualname__))
    return given


def to_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state in the form that torch loads.

    Parameters are numbered in the order of the groups' ``"params"``; torch's
    optimizer must be given them in that order. Load what has decoupled
    decay, or none, into ``torch.optim.AdamW`` or ``Adam``, and L2 decay into
    ``Adam`` alone: ``AdamW`` decouples whatever it loads.

    torch has no place for the averages (``"ema"``) nor for ``"step_count"``.
    ``"lr"`` is the one before the schedule; a scheduler of torch's has to be
    brought to the same step by itself.

    torch's ``foreach``, ``capturable``, ``differentiable`` and ``fused`` are
    at their defaults, which loading puts in the place of the optimizer's own:
    set them in the groups returned, before they are loaded. Fused kernels of
    torch's take it for granted that state lies in memory as its parameter
    does; here it lies as fastadam's parameter does.

    Parameters
    ----------
    state_dict : mapping
        What `Adam.state_dict` returned.

    Returns
    -------
    dict
        For ``load_state_dict`` of ``torch.optim.Adam`` or ``AdamW``, on the
        CPU, sharing no memory with the argument. Parameters that have had no
        gradient yet have no state, as in torch.

    Raises
    ------
    TypeError
        If the argument or its parts are no such mapping or list.
    ValueError
        If anything in it is missing or out of range, or if a parameter has had
        more than 2**24 steps: torch counts them in float32, which holds no
        more. The message lists all that is wrong.
    ImportError
        If torch is not installed.

    Examples
    --------
    >>> import torch                                      # doctest: +SKIP
    >>> import numpy as np, fastadam
    >>> from fastadam.torch import to_torch
    >>> w = np.ones(2)
    >>> opt = fastadam.AdamW({"w": w})
    >>> _ = opt.step({"w": np.ones(2)})
    >>> weight = torch.nn.Parameter(torch.tensor(w))      # doctest: +SKIP
    >>> other = torch.optim.AdamW([weight])               # doctest: +SKIP
    >>> other.load_state_dict(to_torch(opt.state_dict())) # doctest: +SKIP
    >>> other.state[weight]["step"]                       # doctest: +SKIP
    tensor(1.)
    """
    torch = _import_torch()
    found, found_groups = _parts(state_dict, "state_dict")
    wrong: list[str] = []
    members = _members(found, found_groups, hyperparameters.NAMES, wrong)
    keys = [key for own in members for key in own]
    wrong += [f"state has no {key!r}" for key in keys if key not in found]
    entries = {key: found[key] for key in keys if isinstance(found.get(key), Mapping)}
    wrong += [
        f"state[{key!r}] is no mapping" for key in keys if key in found and key not in entries
    ]
    amsgrad = any(_LARGEST in entry for entry in entries.values())
    names = _moments(amsgrad)
    for key, entry in entries.items():
        wrong += _own_mismatches(entry, names, f"state[{key!r}]")
    options = [
        _checked(group, k, wrong) if isinstance(group, Mapping) else {}
        for k, group in enumerate(found_groups)
    ]
    if wrong:
        raise ValueError("state_dict must be one of fastadam.Adam's: " + "; ".join(wrong))

    state = {}
    for place, key in enumerate(keys):
        step, arrays = int(entries[key]["step"]), {n: np.asarray(entries[key][n]) for n in names}
        # torch makes state at the first gradient.
        if step > 0 or any(array.any() for array in arrays.values()):
            # torch's own step is on the CPU whatever the default device is.
            count = torch.tensor(float(step), dtype=torch.float32, device="cpu")
            state[place] = {"step": count} | {
                name: torch.from_numpy(array.copy("K")) for name, array in arrays.items()
            }
    param_groups, first = [], 0
    for group, own in zip(options, members, strict=True):
        places = list(range(first, first + len(own)))
        param_groups.append({**group, "amsgrad": amsgrad, **_TORCHS_OWN, "params": places})
        first += len(own)
    return {"state": state, "param_groups": param_groups}


def from_torch(torch_state_dict: Mapping[str, Any], opt: Adam) -> dict[str, Any]:
    """Return a torch optimizer's state in the form that fastadam loads.

    The file's parameters and `opt`'s are paired by their order, group by
    group; names in the file matter only where they are `opt`'s own in another
    order, which is refused. This needs no torch: tensors are whatever has
    ``.detach().cpu().numpy()``, or NumPy arrays.

    A parameter without state in the file gets zeros and step 0.
    ``"step_count"``, the schedule's next step, is the largest of the steps,
    and ``"ema"``, which torch lacks, `opt`'s own of now. Hyperparameters are
    the file's. Files of older versions of torch may lack
    ``decoupled_weight_decay``, then `opt`'s own, and ``maximize``, then False.

    Two things to know. After a scheduler of torch's, ``"lr"`` is the one with
    the scheduler's factor, and the one without it the group's
    ``"initial_lr"``: set ``opt.lr`` where `opt` has a schedule. And torch's
    own count of steps, in float32, stops at 2**24.

    Parameters
    ----------
    torch_state_dict : mapping
        What ``state_dict()`` of ``torch.optim.Adam`` or ``AdamW`` returned,
        from any device.
    opt : Adam
        The optimizer that is to load the state. It is not changed.

    Returns
    -------
    dict
        In the form of `Adam.state_dict`, sharing no memory with the arguments.

    Raises
    ------
    TypeError
        If ``torch_state_dict`` or its parts are no such mapping or list, or
        `opt` is no `Adam`.
    ValueError
        If the state does not fit `opt`: groups, parameters, shapes, dtypes,
        ``amsgrad``, steps, hyperparameters, missing keys. The message lists
        every mismatch.
    RuntimeError
        If a step of `opt` is under way.

    Examples
    --------
    With arrays in the place of tensors:

    >>> import numpy as np, fastadam
    >>> from fastadam.torch import from_torch
    >>> moments = {"exp_avg": np.full(2, 0.5), "exp_avg_sq": np.full(2, 0.1)}
    >>> group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8,
    ...          "weight_decay": 0.01, "amsgrad": False, "params": [0]}
    >>> saved = {"state": {0: {"step": 7.0, **moments}}, "param_groups": [group]}
    >>> opt = fastadam.AdamW({"w": np.ones(2)})
    >>> opt.load_state_dict(from_torch(saved, opt))
    >>> opt.state["w"]["step"], opt.lr
    (7, 0.001)
    """
    if not isinstance(opt, Adam):
        raise TypeError(f"opt must be a fastadam.Adam, got {type(opt).__qualname__}")
    found, found_groups = _parts(torch_state_dict, "torch_state_dict")
    # A copy in opt's own shapes, dtypes and memory order, to be written over.
    result = opt.state_dict()
    groups = result["param_groups"]
    wrong: list[str] = []
    # Adam has always had amsgrad. torch's RAdam, whose state looks the same, has not.
    needed = ("lr", "betas", "eps", "weight_decay", "amsgrad")
    members = _members(found, found_groups, needed, wrong)
    if len(members) != len(groups):
        wrong.append(f"param_groups has {len(members)} groups, not {len(groups)}")
    steps, loaded = [0], []
    for k, (group, indices) in enumerate(zip(found_groups, members, strict=True)):
        if not isinstance(group, Mapping):
            continue
        # What does not pair with opt is checked for all else.
        own = groups[k] if len(members) == len(groups) else {}
        options = _checked(
            {
                "decoupled_weight_decay": own.get("decoupled_weight_decay", False),
                "maximize": False,
                **group,
            },
            k,
            wrong,
        )
        amsgrad = bool(group.get("amsgrad", opt.amsgrad))
        if amsgrad != opt.amsgrad:
            wrong.append(f"param_groups[{k}] has amsgrad={amsgrad}, not {opt.amsgrad}")
        keys: Sequence[Any] = own.get("params", ())
        if own and "params" in group:
            wrong += _other_parameters(group, indices, keys, k)
        if len(keys) != len(indices):
            keys = [None] * len(indices)
        wrong += _unfit(options, [result["state"][key] for key in keys if key is not None], k)
        for index, key in zip(indices, keys, strict=True):
            target = result["state"].get(key)
            entry = found.get(index, {})
            step, arrays = _read(entry, target, amsgrad, f"state[{index!r}]", wrong)
            steps.append(step)
            loaded.append((target, step, arrays))
        own |= options
    if wrong:
        raise ValueError("torch_state_dict must fit the optimizer: " + "; ".join(wrong))

    for target, step, arrays in loaded:
        target["step"] = step
        for name in _moments(opt.amsgrad):
            target[name][...] = arrays.get(name, 0.0)
    result["step_count"] = max(steps)
    return result


def _import_torch() -> Any:
    try:
        return import_module("torch")
    except ModuleNotFoundError as error:
        raise ImportError("to_torch needs torch: pip install torch", name="torch") from error


def _moments(amsgrad: bool) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", _LARGEST) if amsgrad else ("exp_avg", "exp_avg_sq")


def _parts(state_dict: Any, label: str) -> tuple[Mapping[Any, Any], Sequence[Any]]:
    """Return "state" and "param_groups", or raise TypeError."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{label} must be a mapping, got {type(state_dict).__qualname__}")
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping):
        raise TypeError(f"{label}['state'] must be a mapping, got {state!r:.60}")
    if not isinstance(groups, list | tuple):
        raise TypeError(f"{label}['param_groups'] must be a list, got {groups!r:.60}")
    return state, groups


def _members(
    state: Mapping[Any, Any], groups: Sequence[Any], needed: Sequence[str], wrong: list[str]
) -> list[list[Any]]:
    """Return what the parameters of each group are called; note what is missing or too much."""
    members: list[list[Any]] = []
    for k, group in enumerate(groups):
        members.append([])
        if not isinstance(group, Mapping):
            wrong.append(f"param_groups[{k}] is no mapping")
            continue
        missing = [name for name in (*needed, "params") if name not in group]
        if missing:
            wrong.append(f"param_groups[{k}] has no {', '.join(missing)}")
        keys = group.get("params", [])
        if isinstance(keys, list | tuple) and all(isinstance(key, int | str) for key in keys):
            members[-1] += keys
        else:
            wrong.append(f"param_groups[{k}]['params'] is no list of places: {keys!r:.60}")
    flat = [key for keys in members for key in keys]
    known = set(flat)
    if len(known) != len(flat):
        twice = sorted((key for key, count in Counter(flat).items() if count > 1), key=str)
        wrong.append(f"param_groups has {twice[:5]} more than once")
    wrong += [f"state has {key!r}, which no group has" for key in state if key not in known]
    return members


def _checked(group: Mapping[str, Any], k: int, wrong: list[str]) -> dict[str, Any]:
    """Return a group's hyperparameters as floats and bools; note those out of range."""
    checked = {}
    for name in hyperparameters.NAMES:
        if name in group:
            value = group[name]
            if isinstance(value, list | tuple):
                value = tuple(map(_as_number, value))
            try:
                options = {**_VALID, name: _as_number(value)}
                checked[name] = hyperparameters.check_options(options, f"param_groups[{k}].")[name]
            except (TypeError, ValueError) as error:
                wrong.append(str(error))
    return checked


def _unfit(options: Mapping[str, Any], states: Sequence[Mapping[str, Any]], k: int) -> list[str]:
    """Return what the parameters' own dtypes cannot hold."""
    wrong = []
    for dtype in {state["exp_avg"].dtype for state in states}:
        try:
            hyperparameters.check_fits({**_VALID, **options}, dtype, f"param_groups[{k}].")
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def _other_parameters(
    group: Mapping[str, Any], indices: Sequence[Any], keys: Sequence[Any], k: int
) -> list[str]:
    if len(indices) != len(keys):
        return [f"param_groups[{k}] has {len(indices)} parameters, not {len(keys)}"]
    names = group.get("param_names")
    if not isinstance(names, list | tuple):
        return []
    # Parameters of one shape, paired by their order, would silently change places.
    if list(names) != list(keys) and sorted(names, key=str) == sorted(keys, key=str):
        return [f"param_groups[{k}] has {names!r:.60} in another order than {keys!r:.60}"]
    return []


def _own_mismatches(entry: Mapping[str, Any], names: Sequence[str], place: str) -> list[str]:
    """Return what keeps a parameter's state of fastadam's from being torch's."""
    wrong = [f"{place} has no {name!r}" for name in ("step", *names) if name not in entry]
    known = ("step", *names, "ema")
    wrong += [f"{place} has {name!r}, which Adam has not" for name in entry if name not in known]
    if "step" in entry:
        step = _as_step(entry["step"])
        if step is None:
            wrong.append(f"{place}['step'] must be an integer >= 0, not {entry['step']!r:.60}")
        elif step > _LAST_STEP:
            wrong.append(
                f"{place}['step'] must not exceed 2**24, where torch's count in float32 ends,"
                f" got {step}"
            )
    like = entry.get("exp_avg")
    for name in (name for name in names if name in entry):
        array = entry[name]
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
            wrong.append(f"{place}[{name!r}] is no array of float32 or float64")
        elif isinstance(like, np.ndarray):
            wrong += _difference(array, like, f"{place}[{name!r}]")
    return wrong


def _read(
    entry: Any, target: Mapping[str, Any] | None, amsgrad: bool, place: str, wrong: list[str]
) -> tuple[int, dict[str, npt.NDArray[Any]]]:
    """Return a parameter's step and moments out of torch's state; note what is wrong with it.

    ``target`` is the state of fastadam's that they are for, None where that is
    not known.
    """
    if not isinstance(entry, Mapping):
        wrong.append(f"{place} is no mapping")
        return 0, {}
    if not entry:
        return 0, {}  # no gradient yet
    names = ("step", *_moments(amsgrad))
    wrong += [f"{place} has no {name!r}" for name in names if name not in entry]
    wrong += [f"{place} has {name!r}, which Adam has not" for name in entry if name not in names]
    step = _as_step(entry.get("step", 0))
    if step is None:
        wrong.append(
            f"{place}['step'] must be a whole number >= 0 and under 2**62, not"
            f" {entry['step']!r:.60}"
        )
    arrays = {}
    for name in names[1:]:
        if target is None or name not in target or name not in entry:
            continue
        different = _difference(entry[name], target[name], f"{place}[{name!r}]")
        wrong += different
        if not different:
            try:
                arrays[name] = _as_array(entry[name])
            except (RuntimeError, TypeError) as error:
                wrong.append(f"{place}[{name!r}] is no array in memory: {error!s:.60}")
    return step or 0, arrays


def _difference(value: Any, like: npt.NDArray[Any], label: str) -> list[str]:
    """Return how a tensor's dtype or shape is another than an array's."""
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        return [f"{label} is no tensor"]
    # By its name, torch.float32, since NumPy has not all of torch's dtypes.
    dtype, shape = str(value.dtype).rpartition(".")[2], tuple(value.shape)
    if (dtype, shape) != (like.dtype.name, like.shape):
        return [f"{label} is {dtype} {shape}, not {like.dtype.name} {like.shape}"]
    return []


def _as_array(value: Any) -> npt.NDArray[Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _as_number(value: Any) -> Any:
    """Return a tensor or array of one element as Python's number, anything else as it is."""
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:
        try:
            return value.item()
        except RuntimeError:  # a tensor without memory: of torch's device "meta"
            return value
    return value


def _as_step(value: Any) -> int | None:
    """Return a count as an int, None for what is none."""
    number = _as_number(value)
    if checks.is_real(number) and 0 <= number < 2**62 and number == int(number):
        return int(number)
    return None
