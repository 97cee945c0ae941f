"""Between fastadam and torch: state in both directions, and parameters on the CPU.

Once this module is imported, ``torch.load(weights_only=True)``, torch's default, takes
NumPy arrays: those of a ``state_dict`` that ``torch.save`` has written.
"""

from ..state.torch_load import allow_arrays_in_torch_load
from .cpu_params import CPUParams
from .state_dicts import from_torch, to_torch

__all__ = ["CPUParams", "from_torch", "to_torch"]

allow_arrays_in_torch_load()


def __dir__() -> list[str]:
    return sorted(__all__)
