"""What every contender has in common, and those that need nothing but fastadam.

Each is used in its own fastest sensible way, with the same hyperparameters
and with its gradients in place before a step, on the CPU or on a CUDA device.
On a device all work on its default stream, and all wait in the same way: for
the whole device.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastadam.bench import arrays
from fastadam.machine import cuda_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from fastadam.bench.arrays import Arrays

__all__ = ["GRAD_SCALE", "HYPERPARAMETERS", "TAIL", "TRAFFIC", "Clipped", "Contender"]
__all__ += ["DeviceCopy", "DividerPass", "FastAdam", "FastAdamGrads", "MemoryPass", "OneByOne"]
__all__ += ["numba_threads"]

HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
# What the tail of a training step adds; the gradients are set to 0 as well.
TAIL: dict[str, Any] = {"weight_decay": 0.01, "max_grad_norm": 1.0, "ema_decay": 0.999}
# What a step reads and writes, in times the parameters' bytes; with the tail (True), the
# gradients twice and an average as well.
TRAFFIC = {False: 7, True: 11}
# With the tail on a device, fastadam unscales as well. The others are spared that: the norm is
# clipped either way, so that a factor on the gradients does not change the update.
GRAD_SCALE = {"cpu": 1.0, "cuda": 2.0}


class Contender:
    """An optimizer with parameters and gradients of its own.

    Parameters
    ----------
    params, grads : sequences of ndarray
        What it starts from; copied.
    tail : bool
        Whether `step` is the whole tail of a training step: clip, update
        with decoupled weight decay, average, zero the gradients.
    device : {"cpu", "cuda"}
        Where it works.
    """

    arrays: Arrays  # whose methods make its arrays
    params: list[Any]
    step: Callable[[], object]  # takes one step

    def __init__(
        self,
        params: Sequence[NDArray[Any]],
        grads: Sequence[NDArray[Any]],
        tail: bool,
        device: str = "cpu",
    ) -> None:
        self.tail, self.device = tail, device
        # Whether a step sets the gradients to 0, so that they are refilled before the next.
        self.clears_grads = tail
        self.grads: list[Any] = []
        # Gradients, and what they are refilled from; on a device none if no step clears them.
        self.filled: list[tuple[Any, Any]] = []
        self.setup(params, grads)

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Set `arrays`, `params` and gradients, make the optimizer and perhaps `step`."""
        raise NotImplementedError

    def wait(self) -> None:
        """Return once the steps are done."""
        if self.device == "cuda":
            arrays.synchronize()

    def remember(self, own: Sequence[Any], grads: Sequence[NDArray[Any]]) -> None:
        """Remember the gradients, and what they are filled from, if that can be needed."""
        self.grads = list(own)
        if self.arrays.on_host or self.clears_grads:
            sources = [self.arrays.source(grad) for grad in grads]
            self.filled = list(zip(own, sources, strict=True))

    def refill(self) -> None:
        """Set the gradients to what they were at first, by a plain copy, and wait for that."""
        if self.filled:
            self.arrays.copy_all(*zip(*self.filled, strict=True))
            self.wait()

    def values(self) -> list[NDArray[Any]]:
        """Return the parameters as they are now."""
        return [self.arrays.download(param) for param in self.params]

    def threads(self) -> int | None:
        """Return how many threads a large step may use, None if it does not tell."""
        return None if self.device == "cuda" else self.cpu_threads()

    def cpu_threads(self) -> int | None:
        """Return the same, on the CPU."""
        return None


