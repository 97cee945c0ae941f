"""Adam and AdamW for torch: change one import. And state in both directions.

Once this module is imported, ``torch.load(weights_only=True)``, torch's default, takes
NumPy arrays: those of a ``state_dict`` that ``torch.save`` has written.
"""

try:
    import torch as _torch
except ModuleNotFoundError as error:
    raise ImportError("fastadam.torch needs PyTorch: pip install torch", name="torch") from error
if tuple(map(int, _torch.__version__.split(".")[:2])) < (2, 7):
    raise ImportError(
        f"fastadam.torch needs PyTorch 2.7 or later: pip install -U torch, got"
        f" {_torch.__version__}",
        name="torch",
    )

from ..state.torch_load import allow_arrays_in_torch_load
from .cpu_params import CPUParams
from .optimizers import Adam, AdamW
from .state_dicts import from_torch, to_torch

__all__ = ["Adam", "AdamW", "CPUParams", "from_torch", "to_torch"]

allow_arrays_in_torch_load()


def __dir__() -> list[str]:
    return sorted(__all__)
