"""Adam that updates your own arrays in place, in one pass, with the same bits everywhere."""

from typing import TYPE_CHECKING, Any

from . import objects as objects
from .adam import Adam, AdamW
from .compiling import compile  # noqa: A004
from .objects import from_objects
from .runtime import kernel_lock
from .update.result import StepResult
from .version import __version__

if TYPE_CHECKING:
    from . import checkpoint as checkpoint
    from . import functional as functional
    from . import schedules as schedules
    from . import torch as torch
    from .checkpoint import CheckpointError, load, save

__all__ = [
    "Adam",
    "AdamW",
    "CheckpointError",
    "StepResult",
    "__version__",
    "checkpoint",
    "compile",
    "from_objects",
    "functional",
    "load",
    "objects",
    "save",
    "schedules",
    "torch",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import modules when they are first asked for: most of an import's time."""
    # A fork waits for it: a child cannot end what another thread has begun. (And not
    # `from . import ...`, which would ask here again.)
    module: Any
    with kernel_lock:
        if name == "schedules":
            import fastadam.schedules as module
        elif name == "functional":
            import fastadam.functional as module
        elif name == "torch":
            import fastadam.torch as module
        elif name in ("checkpoint", "CheckpointError", "load", "save"):
            import fastadam.checkpoint as module
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    whole = name in ("functional", "schedules", "torch", "checkpoint")
    return module if whole else getattr(module, name)