class OneByOne(Contender):
    """An optimizer for each parameter, of which a step calls one after the other.

    Engines do that: optimizers in backward, torchao's ``CPUOffloadOptimizer``,
    Megatron-LM's ``HybridDeviceOptimizer``.
    """

    def __init__(self, make: type[Contender], *arguments: Any) -> None:
        self._make = make
        super().__init__(*arguments)

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make a contender of each parameter."""
        pairs = zip(params, grads, strict=True)
        self.each = [self._make([p], [g], self.tail, self.device) for p, g in pairs]
        self.arrays, self.clears_grads = self.each[0].arrays, self.each[0].clears_grads
        self.filled = [pair for one in self.each for pair in one.filled]
        self._steps = [one.step for one in self.each]

    def step(self) -> None:
        """Take a step of each."""
        for step in self._steps:
            step()

    def wait(self) -> None:
        """Return once the steps are done."""
        super().wait()  # for the whole device; on the CPU some have to be asked
        if self.device == "cpu":
            for one in self.each:
                one.wait()

    def values(self) -> list[NDArray[Any]]:
        """Return the parameters as they are now."""
        return [value for one in self.each for value in one.values()]

    def cpu_threads(self) -> int | None:
        """Return the number of one."""
        return self.each[0].cpu_threads()


class FastAdam(Contender):
    """``opt.step(grads)``, with the same arrays at each step."""

    step_options: ClassVar[dict[str, Any]] = {}  # options of a step without the tail

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make the optimizer, and gradients."""
        import fastadam

        self.arrays = arrays.choose(self.device)
        self.params = [self.arrays.upload(param) for param in params]
        maker: Any = fastadam.AdamW if self.tail else fastadam.Adam
        self.opt = maker(
            self.params, **HYPERPARAMETERS, **(TAIL if self.tail else self.step_options)
        )
        self.make_step(grads)

    def make_step(self, grads: Sequence[NDArray[Any]]) -> None:
        """Make gradients, and the step."""
        own = [self.arrays.upload(grad) for grad in grads]
        self.remember(own, grads)
        step, scale = self.opt.step, GRAD_SCALE[self.device]
        if self.tail:
            self.step = lambda: step(own, grad_scale=scale, zero_grad=True)
        else:
            self.step = lambda: step(own)

    def cpu_threads(self) -> int | None:
        """Return Numba's number."""
        return numba_threads()


def numba_threads() -> int:
    """Return on how many threads a large step of fastadam may run."""
    threads: int = import_module("numba").get_num_threads()
    return threads


class Clipped(FastAdam):
    """A step with clipping, and nothing else of the tail."""

    step_options: ClassVar[dict[str, Any]] = {"max_grad_norm": TAIL["max_grad_norm"]}


class FastAdamGrads(FastAdam):
    """``opt.step()``, with the gradients in ``opt.grads``."""

    def make_step(self, grads: Sequence[NDArray[Any]]) -> None:
        """Fill the gradients, and make the step."""
        own = [self.arrays.wrap(grad) for grad in self.opt.grads]
        self.arrays.copy_all(own, [self.arrays.source(grad) for grad in grads])
        self.remember(own, grads)
        step, scale = self.opt.step, GRAD_SCALE[self.device]
        self.step = (lambda: step(grad_scale=scale, zero_grad=True)) if self.tail else step


class MemoryPass(FastAdam):
    """The same traffic to memory, next to no arithmetic."""

    divides = False

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make the arrays; of positive numbers for those that divide."""
        from fastadam.bench.roofline import Divider, Roofline

        if self.divides:
            params, grads = ([np.abs(array) for array in each] for each in (params, grads))
        self.arrays = arrays.NumpyArrays()
        self.params, own = ([array.copy() for array in each] for each in (params, grads))
        self.remember(own, grads)
        kind = Divider if self.divides else Roofline
        self.step = kind(self.params, own, tail=self.tail).step


class DividerPass(MemoryPass):
    """The same traffic to memory, and a square root and a division for each element."""

    divides = True


class DeviceCopy(Contender):
    """A copy on the device that reads and writes as many bytes as a step must.

    Half of a step's bytes are copied, since a copy reads each byte and writes it.
    """

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:  # noqa: ARG002
        """Allocate two buffers."""
        self.driver = cuda_backend().driver
        self.params = []
        self.nbytes = TRAFFIC[self.tail] * sum(param.nbytes for param in params) // 2
        self._buffers = [self.driver.Buffer(self.nbytes) for _ in range(2)]

    def step(self) -> None:
        """Copy."""
        source, target = self._buffers
        self.driver.copy(target.address, source.address, self.nbytes, 0)
