"""The only home of compile flags and of the machine primitives."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import carray, config, get_num_threads, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..runtime import kernel_lock, signals_deferred
from ..state import roles
from ..update.formula import bind
from . import notice
from .cache import KernelCache

# Division by zero gives inf, as in NumPy: Python's check for it keeps the loop
# scalar. No fastmath: it would let the compiler choose what is rounded.
FLAGS = {"error_model": "numpy"}

# What a pointer points into, in the order of the columns of `update.layout`. Arrays of
# different roles never overlap (the facade refuses it), and saying so spares the loop its
# run-time alias checks, of which LLVM allows so few that the loop with AMSGrad would stay
# scalar.
ROLES = ("param", "grad", *roles.NAMES)

# Sums are kept in so many float64 at once, whatever a register holds, so that
# every processor adds in the same order. A power of 2.
LANES = 32


def inline(function: Callable[..., Any]) -> Any:
    """Compile a function for use inside a kernel."""
    return njit(**FLAGS)(function)


def kernel(
    function: Callable[..., Any],
    signature: tuple[Any, ...],
    *,
    parallel: bool = False,
    nogil: bool = False,
    **constants: Any,
) -> Any:
    """Compile an entry point, or load its machine code from the compile cache.

    ``signature`` has the types of its arguments, and ``constants`` take the place of the
    function's globals of those names. A serial kernel releases the GIL only if it is to
    (``nogil``): over few elements it is over in microseconds, and to ask for the GIL again,
    where other threads want it, can take thousands.
    """
    if config.DISABLE_JIT:
        return _refuse
    with signals_deferred():
        if parallel:
            with kernel_lock:
                _launch_threads()
        bound = bind(function, **constants)
        nogil |= parallel
        dispatcher = njit(parallel=parallel, nogil=nogil, **FLAGS)(bound)
        folder = cache_folder(bound)
        if folder is not None:  # else each process compiles
            variant = f"parallel={parallel} nogil={nogil} {constants}"
            dispatcher._cache = KernelCache(bound, variant=variant)
        compile_anew = dispatcher._compiler.compile

        def compile_with_notice(*arguments: Any) -> Any:
            notice.compiling(folder)
            return compile_anew(*arguments)

        dispatcher._compiler.compile = compile_with_notice  # called if the cache has no file
        dispatcher.compile(signature)
    return dispatcher


def _launch_threads() -> None:
    """Start Numba's threads, without which `thread_count` has nothing to call.

    Its OpenMP layer then sets how many threads all of OpenMP takes, torch's too, of which
    ``torch.set_num_threads(1)`` may have made one: that is set again.
    """
    torch: Any = sys.modules.get("torch")
    threads = torch.get_num_threads() if hasattr(torch, "set_num_threads") else None
    get_num_threads()
    if threads is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def entry_point(kernel: Any) -> Any:
    """Return a kernel's own C function, whose call costs half: it looks at no argument's type."""
    # Not by an OrderedDict's own way: it hashes keys, and turns a Ctrl-C there into a KeyError.
    compiled = dict.values(getattr(kernel, "overloads", {}))
    return next((each.entry_point for each in compiled), kernel)


def cache_folder(function: Callable[..., Any]) -> str | None:
    """Return the folder in which the machine code of a kernel is kept, if there is one."""
    with contextlib.suppress(RuntimeError, OSError):
        folder: str = KernelCache(function, variant="").cache_path
        return folder
    return None


def _refuse(*_: Any) -> None:
    raise RuntimeError("NUMBA_DISABLE_JIT must be unset: fastadam has no kernel but compiled ones")


@intrinsic  # type: ignore[untyped-decorator]
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a*b + c``, rounded once, whether or not the processor has an instruction for it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return a(a, a, a), codegen


@inline
def mul(a: Any, b: Any) -> Any:
    """``a*b``, rounded: without fastmath, this compiler fuses nothing unasked."""
    return a * b


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


@intrinsic  # type: ignore[untyped-decorator]
def call_at(typing_context: Any, function: Any, source: Any, target: Any) -> Any:
    """Call a C function of two pointers, all of them addresses; return whether it returned 0.

    A Python error that it has set where it has not is cleared.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, integer = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(integer, [pointer, pointer])
        called = builder.inttoptr(args[0], kind.as_pointer())
        code = builder.call(called, [builder.inttoptr(each, pointer) for each in args[1:]])
        failed = builder.icmp_signed("!=", code, integer(0))
        with builder.if_then(failed):
            clear = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, clear, "PyErr_Clear"), [])
        return builder.not_(failed)

    return types.boolean(types.int64, types.int64, types.int64), codegen


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


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(like).as_pointer())

    return types.CPointer(like)(types.int64, like), codegen


