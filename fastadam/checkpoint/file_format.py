"""The file of a checkpoint: tensors, what is said of them, checksums of both."""

import contextlib
import hashlib
import json
import os
import re
import stat
import zlib
from _thread import start_new_thread
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

# The newest that is written; all from 1 on are read.
FORMAT = 1

# Of the metadata, each of which is text: the number above, a JSON object, and the digest of both
# and of the tensors' names, dtypes and shapes.
_FORMAT, _DESCRIPTION, _DIGEST = "fastadam_format", "fastadam", "fastadam_sha256"

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

# Bytes from which on several threads make checksums.
_WORTH_THREADS = 1 << 22


class CheckpointError(ValueError):
    """A file is no checkpoint, is damaged, or does not fit the optimizer.

    The message says which, and names every mismatch.
    """


def checked_path(path: Any) -> Path:
    """Return what `save` and `load` are given first as a Path, or raise TypeError."""
    try:
        return Path(path)
    except TypeError:
        swapped = hasattr(type(path), "load_state_dict")
        hint = "; it comes first, then the optimizer" if swapped else ""
        kind = type(path).__qualname__
        raise TypeError(f"path must be str or os.PathLike, got {kind}{hint}") from None


def need_safetensors() -> Any:
    """Return the package, or say how to get it.

    Raises
    ------
    ImportError
        If it is not installed, or too old.
    """
    try:
        safetensors = import_module("safetensors")
        _ = safetensors.TensorSpec
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "checkpoints need safetensors 0.8 or later: pip install 'fastadam[checkpoint]'",
            name="safetensors",
        ) from error
    return safetensors


def write(path: Path, tensors: Mapping[str, npt.NDArray[Any]], description: Any) -> None:
    """Write a file of arrays of float32 and float64, which are read where they lie.

    Raises
    ------
    OSError
        If the system refuses.
    ValueError
        If all that is not tensors takes more than the 100 MB that the format allows.
    """
    safetensors = need_safetensors()
    arrays = {
        name: np.require(array, array.dtype.newbyteorder("<"), "C")
        for name, array in tensors.items()
    }
    checksums = dict(zip(arrays, _checksums([*arrays.values()]), strict=True))
    text = json.dumps({**description, "crc32": checksums}, separators=(",", ":"))
    layout = {name: (_CODES[array.dtype], list(array.shape)) for name, array in arrays.items()}
    metadata = {_FORMAT: str(FORMAT), _DESCRIPTION: text}
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name,
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }
    try:
        safetensors.serialize_file(
            specs, path, metadata={**metadata, _DIGEST: _digest(metadata, layout)}
        )
    except safetensors.SafetensorError as error:
        _raise_systems(error, path)
        raise ValueError(f"names and extra must fit a safetensors header: {error}") from error


class Reader:
    """A file that is open, of which all but the tensors' values has been checked.

    Attributes
    ----------
    description : dict
        What `write` was given.
    layout : dict
        Of each tensor by name, dtype and shape.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        metadata = file.metadata() or {}
        if _FORMAT not in metadata:
            raise CheckpointError(f"{path} is no checkpoint of fastadam's")
        codes: dict[str, tuple[str, list[int]]] = {}
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            part = file.get_slice(name)
            codes[name] = part.get_dtype(), part.get_shape()
        rest = {name: text for name, text in metadata.items() if name != _DIGEST}
        if metadata.get(_DIGEST) != _digest(rest, codes):
            number = rest[_FORMAT]
            if number.isdecimal() and int(number[:9]) > FORMAT:
                raise CheckpointError(
                    f"{path} is of format {number:.9}, and this fastadam reads up to {FORMAT}"
                )
            raise CheckpointError(f"{path} is damaged: the checksum of its header does not match")
        if rest[_FORMAT] != str(FORMAT):
            raise CheckpointError(
                f"{path} must be of a format up to {FORMAT}, got {rest[_FORMAT]!r:.60}"
            )
        self.description = json.loads(rest[_DESCRIPTION])
        self.layout: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            name: (_DTYPES[code], tuple(map(int, shape))) for name, (code, shape) in codes.items()
        }
        self._checksums = {name: int(self.description["crc32"][name]) for name in codes}

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor in memory of its own.

        Raises
        ------
        CheckpointError
            If it is not what was written.
        """
        with blaming(self._path):
            array: npt.NDArray[Any] = self._file.get_tensor(name)
        if _checksum(array) != self._checksums[name]:
            raise CheckpointError(
                f"{self._path} is damaged: the checksum of {name!r} does not match"
            )
        return array


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Reader]:
    """Open a checkpoint, and check all but the tensors' values.

    Raises
    ------
    CheckpointError
        If it is none, or damaged.
    OSError
        If it is not there, or cannot be read.
    """
    safetensors = need_safetensors()
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise CheckpointError(f"{path} must be a file")
    path.open("rb").close()  # raises what is true, where safetensors says that there is none
    with contextlib.ExitStack() as stack:
        with blaming(path):
            # Tensors are read, not mapped: a mapping of what is cut short ends the process.
            handle = safetensors.safe_open(path, framework="np", backend="pread")
            reader = Reader(path, stack.enter_context(handle))
        yield reader


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Raise CheckpointError for whatever goes wrong in making sense of a file."""
    refusal = need_safetensors().SafetensorError
    try:
        yield
    except (CheckpointError, OSError):
        raise
    except (
        refusal,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        _raise_systems(error, path)
        # safetensors' words for bytes that are something else altogether.
        header = "Error while deserializing header: "
        text = " ".join(str(error).split())
        if text.startswith(header):
            text = f"safetensors finds no header that it can read ({text[len(header) :]:.200})"
        else:
            text = f"{type(error).__name__}: {text:.200}"
        raise CheckpointError(f"{path} is no checkpoint, or damaged: {text}") from error


def _raise_systems(error: Exception, path: Path) -> None:
    """Raise OSError if that is what safetensors tells of, and not a tensor's name."""
    found = re.match(r"Error while [\w ]+: I/O error: [^(]*\(os error (\d+)\)", str(error))
    if found is not None:
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _checksum(array: npt.NDArray[Any]) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _checksums(arrays: list[npt.NDArray[Any]]) -> list[int]:
    """Return the checksum of each, made in several threads.

    Those of `_thread` and the simplest queues: a signal's handler may come and
    save in the midst of starting any others, whose locks it would then wait for.
    """
    left: SimpleQueue[int] = SimpleQueue()
    made: SimpleQueue[tuple[int, int]] = SimpleQueue()
    for place in range(len(arrays)):
        left.put(place)

    def work() -> None:
        with contextlib.suppress(Empty):
            while True:
                place = left.get_nowait()
                made.put((place, _checksum(arrays[place])))

    if sum(array.nbytes for array in arrays) > _WORTH_THREADS:
        for _ in range(min(len(arrays), os.cpu_count() or 1) - 1):
            with contextlib.suppress(RuntimeError):  # as Python exits, which starts no more
                start_new_thread(work, ())
    work()
    checksums = dict(made.get() for _ in arrays)
    return [checksums[place] for place in range(len(arrays))]


def _digest(metadata: Mapping[str, str], layout: Mapping[str, Any]) -> str:
    """Return the checksum of all that is said of the tensors."""
    said = json.dumps([sorted(metadata.items()), sorted(layout.items())])
    return hashlib.sha256(said.encode()).hexdigest()
