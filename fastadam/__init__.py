"""Adam that updates your own arrays in place, in one pass, with the same bits everywhere."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._compile import compile  # noqa: A004
from ._result import StepResult
from ._threads import alone
from .adam import Adam, AdamW
from .interop.objects import from_objects

if TYPE_CHECKING:
    from . import checkpoint as checkpoint
    from . import interop as interop
    from . import schedules as schedules
    from .checkpoint import CheckpointError, load, save

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "AdamW",
    "CheckpointError",
    "StepResult",
    "__version__",
    "checkpoint",
    "compile",
    "from_objects",
    "interop",
    "load",
    "save",
    "schedules",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import modules when they are first asked for: most of an import's time."""
    if name == "schedules" or name in ("checkpoint", "CheckpointError", "load", "save"):
        module = "schedules" if name == "schedules" else "checkpoint"
        with alone:  # a fork waits for it: a child cannot end what another thread has begun
            found = import_module(f".{module}", __name__)
        return found if name == module else getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