@inline
def table(address: Any, rows: Any, columns: Any, like: Any) -> Any:
    """Return the array of numbers of the type of ``like`` that lies at ``address``.

    An array as an argument costs a call some 50 nanoseconds, its address 10.
    """
    return carray(_pointer(address, like), (rows, columns))


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typing_context: Any, address: Any, number: Any) -> Any:
    """Add to the int64 at an address, and return what it was, as one atomic operation."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def thread_count(typing_context: Any) -> Any:
    """Return how many threads a parallel loop of this thread's may use.

    What `numba.get_num_threads` asks, by the name by which Numba's own parallel
    loops ask it: the public function costs a microsecond from Python, and in a
    kernel keeps it from being cached.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = context.get_value_type(types.intp)
        kind = ir.FunctionType(integer, [])
        count = cgutils.get_or_insert_function(builder.module, kind, "get_num_threads")
        return builder.call(count, [])

    return types.intp(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def set_thread_count(typing_context: Any, count: Any) -> Any:
    """Let the parallel loops of this thread's use so many threads, as `numba.set_num_threads`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
        setter = cgutils.get_or_insert_function(builder.module, kind, "set_num_threads")
        builder.call(setter, [builder.trunc(args[0], ir.IntType(32))])
        return context.get_dummy_value()

    return types.none(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def clock(typing_context: Any) -> Any:
    """Return the time of a steady clock in nanoseconds; always 0 where there is no POSIX clock."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = ir.IntType(64)
        if not hasattr(time, "clock_gettime"):
            return integer(0)
        spec = cgutils.alloca_once(builder, ir.ArrayType(integer, 2))
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), spec.type])
        function = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(function, [ir.IntType(32)(time.CLOCK_MONOTONIC), spec])
        seconds, rest = (builder.extract_value(builder.load(spec), place) for place in (0, 1))
        return builder.add(builder.mul(seconds, integer(1_000_000_000)), rest)

    return types.int64(), codegen


def _splat(builder: Any, value: Any) -> Any:
    """Return a vector with the value in every lane."""
    vector = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    for lane in range(LANES):
        vector = builder.insert_element(vector, value, ir.IntType(32)(lane))
    return vector


