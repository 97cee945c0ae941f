"""Memory in which kernels run by `ptx` may not go astray, nor get in each other's way."""

import numpy as np

WORD = 4  # bytes: the smallest access
RUBBISH = 0xA5A5_A5A5


class KernelError(Exception):
    """Something that a kernel must not do."""


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
        words = -(-size // self.LINE) * self.LINE // WORD
        buffer = np.full(words + self.LINE // WORD, RUBBISH, np.uint32)
        skip = -buffer.ctypes.data % self.LINE // WORD
        self.words, self.share = buffer[skip : skip + words], share
        self.base, self.end, self.sizes = self.words.ctypes.data, self.LINE, {}
        self.owned = np.full(words, bool(share))
        # Accesses; and who has written each word last, in an interval that is counted.
        self.log, self.writers, self.interval = [], np.zeros(words, np.int64), 0

    def take(self, size):
        """Return the address of so many bytes, a line of the cache away from all others."""
        length, wrapped = (-(-size // self.LINE) + 1) * self.LINE, False
        while True:
            address = self.base + self.end
            if self.end + length <= self.words.nbytes:
                others = np.flatnonzero(self.owned[self._words(address, length)])
                if not others.size:
                    break
                self.end += -(-int(others[-1] + 2) * WORD // self.LINE) * self.LINE
            elif wrapped:
                raise MemoryError("no memory is left")
            else:  # what has been freed is used again, as late as possible
                self.end, wrapped = self.LINE, True
        self.end += length
        self.sizes[address] = size
        self.owned[self._words(address, size)] = True
        return address

    def free(self, address):
        """Take bytes back; whoever reads them finds rubbish."""
        words = self._words(address, self.sizes.pop(address))
        self.owned[words], self.words[words] = False, RUBBISH

    def check(self, address, size):
        """Raise unless all of these bytes have been handed out."""
        if address not in self or not self.owned[self._words(address, size)].all():
            raise KernelError(f"{size} bytes at {address:#x}, which nobody has")

    def __contains__(self, address):
        return self.base <= address < self.base + self.words.nbytes

    def _words(self, address, size):
        place = address - self.base
        return slice(place // WORD, -(-(place + size) // WORD))

    def view(self, address, shape, dtype, order="C"):
        """Return an array over memory that has been taken."""
        place, size = address - self.base, int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = self.words.view(np.uint8)[place : place + size]
        return raw.view(dtype).reshape(shape, order=order)

    # Accesses of kernels: an address for each thread; where their blocks are in shared memory.

    def load(self, addresses, width, threads, blocks):
        words = self._find(addresses, width, blocks)
        self.log.append((words, threads, False))
        return self.words[words]

    def store(self, addresses, values, threads, blocks):
        words = self._find(addresses, values.shape[1] * WORD, blocks)
        self.log.append((words, threads, True))
        self.words[words] = values

    def _find(self, addresses, width, blocks):
        """Return the words of accesses of so many bytes, a row for each."""
        if np.any(addresses % np.uint64(width)):
            raise KernelError(f"a misaligned access of {width} bytes")
        places = addresses if self.share else addresses - np.uint64(self.base)
        if np.any(places >= (self.share or self.words.nbytes)):
            raise KernelError("an access out of bounds")
        places = (places // np.uint64(WORD)).astype(np.int64) + blocks * (self.share // WORD)
        words = places[:, None] + np.arange(width // WORD)
        if not self.owned[words].all():
            raise KernelError("an access to memory that nobody has")
        return words

    def refuse_races(self, log, each, whose):
        """Raise if of two at a word, one has written; ``each`` is how many threads they are."""
        self.interval += 1
        log = [
            (words, (self.interval << 32) + threads[:, None] // each, writes)
            for words, threads, writes in log
        ]
        for words, mine, writes in log:
            if writes:
                self.writers[words] = mine
        for words, mine, _ in log:
            writers = self.writers[words]
            if np.any((writers >> 32 == self.interval) & (writers != mine)):
                raise KernelError(f"a race of {whose}")
