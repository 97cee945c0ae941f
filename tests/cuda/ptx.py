"""Runs PTX on the host, bit by bit as a device would: for tests without a GPU.

`Program` takes the text that numba-cuda has compiled a kernel to, and executes it over a
`ptx_memory.Memory`. All threads of several blocks are the elements of NumPy arrays; those that
stand at the same instruction go on together, the ones furthest behind first.

What is checked:

- Arithmetic is that of the PTX: IEEE 754, rounded to nearest even, denormal numbers kept.
  An instruction, type or modifier that is not known here raises `UnknownPTXError`.
- An access must be aligned to its full width, and lie in memory that has been handed out.
- The order of the threads must not matter. Two threads may not use one word, one of them
  writing, without a barrier between; nor may two blocks of a launch.
- All threads of a block must reach the same barrier.
- Registers and shared memory begin with rubbish.

What is not: what `ptxas` makes of the PTX, caches, and time.
"""

import ctypes
import operator
import re
import sys

import numba
import numpy as np
from ptx_memory import WORD, KernelError, Memory

TYPES = {
    f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
    for kind, code in (("f", "f"), ("s", "i"), ("u", "u"), ("b", "u"))
    for bits in (32, 64)
} | {"pred": np.dtype(bool)}
BOOL, U32, U64 = TYPES["pred"], TYPES["u32"], TYPES["u64"]
RUBBISH = 0xA5A5_A5A5_A5A5_A5A5
# Threads that are run at a time: so many blocks as have as many.
MOST_THREADS = 8192


class UnknownPTXError(Exception):
    """A text that has no meaning here."""


# Arithmetic.


def c_function(name, c_type, dtype):
    """Make a ufunc of the C library's: the fused multiply-add is rounded once there."""
    function = getattr(ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None), name)
    function.restype, function.argtypes = c_type, (c_type,) * 3
    return numba.vectorize([dtype(dtype, dtype, dtype)])(lambda a, b, c: function(a, b, c))


FMA = {
    np.dtype("f4"): c_function("fmaf", ctypes.c_float, numba.float32),
    np.dtype("f8"): c_function("fma", ctypes.c_double, numba.float64),
}


def divide(a, b):
    """Divide integers, towards 0."""
    if np.any(b == 0):
        raise KernelError("an integer is divided by 0")
    quotient = a // b
    return quotient + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


def wider(dtype):
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def multiply_wide(a, b):
    return a.astype(wider(a.dtype)) * b.astype(wider(b.dtype))


def shift_left(a, by):
    return np.where(by < 8 * a.itemsize, a << by.astype(a.dtype), a.dtype.type(0))


def shift_right(a, by):
    """Shift in zeros, or the sign of a signed type, by any number of places."""
    most = 8 * a.itemsize - 1
    shifted = a >> np.minimum(by, most).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by > most, a.dtype.type(0), shifted)


# By name and modifiers. A sum or product that names no rounding is rounded to nearest as well,
# but may be fused: see `refuse_fusions`.
FLOATS = {
    "add": np.add, "add.rn": np.add, "sub": np.subtract, "sub.rn": np.subtract,
    "mul": np.multiply, "mul.rn": np.multiply, "div.rn": np.divide, "sqrt.rn": np.sqrt,
    "rcp.rn": np.reciprocal, "neg": np.negative, "abs": np.abs, "mov": np.array,
    "fma.rn": lambda a, b, c: FMA[a.dtype](a, b, c),
}  # fmt: skip
INTEGERS = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "mul.wide": multiply_wide,
    "mad.lo": lambda a, b, c: a * b + c, "div": divide, "rem": lambda a, b: a - divide(a, b) * b,
    "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": shift_left, "shr": shift_right, "mov": np.array,
}  # fmt: skip
COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def comparison(name, dtype):
    """Return what compares; of floats, a name that ends in "u" is true if either is NaN."""
    if dtype.kind != "f":
        return COMPARISONS[name]
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    compare, unordered = COMPARISONS[name.removesuffix("u")], name.endswith("u")
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), unordered, compare(a, b))


def conversion(modifiers, target, source):
    """Return what converts between integers, or from one float to another."""
    narrows = target.kind == "f" and target.itemsize < source.itemsize
    if (target.kind == "f") != (source.kind == "f") or modifiers != ["rn"] * narrows:
        raise UnknownPTXError("conversion")
    return lambda a: a.astype(target)


