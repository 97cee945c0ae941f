"""Runs PTX on the host, bit by bit as a device would: for tests without a GPU.

`Program` takes the text that numba-cuda has compiled a kernel to, and executes it over a
`Memory`. All threads of several blocks are the elements of NumPy arrays; those that stand at
the same instruction go on together, the ones furthest behind first.

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
from types import SimpleNamespace

import numba
import numpy as np

TYPES = {
    f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
    for kind, code in (("f", "f"), ("s", "i"), ("u", "u"), ("b", "u"))
    for bits in (32, 64)
} | {"pred": np.dtype(bool)}
BOOL, U32, U64 = TYPES["pred"], TYPES["u32"], TYPES["u64"]
WORD = 4  # bytes: the smallest access
RUBBISH = 0xA5A5_A5A5_A5A5_A5A5
# Threads that are run at a time: so many blocks as have as many.
MOST_THREADS = 8192


class UnknownPTXError(Exception):
    """A text that has no meaning here."""


class KernelError(Exception):
    """Something that a kernel must not do."""


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


def multiply_wide(a, b):
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


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
    wide = np.dtype(f"{dtype.kind}{dtype.itemsize * (1 + ('wide' in modifiers))}")
    return wide if "wide" in modifiers else dtype, types, function


# Memory.


class Memory:
    """Bytes at addresses of this process, of which kernels may use what has been handed out.

    Parameters
    ----------
    size : int
        In bytes.
    share : int, optional
        Of shared memory: the bytes of each block, which have addresses from 0.
    """

    LINE = 128

    def __init__(self, size, share=0):
        words = -(-size // WORD)
        buffer = np.full(words + self.LINE // WORD, RUBBISH & 0xFFFF_FFFF, np.uint32)
        skip = -buffer.ctypes.data % self.LINE // WORD
        self.words, self.share = buffer[skip : skip + words], share
        self.base, self.end = self.words.ctypes.data, self.LINE
        self.owned = np.full(words, bool(share))
        self.sizes = {}
        # Who has written each word last: in an interval that is counted, and its number there.
        self.writers, self.interval, self.log = np.zeros(words, np.int64), 0, []

    def take(self, size):
        """Return the address of so many bytes, a line of the cache away from all others."""
        length, wrapped = (-(-size // self.LINE) + 1) * self.LINE, False
        while True:
            if self.end + length <= self.words.nbytes:
                others = np.flatnonzero(self.owned[self.end // WORD : (self.end + length) // WORD])
                if not others.size:
                    break
                self.end += -(-int(others[-1] + 2) * WORD // self.LINE) * self.LINE
            elif wrapped:
                raise MemoryError("no memory is left")
            else:  # what has been freed is used again, as late as possible
                self.end, wrapped = self.LINE, True
        address = self.base + self.end
        self.end += length
        self.sizes[address] = size
        self._mark(address, True)
        return address

    def free(self, address):
        """Take bytes back; whoever reads them finds rubbish."""
        place, size = self._mark(address, False), self.sizes.pop(address)
        self.words[place // WORD : -(-(place + size) // WORD)] = RUBBISH & 0xFFFF_FFFF

    def _mark(self, address, owned):
        place = address - self.base
        self.owned[place // WORD : -(-(place + self.sizes[address]) // WORD)] = owned
        return place

    def __contains__(self, address):
        return self.base <= address < self.base + self.words.nbytes

    def check(self, address, size):
        """Raise unless all of these bytes have been handed out."""
        place = address - self.base
        if address not in self or not self.owned[place // WORD : -(-(place + size) // WORD)].all():
            raise KernelError(f"{size} bytes at {address:#x}, which nobody has")

    def view(self, address, shape, dtype, order="C"):
        """Return an array over memory that has been taken."""
        place, size = address - self.base, int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = self.words.view(np.uint8)[place : place + size]
        return raw.view(dtype).reshape(shape, order=order)

    def _find(self, addresses, width, blocks):
        """Return the words of accesses of so many bytes, one row for each thread."""
        if np.any(addresses % U64.type(width)):
            raise KernelError(f"a misaligned access of {width} bytes")
        places = addresses if self.share else addresses - U64.type(self.base)
        if np.any(places >= (self.share or self.words.nbytes)):
            raise KernelError("an access out of bounds")
        places = (places // U64.type(WORD)).astype(np.int64) + blocks * (self.share // WORD)
        words = places[:, None] + np.arange(width // WORD)
        if not self.owned[words].all():
            raise KernelError("an access to memory that nobody has")
        return words

    def load(self, addresses, width, at):
        words = self._find(addresses, width, at.blocks)
        self.log.append((words, at.threads, False))
        return self.words[words]

    def store(self, addresses, values, at):
        words = self._find(addresses, values.shape[1] * WORD, at.blocks)
        self.log.append((words, at.threads, True))
        self.words[words] = values

    def refuse_races(self, log, each, whose):
        """Raise if of two at a word, one has written; ``each`` is how many threads they are."""
        self.interval += 1
        log = [(words, (self.interval << 32) + threads[:, None] // each, writes)
               for words, threads, writes in log]  # fmt: skip
        for words, mine, writes in log:
            if writes:
                self.writers[words] = mine
        for words, mine, _ in log:
            writers = self.writers[words]
            if np.any((writers >> 32 == self.interval) & (writers != mine)):
                raise KernelError(f"a race of {whose}")


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
        most = re.search(r"\.maxntid\s+(\d+)", bounds)
        self.most_threads = int(most[1]) if most else 1024
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

    # Of an operand, a function of a batch of blocks and of the threads that are meant.

    def _type_of(self, register):
        return self.declared[re.fullmatch(r"%([a-z]+)\d*", register)[1]]

    def _source(self, operand, dtype):
        if operand.startswith("%"):
            if operand in ("%tid.x", "%ntid.x", "%ctaid.x"):
                return lambda batch, lanes: batch.special[operand][lanes].view(dtype)
            own = self._type_of(operand)
            if own.itemsize != dtype.itemsize or (own == BOOL) != (dtype == BOOL):
                raise UnknownPTXError(f"{operand} as {dtype}")
            return lambda batch, lanes: batch.registers(operand)[lanes].view(dtype)
        if operand in self.symbols:
            value = dtype.type(self.symbols[operand])
        else:  # a float is written as its bits
            raw = np.dtype(f"u{dtype.itemsize}")
            found = re.fullmatch(f"0{dtype.char}([0-9A-F]+)", operand) if dtype.kind == "f" else ""
            number = int(operand) % (1 << 8 * raw.itemsize) if found == "" else int(found[1], 16)
            value = dtype.type(number) if dtype == BOOL else raw.type(number).view(dtype)
        return lambda *_: value

    def _target(self, operand, dtype):
        own = self._type_of(operand)
        if own.itemsize != dtype.itemsize or (own == BOOL) != (dtype == BOOL):
            raise UnknownPTXError(f"{dtype} to {operand}")

        def write(batch, lanes, value):
            batch.registers(operand)[lanes] = value.astype(dtype, copy=False).view(own)

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

    def _decode_mov(self, i):
        """Also of two halves to a whole, and back."""
        target, source = i.operands
        if "{" not in i.text:
            return self._decode_plain(i)
        (kind,) = i.words
        if kind != "b64":
            raise UnknownPTXError("halves")
        if source.startswith("{"):
            halves = [half.strip() for half in source.strip("{}").split(",")]
            write, low, high = self._target(target, U64), *(self._source(h, U32) for h in halves)

            def join(batch, lanes):
                whole = high(batch, lanes).astype(U64) << U64.type(32)
                write(batch, lanes, whole | low(batch, lanes).astype(U64))

            return join
        halves = [half.strip() for half in target.strip("{}").split(",")]
        read, low, high = self._source(source, U64), *(self._target(h, U32) for h in halves)

        def split(batch, lanes):
            whole = read(batch, lanes)
            low(batch, lanes, whole.astype(U32))
            high(batch, lanes, (whole >> U64.type(32)).astype(U32))

        return split

    def _decode_nanosleep(self, i):
        if i.words != ["u32"]:
            raise UnknownPTXError(i.text)
        return lambda *_: None

    def _decode_ld(self, i):
        space, *modifiers, kind = i.words
        target, place = i.operands
        if space == "param":
            if modifiers or kind not in ("u32", "u64"):
                raise UnknownPTXError("parameter")
            write, index = self._target(target, TYPES[kind]), self.params.index(place.strip("[]"))
            mask = (1 << 8 * TYPES[kind].itemsize) - 1  # the lower half comes first
            return lambda batch, lanes: write(
                batch, lanes, TYPES[kind].type(batch.arguments[index] & mask)
            )
        names, dtype, find = self._access(space, modifiers, kind, target, place)
        writes = [self._target(name, dtype) for name in names]

        def load(batch, lanes):
            memory, addresses, at = find(batch, lanes)
            words = memory.load(addresses, len(names) * dtype.itemsize, at).view(dtype)
            for k, write in enumerate(writes):
                write(batch, lanes, words[:, k])

        return load

    def _decode_st(self, i):
        space, *modifiers, kind = i.words
        place, value = i.operands
        names, dtype, find = self._access(space, modifiers, kind, value, place)
        reads = [self._source(name, dtype) for name in names]

        def store(batch, lanes):
            memory, addresses, at = find(batch, lanes)
            values = np.empty((addresses.size, len(names)), dtype)
            for k, read in enumerate(reads):
                values[:, k] = read(batch, lanes)
            memory.store(addresses, values.view(np.uint32), at)

        return store

    def _access(self, space, modifiers, kind, value, place):
        """Return the registers, their type, and what finds memory, addresses and threads."""
        count = {"": 1, "v2": 2, "v4": 4}[".".join(modifiers)]
        names = [name.strip() for name in value.strip("{}").split(",")]
        base, offset = re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?\]", place).groups("0")
        if space not in ("global", "shared") or len(names) != count:
            raise UnknownPTXError("access")
        base, offset = self._source(base, U64), U64.type(int(offset) % (1 << 64))

        def find(batch, lanes):
            threads = batch.threads[lanes]
            addresses = np.broadcast_to(base(batch, lanes) + offset, threads.shape)
            memory = batch.memory if space == "global" else batch.shared
            return memory, addresses, SimpleNamespace(threads=threads, blocks=batch.blocks[lanes])

        return names, TYPES[kind], find

    # Running.

    def launch(self, memory, blocks, threads, arguments):
        """Run all blocks, of so many threads each."""
        if not 0 < threads <= self.most_threads or not 0 < blocks < 1 << 31:
            raise KernelError(f"{blocks} blocks of {threads} threads")
        if len(arguments) != len(self.params):
            raise KernelError(f"{len(arguments)} arguments")
        most = max(1, MOST_THREADS // threads)
        log = []
        with np.errstate(all="ignore"):
            for first in range(0, blocks, most):
                batch = Batch(self, memory, range(first, min(first + most, blocks)), threads)
                batch.special["%ntid.x"][:], batch.arguments = threads, arguments
                self._run(batch, log)
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

    def __init__(self, program, memory, blocks, threads):
        self.program, self.memory = program, memory
        self.shape = len(blocks), threads
        size = len(blocks) * threads
        self.shared = Memory(program.shared_size * len(blocks), program.shared_size or WORD)
        self.blocks = np.repeat(np.arange(len(blocks)), threads)
        self.threads = blocks.start * threads + np.arange(size)
        self.special = {
            "%tid.x": np.tile(np.arange(threads, dtype=U32), len(blocks)),
            "%ctaid.x": np.repeat(np.arange(blocks.start, blocks.stop, dtype=U32), threads),
            "%ntid.x": np.empty(size, U32),
        }
        self.places, self.waiting = np.zeros(size, np.int64), np.zeros(size, bool)
        self._registers = {}

    def registers(self, name):
        """Return a register of all threads, with rubbish in it if it is new."""
        if name not in self._registers:
            dtype = self.program._type_of(name)
            rubbish = np.array(RUBBISH, U64).astype(dtype)
            self._registers[name] = np.full(self.places.size, rubbish)
        return self._registers[name]

    def where(self, i, lanes):
        """Return those of the threads for which an instruction's guard holds."""
        if i.guard is None:
            return lanes
        holds = self.registers(i.guard)[lanes] != i.negated
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
