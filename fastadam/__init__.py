"""Adam that updates your own arrays in place, in one pass, with the same bits everywhere."""

from importlib.util import find_spec
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
]
# Not among those that a star imports: it would stand in the place of the real one. Each needs
# the package whose name it has.
_NAMED_AS_OTHERS = ["torch"]


def __dir__() -> list[str]:
    return sorted([*__all__, *filter(find_spec, _NAMED_AS_OTHERS)])


if not TYPE_CHECKING:  # for which every name would be there

    def __getattr__(name: str) -> Any:
        """Import modules when they are first asked for: most of an import's time."""
        # (Not by `from . import ...`, which would ask here again.)
        if name == "torch":
            import fastadam.torch as module  # no lock: it imports torch, which takes a second

            return module
        # A fork waits for the others: a child cannot end what another thread has begun.
        with kernel_lock:
            if name == "schedules":
                import fastadam.schedules as module
            elif name == "functional":
                import fastadam.functional as module
            elif name in ("checkpoint", "CheckpointError", "load", "save"):
                import fastadam.checkpoint as module
            else:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        whole = name in ("functional", "schedules", "checkpoint")
        return module if whole else getattr(module, name)
