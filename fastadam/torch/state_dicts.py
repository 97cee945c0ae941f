"""State to torch's optimizers, and from them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..adam import Adam
from ..params import hyperparameters
from .state_checks import (
    MAX_EXP_AVG_SQ,
    checked_options,
    members_of_groups,
    moment_names,
    own_mismatches,
    pairing_mismatches,
    read_state,
    split,
    too_large_for_dtypes,
)

# What torch.optim.Adam's groups hold beside fastadam's hyperparameters: as torch makes them.
_TORCHS_OWN = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}


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
    torch = _torch()
    found, found_groups = split(state_dict, "state_dict")
    wrong: list[str] = []
    members = members_of_groups(found, found_groups, hyperparameters.NAMES, wrong)
    keys = [key for own in members for key in own]
    wrong += [f"state has no {key!r}" for key in keys if key not in found]
    entries = {key: found[key] for key in keys if isinstance(found.get(key), Mapping)}
    wrong += [
        f"state[{key!r}] is no mapping" for key in keys if key in found and key not in entries
    ]
    amsgrad = any(MAX_EXP_AVG_SQ in entry for entry in entries.values())
    names = moment_names(amsgrad)
    for key, entry in entries.items():
        wrong += own_mismatches(entry, names, f"state[{key!r}]")
    options = [
        checked_options(group, k, wrong) if isinstance(group, Mapping) else {}
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
    found, found_groups = split(torch_state_dict, "torch_state_dict")
    # A copy in opt's own shapes, dtypes and memory order, to be written over.
    result = opt.state_dict()
    groups = result["param_groups"]
    wrong: list[str] = []
    # Adam has always had amsgrad. torch's RAdam, whose state looks the same, has not.
    needed = ("lr", "betas", "eps", "weight_decay", "amsgrad")
    members = members_of_groups(found, found_groups, needed, wrong)
    if len(members) != len(groups):
        wrong.append(f"param_groups has {len(members)} groups, not {len(groups)}")
    steps, loaded = [0], []
    for k, (group, indices) in enumerate(zip(found_groups, members, strict=True)):
        if not isinstance(group, Mapping):
            continue
        # What does not pair with opt is checked for all else.
        own = groups[k] if len(members) == len(groups) else {}
        options = checked_options(
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
            wrong += pairing_mismatches(group, indices, keys, k)
        if len(keys) != len(indices):
            keys = [None] * len(indices)
        wrong += too_large_for_dtypes(
            options, [result["state"][key] for key in keys if key is not None], k
        )
        for index, key in zip(indices, keys, strict=True):
            target = result["state"].get(key)
            entry = found.get(index, {})
            step, arrays = read_state(entry, target, amsgrad, f"state[{index!r}]", wrong)
            steps.append(step)
            loaded.append((target, step, arrays))
        own |= options
    if wrong:
        raise ValueError("torch_state_dict must fit the optimizer: " + "; ".join(wrong))

    for target, step, arrays in loaded:
        target["step"] = step
        for name in moment_names(opt.amsgrad):
            target[name][...] = arrays.get(name, 0.0)
    result["step_count"] = max(steps)
    return result


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("to_torch needs torch: pip install torch", name="torch") from error
    return torch
