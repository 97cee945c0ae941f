"""How much memory there is, and how much a comparison needs."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["available", "format_bytes", "parse_bytes"]

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """Read a number of bytes such as ``500M`` or ``1.5G``.

    Parameters
    ----------
    text : str
        A positive number and K, M, G or T, powers of 1,024; ``B`` or ``iB``
        may follow.

    Returns
    -------
    int
        The bytes, at least 1.

    Raises
    ------
    ValueError
        If it is anything else.

    Examples
    --------
    >>> from fastadam.bench.memory import parse_bytes
    >>> parse_bytes("1.5G")
    1610612736
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    number = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if number < 1:
        raise ValueError(f"must be a size in bytes such as 500M or 4G, got {text!r}")
    return number


def format_bytes(number: float) -> str:
    """Write a number of bytes for a person.

    Parameters
    ----------
    number : float
        Bytes, >= 0.

    Returns
    -------
    str
        Two or three digits and a unit.

    Examples
    --------
    >>> from fastadam.bench.memory import format_bytes
    >>> format_bytes(1536), format_bytes(4.2 * 2**30)
    ('1.5 KiB', '4.2 GiB')
    """
    units = iter(("B", "KiB", "MiB"))
    unit = next(units)
    while number >= 1024 and unit != "GiB":
        number, unit = number / 1024, next(units, "GiB")
    return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.1f} {unit}"


def available(root: Path = Path("/")) -> int | None:
    """Return the bytes that can be allocated without swapping, None if nothing tells.

    Parameters
    ----------
    root : pathlib.Path
        The file system in which ``proc`` and ``sys`` are mounted.

    Returns
    -------
    int or None
        What the system has available, or, if that is less, what the control
        groups (a container's limit) leave.
    """
    candidates = [_system(root), *_groups(root)]
    return min((number for number in candidates if number is not None), default=None)


def _system(root: Path) -> int | None:
    try:
        text = (root / "proc/meminfo").read_text(encoding="utf-8")
        found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    try:  # not Linux: what is free, or, where that is not told, half of what there is
        page = os.sysconf("SC_PAGE_SIZE")
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            return page * os.sysconf("SC_AVPHYS_PAGES")
        return page * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return None


def _groups(root: Path) -> list[int]:
    """Return what the memory control groups of this process leave, versions 2 and 1."""
    base, left = root / "sys/fs/cgroup", []
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = base / "memory" if controllers else base
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        folder = top / path.strip("/")
        # Every group above can limit as well; a container may show only its own, at the top.
        for group in (folder, *folder.parents):
            number = _left(group, *names)
            if number is not None:
                left.append(number)
            if group == top:
                break
    return left


def _left(group: Path, limit: str, usage: str, inactive: str) -> int | None:
    try:
        most = int((group / limit).read_text(encoding="utf-8"))
        used = int((group / usage).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max": no limit
        return None
    try:  # files that nobody has read for a while are given up before anything fails
        text = (group / "memory.stat").read_text(encoding="utf-8")
        found = re.search(rf"^{inactive} (\d+)$", text, re.MULTILINE)
        used -= int(found[1]) if found else 0
    except OSError:
        pass
    return max(0, most - used)
