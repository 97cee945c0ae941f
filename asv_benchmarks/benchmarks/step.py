"""Time of one step."""

import numpy as np

from .common import BACKENDS, DTYPES, WORKLOADS, draw, make, workload


class _Step:
    # asv repeats setup before every sample: short samples, or it would take most of the time.
    sample_time = 0.05
    timeout = 300
    zero_grad = False

    def prepare(self, backend, shapes, dtype, **options):
        self.params, self.grads = draw(shapes, dtype)
        self.step = make(backend, self.params, **options)
        # Compiles or loads the kernel, starts the threads, touches the state's memory.
        for _ in range(2):
            copies = [np.copy(grad) for grad in self.grads]
            self.step(copies, zero_grad=self.zero_grad)
        self.step(self.grads)


class Size(_Step):
    """One array, from the cache to memory."""

    param_names = (
        "backend",
        "size",
        "dtype",
    )
    params = (BACKENDS, [10**k for k in range(3, 8)], DTYPES)

    def setup(self, backend, size, dtype):
        self.prepare(backend, [(size,)], dtype)

    def time_step(self, *_):
        self.step(self.grads)


class Tensors(_Step):
    """The same million elements, cut into ever more arrays."""

    param_names = (
        "backend",
        "tensors",
    )
    params = (BACKENDS, [1, 10, 100, 1_000])

    def setup(self, backend, tensors):
        self.prepare(backend, tensors * [(1_000_000 // tensors,)], "float32")

    def time_step(self, *_):
        self.step(self.grads)


class Workload(_Step):
    """The shapes of models."""

    param_names = (
        "backend",
        "workload",
    )
    params = (BACKENDS, list(WORKLOADS))

    def setup(self, backend, name):
        self.prepare(backend, workload(name), "float32")

    def time_step(self, *_):
        self.step(self.grads)


class Options(_Step):
    """What a variant of the update costs, on the shapes of a small network."""

    param_names = (
        "backend",
        "option",
    )
    params = (
        BACKENDS,
        ["none", "amsgrad", "weight_decay", "fresh_grads", "zero_grad"],
    )
    # A gradient that has been set to 0 lets the averages decay: in 100 steps by 3e-5 and 6e-3,
    # in the thousands that a sample could hold, to subnormal numbers, which are slow.
    number = 100

    def setup(self, backend, option):
        options = {"amsgrad": {"amsgrad": True}, "weight_decay": {"weight_decay": 0.01}}
        self.zero_grad = option == "zero_grad"
        self.prepare(backend, workload("mlp"), "float32", **options.get(option, {}))
        # Two sets in turn, as from a function that returns new arrays: addresses must be read
        # again. Without the option, both are one.
        other = [np.copy(g) for g in self.grads] if option == "fresh_grads" else self.grads
        self.sets = [self.grads, other]
        self.turn = 0

    def time_step(self, *_):
        self.turn = 1 - self.turn
        self.step(self.sets[self.turn], zero_grad=self.zero_grad)
