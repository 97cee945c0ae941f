"""One module per ecosystem that fastadam meets; each imports its ecosystem itself."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import objects as objects
    from . import torch as torch

__all__ = ["objects", "torch"]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import a module when it is first asked for."""
    if name == "torch":
        import fastadam.interop.torch as module  # `from . import torch` would ask here again

        return module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
