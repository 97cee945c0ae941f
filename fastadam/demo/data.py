"""Names as lists of tokens: the alphabet, the census list, a user's own list."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["ALPHABET", "END", "VOCAB_SIZE", "decode", "encode", "load_names", "read_names"]

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
END = len(ALPHABET)  # one token marks both ends: "a name begins" and "it is over"
VOCAB_SIZE = len(ALPHABET) + 1


def encode(name: str) -> NDArray[np.intp]:
    """Tokens of a name, between two `END` tokens.

    Parameters
    ----------
    name : str
        Letters of `ALPHABET` only.

    Returns
    -------
    ndarray of intp, shape (len(name) + 2,)
        0 to 25 for the letters, 26 for both ends.

    Raises
    ------
    ValueError
        If a character is not in the alphabet.

    Examples
    --------
    >>> from fastadam.demo.data import encode
    >>> encode("ada").tolist()
    [26, 0, 3, 0, 26]
    """
    bad = _first_unknown(name)
    if bad is not None:
        raise ValueError(f"name must be made of the letters a to z, got {bad} in {name!r}")
    return np.array([END, *(ALPHABET.index(letter) for letter in name), END], dtype=np.intp)


def decode(tokens: Sequence[int] | NDArray[np.integer[Any]]) -> str:
    """Letters of a list of tokens; `END` tokens give nothing.

    Parameters
    ----------
    tokens : sequence of int
        Each from 0 to 26.

    Returns
    -------
    str

    Examples
    --------
    >>> from fastadam.demo.data import decode
    >>> decode([26, 0, 3, 0, 26])
    'ada'
    """
    return "".join(ALPHABET[token] for token in tokens if token != END)


def load_names() -> list[str]:
    """First names of the 1990 US census, which come with the package.

    Returns
    -------
    list of str
        5,163 names in lower case, sorted.

    References
    ----------
    US Census Bureau, "Frequently Occurring First Names and Surnames From
    the 1990 Census", public domain. NAMES.md beside the file says how it
    was made.

    Examples
    --------
    >>> from fastadam.demo.data import load_names
    >>> load_names()[:3]
    ['aaron', 'abbey', 'abbie']
    """
    return _parse((resources.files("fastadam.demo") / "names.txt").read_bytes(), "names.txt")


def read_names(path: Path) -> list[str]:
    """Names from a text file, one per line.

    Parameters
    ----------
    path : pathlib.Path
        UTF-8; a byte-order mark, Windows line ends, blank lines, capitals
        and spaces around a name are accepted. A name given twice counts
        twice.

    Returns
    -------
    list of str
        In the order of the file, stripped and in lower case.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it holds no name, is not UTF-8, or has a character other than
        the letters a to z; the message gives line and character.
    """
    return _parse(path.read_bytes(), str(path))


def _parse(raw: bytes, source: str) -> list[str]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{source}, line {line}: not UTF-8 text (byte 0x{raw[error.start]:02x})"
        ) from None
    names = []
    # Not str.splitlines: it also splits at characters such as U+2028, and an editor's
    # line numbers would differ from ours.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, content in enumerate(lines, 1):
        name = content.strip().lower()
        bad = _first_unknown(name)
        if bad is not None:
            raise ValueError(
                f"{source}, line {number}: {bad} cannot be encoded; "
                "names are made of the letters a to z"
            )
        if name:
            names.append(name)
    if not names:
        raise ValueError(f"{source}: holds no name")
    return names


def _first_unknown(name: str) -> str | None:
    for character in name:
        if character not in ALPHABET:
            return f"character {character!r} (U+{ord(character):04X})"
    return None