def _over_lanes(
    builder: Any, address: Any, size: Any, element: Any, zero: Any, include: Any, combine: Any
) -> Any:
    """Write the code that makes one number of ``size`` elements at an address; return it.

    Element i goes to lane ``i % LANES``, and the lanes are combined in halves. The
    order is written out in vectors, which the compiler cuts to the registers
    there are: left to itself it would go one by one, or in an order of its own.

    Parameters
    ----------
    element : type
        An element's.
    zero : constant
        What each lane begins as.
    include : callable
        From elements and lanes, a vector of each or one of each, to new lanes.
    combine : callable
        From two vectors of lanes to one.
    """
    data = builder.inttoptr(address, element.as_pointer())
    width, index = size.type(LANES), ir.IntType(32)
    elements = ir.VectorType(element, LANES).as_pointer()
    total = cgutils.alloca_once_value(
        builder, ir.Constant(ir.VectorType(zero.type, LANES), [zero] * LANES)
    )
    blocks = builder.udiv(size, width)
    with cgutils.for_range(builder, blocks) as loop:
        block = builder.bitcast(builder.gep(data, [builder.mul(loop.index, width)]), elements)
        values = builder.load(block, align=8 if element == ir.DoubleType() else 4)
        builder.store(include(values, builder.load(total)), total)
    # What is left over goes to the first lanes.
    lanes = cgutils.alloca_once_value(builder, builder.load(total))
    first = builder.bitcast(lanes, zero.type.as_pointer())
    done = builder.mul(blocks, width)
    with cgutils.for_range(builder, builder.sub(size, done)) as loop:
        value = builder.load(builder.gep(data, [builder.add(done, loop.index)]))
        lane = builder.gep(first, [loop.index])
        builder.store(include(value, builder.load(lane)), lane)
    vector, half = builder.load(lanes), LANES // 2
    while half:
        low, high = (
            ir.Constant(ir.VectorType(index, half), list(range(start, start + half)))
            for start in (0, half)
        )
        vector = combine(
            builder.shuffle_vector(vector, vector, low),
            builder.shuffle_vector(vector, vector, high),
        )
        half //= 2
    return builder.extract_element(vector, index(0))


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    """Call one of LLVM's functions on values of one type, which ends its name."""
    kind = arguments[0].type
    scalar, lanes = (kind.element, kind.count) if isinstance(kind, ir.VectorType) else (kind, 0)
    suffix = f"{f'v{lanes}' if lanes else ''}{'f64' if scalar == ir.DoubleType() else 'f32'}"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind] * len(arguments)), f"llvm.{name}.{suffix}"
    )
    return builder.call(function, arguments)


@intrinsic  # type: ignore[untyped-decorator]
def sum_squares(typing_context: Any, address: Any, size: Any, scale: Any, like: Any) -> Any:
    """Sum ``(scale*x)**2`` over ``size`` numbers of the type of ``like``, in float64.

    Without squares that would be denormal, and slow: beside a sum that is not to be made
    again with another scale they are nothing.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        narrow, wide = context.get_value_type(like), ir.DoubleType()
        scales = _splat(builder, args[2])

        def include(value: Any, total: Any) -> Any:
            if narrow != wide:
                value = builder.fpext(value, total.type)
            value = builder.fmul(value, args[2] if total.type == wide else scales)
            if narrow == wide:
                one = total.type == wide
                small, zero = (
                    wide(x) if one else ir.Constant(total.type, [x] * LANES)
                    for x in (2.0**-511, 0.0)
                )
                is_small = builder.fcmp_ordered("<", _call(builder, "fabs", value), small)
                value = builder.select(is_small, zero, value)
            return _call(builder, "fma", value, value, total)

        return _over_lanes(builder, args[0], args[1], narrow, wide(0.0), include, builder.fadd)

    return types.float64(types.int64, types.int64, types.float64, like), codegen


@intrinsic  # type: ignore[untyped-decorator]
def largest_magnitude(typing_context: Any, address: Any, size: Any, scale: Any, like: Any) -> Any:
    """Return the largest ``abs(scale*x)`` of ``size`` numbers of the type of ``like``.

    ``scale`` is cast to that type first. NaN if any is NaN: the bits of magnitudes, as
    integers, have the order of the numbers, and NaN comes last.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        narrow = context.get_value_type(like)
        integer = ir.IntType(like.bitwidth)
        scale = args[2] if narrow == args[2].type else builder.fptrunc(args[2], narrow)
        scales = _splat(builder, scale)

        def include(value: Any, largest: Any) -> Any:
            value = builder.fmul(value, scale if largest.type == integer else scales)
            return larger(builder.bitcast(_call(builder, "fabs", value), largest.type), largest)

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_unsigned(">", a, b), a, b)

        bits = _over_lanes(builder, args[0], args[1], narrow, integer(0), include, larger)
        value = builder.bitcast(bits, narrow)
        return value if narrow == ir.DoubleType() else builder.fpext(value, ir.DoubleType())

    return types.float64(types.int64, types.int64, types.float64, like), codegen