def meaning(name, words, count):
    """Return the result's type, those of ``count`` operands, and the function."""
    *modifiers, kind = words
    dtype = TYPES[kind]
    if name == "setp":
        (compared,) = modifiers
        return BOOL, [dtype, dtype], comparison(compared, dtype)
    if name == "selp" and not modifiers:
        return dtype, [dtype, dtype, BOOL], lambda a, b, chosen: np.where(chosen, a, b)
    if name == "cvt":
        target = TYPES[modifiers.pop()]
        return target, [dtype], conversion(modifiers, target, dtype)
    function = (FLOATS if dtype.kind == "f" else INTEGERS)[".".join([name, *modifiers])]
    types = [dtype, U32] if name in ("shl", "shr") else [dtype] * count
    return wider(dtype) if modifiers == ["wide"] else dtype, types, function


# Programs.


class Instruction:
    """One, taken apart: ``@guard name.words operands``."""

    def __init__(self, text):
        self.text = " ".join(text.split())
        found = re.fullmatch(r"(?:@(!?)(%\w+) )?([a-z]+)((?:\.\w+)*) ?([^;]*);", self.text)
        if not found:
            raise UnknownPTXError(self.text)
        negated, self.guard, self.name, dotted, operands = found.groups()
        self.negated, self.words = bool(negated), dotted.split(".")[1:]
        self.operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)
        self.run = None


def names_in(operand):
    """Return the parts of an operand in braces, or the operand."""
    return [name.strip() for name in operand.strip("{}").split(",")]


