"""What a CUDA kernel is made of that Python has no word for, for numba-cuda's compiler.

Memory is named by plain addresses, so that a launch has few arguments to prepare. The
storage type of an access is that of its argument ``like``, or of the value stored: a
narrower type needs no other primitive, only the conversion around it.
"""

import math
from typing import Any

from llvmlite import ir
from numba.cuda import libdevice, types
from numba.cuda.extending import intrinsic

root = math  # whose sqrt is rounded correctly, unless fastmath is asked for
mul = libdevice.dmul_rn  # in float64: the compiler may fuse other products with additions

# NVPTX's address space of device memory, and the widest access, in bytes.
_GLOBAL, _WIDEST = 1, 16


def _no_value(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return context.get_dummy_value()


def _pointer(context: Any, builder: Any, address: Any, index: Any, dtype: Any) -> Any:
    kind = context.get_value_type(dtype)
    return builder.gep(builder.inttoptr(address, kind.as_pointer(_GLOBAL)), [index])


def _vectors(context: Any, builder: Any, first: Any, dtype: Any) -> Any:
    """Return the widest accesses that take 4 elements: elements and bytes in each, pointers."""
    kind = context.get_value_type(dtype)
    width = min(4, _WIDEST // context.get_abi_sizeof(kind))
    wide = ir.VectorType(kind, width).as_pointer(_GLOBAL)
    pointers = [
        builder.bitcast(builder.gep(first, [ir.IntType(64)(start)]), wide)
        for start in range(0, 4, width)
    ]
    return width, width * context.get_abi_sizeof(kind), pointers


@intrinsic  # type: ignore[untyped-decorator]
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a*b + c``, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return a(a, a, a), codegen


@intrinsic  # type: ignore[untyped-decorator]
def only_if(typing_context: Any, flag: Any, value: Any) -> Any:
    """Return ``value``, or None where ``flag`` is None, as in `cpu.intrinsics`."""
    if isinstance(flag, types.NoneType):
        return types.none(flag, value), _no_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[1]

    return value(flag, value), codegen


@intrinsic  # type: ignore[untyped-decorator]
def convert(typing_context: Any, value: Any, like: Any) -> Any:
    """Return the value in the type of ``like``, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[0], signature.args[0], like)

    return like(value, like), codegen


@intrinsic  # type: ignore[untyped-decorator]
def load(typing_context: Any, address: Any, index: Any, like: Any) -> Any:
    """Read element ``index``, of the type of ``like``; None at an address of None."""
    if isinstance(address, types.NoneType):
        return types.none(address, index, like), _no_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, args[0], args[1], like))

    return like(types.int64, types.int64, like), codegen


@intrinsic  # type: ignore[untyped-decorator]
def store(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Write element ``index``; nothing at an address of None."""
    if isinstance(address, types.NoneType):
        return types.none(address, index, value), _no_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, args[0], args[1], value))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, value), codegen


@intrinsic  # type: ignore[untyped-decorator]
def load4(typing_context: Any, address: Any, index: Any, like: Any) -> Any:
    """Read 4 elements from ``index`` on, in accesses of 16 bytes, to which they are aligned."""
    if isinstance(address, types.NoneType):
        four = types.UniTuple(types.none, 4)

        def nothing(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return context.make_tuple(builder, four, [context.get_dummy_value()] * 4)

        return four(address, index, like), nothing

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = _pointer(context, builder, args[0], args[1], like)
        width, size, pointers = _vectors(context, builder, first, like)
        values = []
        for pointer in pointers:
            vector = builder.load(pointer, align=size)
            values += [builder.extract_element(vector, ir.IntType(32)(k)) for k in range(width)]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(like, 4)(types.int64, types.int64, like), codegen


@intrinsic  # type: ignore[untyped-decorator]
def store4(typing_context: Any, address: Any, index: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Write 4 elements from ``index`` on, in the same manner."""
    if isinstance(address, types.NoneType):
        return types.none(address, index, a, b, c, d), _no_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = _pointer(context, builder, args[0], args[1], a)
        width, size, pointers = _vectors(context, builder, first, a)
        for place, pointer in enumerate(pointers):
            vector = ir.Constant(pointer.type.pointee, ir.Undefined)
            for k in range(width):
                value = args[2 + place * width + k]
                vector = builder.insert_element(vector, value, ir.IntType(32)(k))
            builder.store(vector, pointer, align=size)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, a, a, a, a), codegen
