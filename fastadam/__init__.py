"""Adam that updates your own arrays in place, in one pass, with the same bits everywhere."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._compile import compile  # noqa: A004
from ._result import StepResult
from .adam import Adam, AdamW
from .interop.objects import from_objects

if TYPE_CHECKING:
    from . import schedules as schedules

__version__ = "0.1.0"

__all__ = ["Adam", "AdamW", "StepResult", "__version__", "compile", "from_objects", "schedules"]


def __getattr__(name: str) -> Any:
    """Import the schedules when they are first asked for: most of an import's time."""
    if name == "schedules":
        return import_module(".schedules", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