class Program:
    """A kernel's PTX.

    Parameters
    ----------
    text : str
        With one entry point, whose arguments are all 64 bits wide.

    Attributes
    ----------
    source, text : str
        What was given; the same without its target, and without names that tell one
        compilation from another.
    """

    def __init__(self, text):
        self.source = text
        text = re.sub(r"//[^\n]*", "", text.rstrip("\0"))
        entries = re.findall(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{(.*)\}", text, re.DOTALL)
        if len(entries) != 1 or ".func" in text:
            raise UnknownPTXError("not one entry point")
        self.name, params, bounds, body = entries[0]
        self.text = re.sub(r"(smem_)\d+|\.target.*", r"\1", text.replace(self.name, "kernel"))
        self.params = re.findall(r"\.param\s+\.u64\s+(\w+)", params)
        if len(self.params) != params.count(".param"):
            raise UnknownPTXError("arguments that are not 64 bits wide")
        (self.most_threads,) = map(int, re.findall(r"\.maxntid\s+(\d+)", bounds) or [1024])
        self.shared_size, self.symbols = 0, {}
        for symbol, size in re.findall(r"\.shared\s+\.align\s+8\s+\.b8\s+(\w+)\[(\d+)\]", text):
            self.symbols[symbol], self.shared_size = self.shared_size, self.shared_size + int(size)
        if len(self.symbols) != text.count(".shared .align") or self.shared_size % 16:
            raise UnknownPTXError("shared memory")
        # Of what stands before a register's number; registers of inner braces are not reused.
        self.declared = {"temp": U32}
        for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+%([a-z]+)<\d+>;", body):
            self.declared[prefix] = BOOL if kind == "pred" else TYPES[f"b{kind[1:]}"]
        self.code, self.labels = [], {}
        for line in map(str.strip, body.splitlines()):
            if re.fullmatch(r"\$\w+:", line):
                self.labels[line.rstrip(":")] = len(self.code)
            elif line not in ("", "{", "}") and not line.startswith(
                (".reg", ".shared", ".pragma")
            ):
                self.code.append(Instruction(line))
        for instruction in self.code:
            if instruction.name not in ("bra", "ret", "bar"):
                instruction.run = self._decode(instruction)
        refuse_fusions(self.code)

    # Of an operand, a function of a batch of blocks and of the threads that are meant. Two
    # registers in braces are the halves of 64 bits.

    def type_of(self, register):
        return self.declared[re.fullmatch(r"%([a-z]+)\d*", register)[1]]

    def _type_as(self, register, dtype):
        """Return the type that a register is kept as, if it can be used as another."""
        own = self.type_of(register)
        if own.itemsize != dtype.itemsize or (own == BOOL) != (dtype == BOOL):
            raise UnknownPTXError(f"{register} as {dtype}")
        return own

    def _source(self, operand, dtype):
        if operand in ("%tid.x", "%ntid.x", "%ctaid.x"):
            return lambda batch, lanes: batch.special[operand][lanes].view(dtype)
        if operand.startswith("{"):
            low, high = (self._source(half, U32) for half in names_in(operand))
            return lambda *at: high(*at).astype(U64) << U64.type(32) | low(*at).astype(U64)
        if operand.startswith("%"):
            self._type_as(operand, dtype)
            return lambda batch, lanes: batch.register(operand)[lanes].view(dtype)
        if operand in self.symbols:
            number = self.symbols[operand]
        elif dtype.kind == "f":  # its bits
            number = int(re.fullmatch(f"0{dtype.char}([0-9A-F]+)", operand)[1], 16)
        else:
            number = int(operand) % (1 << 8 * dtype.itemsize)
        value = np.dtype(f"u{dtype.itemsize}").type(number)
        value = value.astype(BOOL) if dtype == BOOL else value.view(dtype)
        return lambda *_: value

    def _target(self, operand, dtype):
        if operand.startswith("{"):
            low, high = (self._target(half, U32) for half in names_in(operand))

            def split(batch, lanes, value):
                low(batch, lanes, value.astype(U32))
                high(batch, lanes, (value >> U64.type(32)).astype(U32))

            return split
        own = self._type_as(operand, dtype)

        def write(batch, lanes, value):
            assert value.dtype == dtype
            batch.register(operand)[lanes] = value.view(own)

        return write

    # Of an instruction, what runs it.

    def _decode(self, i):
        try:
            return getattr(self, f"_decode_{i.name}", self._decode_plain)(i)
        except (UnknownPTXError, KeyError, ValueError, IndexError, TypeError) as error:
            raise UnknownPTXError(f"{i.text} ({error!r})") from error

    def _decode_plain(self, i):
        target, *sources = i.operands
        result, types, function = meaning(i.name, i.words, len(sources))
        write = self._target(target, result)
        reads = [self._source(*pair) for pair in zip(sources, types, strict=True)]

        def run(batch, lanes):
            write(batch, lanes, function(*[read(batch, lanes) for read in reads]))

        return run

    def _decode_nanosleep(self, i):
        if i.words != ["u32"]:
            raise UnknownPTXError(i.text)
        return lambda *_: None

    def _decode_ld(self, i):
        space, *modifiers, kind = i.words
        target, place = i.operands
        if space == "param" and not modifiers:
            dtype, index = TYPES[kind], self.params.index(place.strip("[]"))
            write = self._target(target, dtype)  # of a wider argument, the lower half
            return lambda batch, lanes: write(batch, lanes, batch.arguments[index].astype(dtype))
        names, dtype, find = self._access(space, modifiers, kind, target, place)
        writes = [self._target(name, dtype) for name in names]

        def load(batch, lanes):
            memory, addresses, *at = find(batch, lanes)
            words = memory.load(addresses, len(names) * dtype.itemsize, *at).view(dtype)
            for k, write in enumerate(writes):
                write(batch, lanes, words[:, k])

        return load

    def _decode_st(self, i):
        space, *modifiers, kind = i.words
        place, value = i.operands
        names, dtype, find = self._access(space, modifiers, kind, value, place)
        reads = [self._source(name, dtype) for name in names]

        def store(batch, lanes):
            memory, addresses, *at = find(batch, lanes)
            values = np.empty((addresses.size, len(names)), dtype)
            for k, read in enumerate(reads):
                values[:, k] = read(batch, lanes)
            memory.store(addresses, values.view(np.uint32), *at)

        return store

    def _access(self, space, modifiers, kind, value, place):
        """Return the registers, their type, and what finds memory, addresses and threads."""
        count = {"": 1, "v2": 2, "v4": 4}[".".join(modifiers)]
        names = names_in(value)
        base, offset = re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?\]", place).groups("0")
        if space not in ("global", "shared") or len(names) != count:
            raise UnknownPTXError("access")
        base, offset = self._source(base, U64), U64.type(int(offset) % (1 << 64))

        def find(batch, lanes):
            threads = batch.threads[lanes]
            addresses = np.broadcast_to(base(batch, lanes) + offset, threads.shape)
            memory = batch.memory if space == "global" else batch.shared
            return memory, addresses, threads, batch.blocks[lanes]

        return names, TYPES[kind], find

    # Running.

    def launch(self, memory, blocks, threads, arguments):
        """Run all blocks, of so many threads each."""
        if not 0 < threads <= self.most_threads or not 0 < blocks < 1 << 31:
            raise KernelError(f"{blocks} blocks of {threads} threads")
        if len(arguments) != len(self.params):
            raise KernelError(f"{len(arguments)} arguments")
        most, log = max(1, MOST_THREADS // threads), []
        with np.errstate(all="ignore"):
            for first in range(0, blocks, most):
                some = range(first, min(first + most, blocks))
                self._run(Batch(self, memory, some, threads, arguments), log)
        memory.refuse_races(log, threads, "blocks")

    def _run(self, batch, log):
        end, starts = len(self.code), {*self.labels.values(), len(self.code)}
        while True:
            at, lanes = batch.next(end)
            if lanes is None:  # all have ended, or wait at a barrier
                for memory in (batch.memory, batch.shared):
                    memory.refuse_races(memory.log, 1, "threads")
                log += batch.memory.log
                batch.memory.log, batch.shared.log = [], []
                if not batch.pass_barrier():
                    return
                continue
            lanes = slice(None) if lanes.size == batch.threads.size else lanes
            while True:
                i = self.code[at]
                at += 1
                chosen = batch.where(i, lanes)
                if i.run is None:
                    break
                try:
                    i.run(batch, chosen)
                except KernelError as error:
                    raise KernelError(f"{error}: {i.text}") from None
                if at in starts:
                    break
            batch.places[lanes] = at
            if i.run is None:
                self._go_on(i, batch, chosen, end)

    def _go_on(self, i, batch, lanes, end):
        """Do what changes where threads are."""
        if i.name == "bra" and i.words in ([], ["uni"]):
            batch.places[lanes] = self.labels[i.operands[0]]
        elif i.name == "ret" and not i.words:
            batch.places[lanes] = end
        elif i.name == "bar" and i.words == ["sync"] and i.operands == ["0"]:
            batch.waiting[lanes] = True
        else:
            raise UnknownPTXError(i.text)


class Batch:
    """Some blocks of a launch, while they run: a thread is an element of every array."""

    def __init__(self, program, memory, blocks, threads, arguments):
        self.program, self.memory = program, memory
        self.arguments = np.array([int(each) for each in arguments], np.int64).view(U64)
        self.shape, share = (len(blocks), threads), program.shared_size or WORD
        self.shared, size = Memory(share * len(blocks), share), len(blocks) * threads
        self.blocks = np.repeat(np.arange(len(blocks)), threads)
        self.threads = blocks.start * threads + np.arange(size)
        self.special = {
            "%tid.x": np.tile(np.arange(threads, dtype=U32), len(blocks)),
            "%ctaid.x": np.repeat(np.arange(blocks.start, blocks.stop, dtype=U32), threads),
            "%ntid.x": np.full(size, threads, U32),
        }
        self.places, self.waiting = np.zeros(size, np.int64), np.zeros(size, bool)
        self._registers = {}

    def register(self, name):
        """Return a register of all threads, with rubbish in it if it is new."""
        if name not in self._registers:
            rubbish = U64.type(RUBBISH).astype(self.program.type_of(name))
            self._registers[name] = np.full(self.places.size, rubbish)
        return self._registers[name]

    def where(self, i, lanes):
        """Return those of the threads for which an instruction's guard holds."""
        if i.guard is None:
            return lanes
        holds = self.register(i.guard)[lanes] != i.negated
        return np.arange(self.places.size)[lanes][holds]

    def next(self, end):
        """Return the first place where threads are that can go on, and these."""
        ready = np.flatnonzero(~self.waiting & (self.places < end))
        if not ready.size:
            return end, None
        at = int(self.places[ready].min())
        return at, ready[self.places[ready] == at]

    def pass_barrier(self):
        """Let those go on who wait; return whether there are any."""
        waiting, places = self.waiting.reshape(self.shape), self.places.reshape(self.shape)
        some = waiting.any(axis=1)
        if not (waiting[some].all() and (places[some] == places[some][:, :1]).all()):
            raise KernelError("a barrier that not all threads of a block reach")
        self.waiting[:] = False
        return bool(some.any())


def refuse_fusions(code):
    """Raise where a product meets a sum that ptxas could make one of: both name no rounding."""
    products, before = set(), None
    while products != before:
        before = set(products)
        for i in code:
            if i.words in (["f32"], ["f64"]) and (
                i.name == "mul" or (i.name in ("mov", "neg", "abs") and i.operands[1] in products)
            ):
                products.add(i.operands[0])
    for i in code:
        sums = i.name in ("add", "sub") and i.words in (["f32"], ["f64"])
        if sums and not products.isdisjoint(i.operands):
            raise UnknownPTXError(f"a product that may be fused or not: {i.text}")
