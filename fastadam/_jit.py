"""The only home of compile flags, of the machine primitives and of the compile cache."""

import contextlib
import functools
import hashlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import config, njit, types
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps
from numba.extending import intrinsic

# Division by zero gives inf, as in NumPy: Python's check for it keeps the loop
# scalar. No fastmath: it would let the compiler choose what is rounded.
FLAGS = {"error_model": "numpy", "nogil": True}

# What a pointer points into. Arrays of different roles never overlap (the facade
# refuses it), and saying so spares the loop its run-time alias checks, of which
# LLVM allows so few that the loop with AMSGrad would stay scalar.
ROLES = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def inline(function: Callable[..., Any]) -> Any:
    """Compile a function for use inside a kernel."""
    return njit(**FLAGS)(function)


def kernel(function: Callable[..., Any], *, parallel: bool = False) -> Any:
    """Compile an entry point, its machine code kept on disk."""
    if config.DISABLE_JIT:
        return _refuse
    dispatcher = njit(parallel=parallel, **FLAGS)(function)
    with contextlib.suppress(RuntimeError, OSError):  # no folder: each process compiles
        dispatcher._cache = KernelCache(function, variant=f"parallel={parallel}")
    return dispatcher


def _refuse(*_: Any) -> None:
    raise RuntimeError("NUMBA_DISABLE_JIT must be unset: fastadam has no kernel but compiled ones")


@intrinsic  # type: ignore[untyped-decorator]
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a*b + c``, rounded once, whether or not the processor has an instruction for it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return a(a, a, a), codegen


def _element(context: Any, builder: Any, address: Any, index: Any, dtype: Any) -> Any:
    pointer = builder.inttoptr(address, context.get_value_type(dtype).as_pointer())
    return builder.gep(pointer, [index])


def _tell_role(instruction: Any, module: Any, role: int) -> None:
    domain = module.add_metadata(["fastadam"])
    scopes = [module.add_metadata([f"fastadam.{name}", domain]) for name in ROLES]
    others = [scope for place, scope in enumerate(scopes) if place != role]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[role]]))
    instruction.set_metadata("noalias", module.add_metadata(others))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def load(typing_context: Any, address: Any, index: Any, like: Any, role: Any) -> Any:
    """Read element ``index`` of the array at ``address``, of the type of ``like``.

    A bare pointer and an index that is never negative: nothing but the load
    is left for the vectoriser to look at. An address of None gives None.
    """
    if isinstance(address, types.NoneType):
        return types.none(address, index, like, role), _no_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_element(context, builder, args[0], args[1], like))
        _tell_role(value, builder.module, role.literal_value)
        return value

    return like(types.int64, types.int64, like, role), codegen


@intrinsic  # type: ignore[untyped-decorator]
def peek(typing_context: Any, address: Any, like: Any) -> Any:
    """Read a number of the type of ``like`` at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], context.get_value_type(like).as_pointer())
        return builder.load(pointer)

    return like(types.int64, like), codegen


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def store(typing_context: Any, address: Any, index: Any, value: Any, role: Any) -> Any:
    """Write ``value`` to element ``index`` of the array at ``address``."""
    if not isinstance(value, types.Float):  # an Optional would be stored with its flag
        raise TypeError(f"store takes a float, got {value}")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _element(context, builder, args[0], args[1], value)
        _tell_role(builder.store(args[2], place), builder.module, role.literal_value)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, value, role), codegen


@intrinsic  # type: ignore[untyped-decorator]
def only_if(typing_context: Any, flag: Any, value: Any) -> Any:
    """Return ``value``, or None where ``flag`` is None: decided by type, not at run time.

    Numba's own pruning of ``None if flag is None else value`` leaves an
    Optional when flag is not None.
    """
    if isinstance(flag, types.NoneType):
        return types.none(flag, value), _no_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[1]

    return value(flag, value), codegen


def _no_value(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return context.get_dummy_value()


@functools.cache
def source_digest() -> str:
    """Return a digest of every source that the kernels may be made of.

    Raises
    ------
    FileNotFoundError
        If the sources are not there to read, as in a zip file.
    """
    digest = hashlib.sha256()
    paths = sorted(Path(__file__).parent.glob("_*.py"))
    if not paths:
        raise FileNotFoundError("no sources")
    for path in paths:
        source = path.read_bytes()
        digest.update(f"{path.name} {len(source)} ".encode() + source)
    return digest.hexdigest()


class KernelCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache with one file for each key, and a key of all that matters.

    Numba's own key is the source of the one file that holds the function: it
    serves old machine code after an edit to another file, and mixes up serial
    and parallel code of one function. Its index and data are two files, which
    processes that start at once can leave out of step. Here a file is named
    for the digest of everything that the code depends on, is written whole or
    not at all, and is checked before use.
    """

    def __init__(self, function: Callable[..., Any], variant: str) -> None:
        super().__init__(function)
        self._folder = Path(self.cache_path).absolute()  # whatever chdir comes
        what = (function.__module__, function.__qualname__, variant, source_digest())
        self._what = (*what, numba.__version__, llvmlite.__version__, sys.version)

    def _path(self, signature: Any, codegen: Any) -> Path:
        key = repr((self._what, str(signature), codegen.magic_tuple()))
        name = f"{self._py_func.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        return self._folder / f"fastadam.{name}.nbc"

    def _load_overload(self, signature: Any, target_context: Any) -> Any:
        path = self._path(signature, target_context.codegen())
        try:
            content = path.read_bytes()
        except OSError:
            return None
        checksum, data = content[:32], content[32:]
        if hashlib.sha256(data).digest() != checksum:
            return None
        return self._impl.rebuild(target_context, pickle.loads(data))  # noqa: S301

    def _save_overload(self, signature: Any, result: Any) -> None:
        if not self._impl.check_cachable(result):
            return
        path = self._path(signature, result.codegen)
        data = dumps(self._impl.reduce(result))
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
        # A full disk, or a folder gone read-only, costs time, not the step.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(hashlib.sha256(data).digest() + data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
