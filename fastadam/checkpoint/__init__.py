"""Checkpoints: an optimizer and its parameters in one safetensors file."""

from .description import Checkpoint
from .file_format import CheckpointError
from .loading import inspect, load
from .saving import save

__all__ = ["Checkpoint", "CheckpointError", "inspect", "load", "save"]


def __dir__() -> list[str]:
    return sorted(__all__)
