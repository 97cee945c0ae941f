"""The one table of the arrays that an optimizer keeps of each parameter.

Allocation, the rows and the choice of kernels, ``state_dict``, checkpoints and
`fastadam.functional` read it. To add an array: a row here, its column in `update.layout`, its
arithmetic in `update.formula`, and its load and store in `cpu.kernels` and `cuda.update`. An
array that an option asks for also needs the option: in `adam`, and in `Groups.state_options`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Role:
    """One array that is kept of each parameter.

    Attributes
    ----------
    name : str
        Its name in ``state_dict`` and in checkpoints.
    option : str or None
        The optimizer's option that asks for it; None if it is always kept.
    starts_as : {"zeros", "param"}
        What it holds before the first step.
    argument : str
        What `fastadam.functional` calls a list of them.
    stored_as : {"param"}
        Its element type: the parameter's.
    """

    name: str
    option: str | None
    starts_as: Literal["zeros", "param"]
    argument: str
    stored_as: Literal["param"] = "param"


ROLES = (
    Role("exp_avg", None, "zeros", "exp_avgs"),
    Role("exp_avg_sq", None, "zeros", "exp_avg_sqs"),
    Role("max_exp_avg_sq", "amsgrad", "zeros", "max_exp_avg_sqs"),
    Role("ema", "ema_decay", "param", "averages"),
)
NAMES = tuple(role.name for role in ROLES)
# What a checkpoint may hold of a parameter: itself, and its state.
PARAM = "param"
KINDS = (PARAM, *NAMES)
# Of those, the ones that not every optimizer has.
OPTIONAL = tuple(role.name for role in ROLES if role.option is not None)
# Those that begin as the parameter, which can stand for one that is not there.
STARTING_AS_PARAM = tuple(role.name for role in ROLES if role.starts_as == "param")


def kept(options: Iterable[str]) -> tuple[Role, ...]:
    """Return the roles of an optimizer that was made with these options on."""
    chosen = set(options)
    return tuple(role for role in ROLES if role.option is None or role.option in chosen)
