"""Every optimizer that is compared on a CUDA device, behind `Contender`'s interface.

As on the CPU, each is used in its own fastest sensible way. All work on the
device's default stream, and all wait in the same way: for the whole device.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from fastadam.bench import cuda_library
from fastadam.bench.contenders import (
    HYPERPARAMETERS,
    TAIL,
    Contender,
    Torch,
    TorchForeach,
    TorchFused,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = [
    "GRAD_SCALE",
    "CupyKernel",
    "CupyWrittenOut",
    "DeviceCopy",
    "FastAdamCuda",
    "FastAdamGradsCuda",
    "TorchForeachCuda",
    "TorchFusedCuda",
]

# With the tail, fastadam unscales as well. The others are spared that: the norm is clipped
# either way, so that a factor on the gradients does not change the update.
GRAD_SCALE = 2.0
# What the ElementwiseKernel does with each element, m and v updated in place.
ADAM = """
    m += (g - m) * one_minus_beta1;
    v += (g * g - v) * one_minus_beta2;
    p -= step_size * m / (sqrt(v) * inv_sqrt_bias2 + eps);
"""


class OnDevice(Contender):
    """What contenders on a device have in common."""

    library: Any
    params: list[Any]

    def wait(self) -> None:
        """Return once the device has done all its work."""
        cuda_library.synchronize()

    def keep(self, own: Sequence[Any], grads: Sequence[NDArray[Any]]) -> None:
        """Remember what the gradients were, on the device, if a step clears them."""
        self.clears_grads = self.tail
        self._own = list(own)
        self._sources = [self.library.upload(grad) for grad in grads] if self.tail else []

    def refill(self) -> None:
        """Set the gradients to what they were at first, and wait for that."""
        if self._sources:
            self.library.copy_all(self._own, self._sources)
            self.wait()

    def values(self) -> list[NDArray[Any]]:
        """Return copies of the parameters, on the host."""
        return [self.library.download(param) for param in self.params]


class FastAdamCuda(OnDevice):
    """``opt.step(grads)``, with the same arrays at each step."""

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make the optimizer, and gradients."""
        self._make(params)
        own = [self.library.upload(grad) for grad in grads]
        self.keep(own, grads)
        step = self.opt.step
        if self.tail:
            self._bind(lambda: step(own, grad_scale=GRAD_SCALE, zero_grad=True))
        else:
            self._bind(lambda: step(own))

    def _make(self, params: Sequence[NDArray[Any]]) -> None:
        import fastadam

        self.library = cuda_library.choose()
        self.params = [self.library.upload(param) for param in params]
        maker: Any = fastadam.AdamW if self.tail else fastadam.Adam
        self.opt = maker(self.params, **HYPERPARAMETERS, **(TAIL if self.tail else {}))

    def _bind(self, step: Callable[[], object]) -> None:
        self.step = step  # type: ignore[method-assign]


class FastAdamGradsCuda(FastAdamCuda):
    """``opt.step()``, with the gradients in ``opt.grads``."""

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make the optimizer; fill its gradients."""
        self._make(params)
        own = [self.library.wrap(grad) for grad in self.opt.grads]
        self.library.copy_all(own, [self.library.upload(grad) for grad in grads])
        self.keep(own, grads)
        step = self.opt.step
        if self.tail:
            self._bind(lambda: step(grad_scale=GRAD_SCALE, zero_grad=True))
        else:
            self._bind(step)


class DeviceCopy(OnDevice):
    """A copy on the device that reads and writes as many bytes as a step must.

    A step moves 7 times a parameter's bytes, with the tail 11 times: half of
    them are copied, since a copy reads each byte and writes it.
    """

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:  # noqa: ARG002
        """Allocate two buffers."""
        from fastadam.bench.tables import TAIL_TRAFFIC, TRAFFIC

        self.device = device = import_module("fastadam.cuda.launch")
        self.library = cuda_library.NumbaLibrary()
        self.params = []
        self.keep([], [])
        traffic = TAIL_TRAFFIC if self.tail else TRAFFIC
        self.nbytes = traffic * sum(param.nbytes for param in params) // 2
        self._buffers = [device.allocate(self.nbytes) for _ in range(2)]
        self._places = [device.address_of_buffer(buffer) for buffer in self._buffers]
        for place in self._places:
            device.clear(place, self.nbytes, 0)

    def step(self) -> None:
        """Copy."""
        source, target = self._places
        self.device.copy(target, source, self.nbytes, 0)


class TorchCuda(OnDevice, Torch):
    """A torch optimizer; ``.grad`` is set once."""

    clip: ClassVar[dict[str, bool]] = {"foreach": True}

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make tensors and the optimizer."""
        self.library = cuda_library.TorchLibrary()
        self.torch = self.library.torch
        self.params = [self.library.upload(param).requires_grad_() for param in params]
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = self.library.upload(grad)
        self.keep([param.grad for param in self.params], grads)
        self._begin()

    def threads(self) -> int | None:
        """Return None: the device has its own."""
        return None


class TorchFusedCuda(TorchCuda):
    """``torch.optim.Adam(fused=True)``."""

    kernel: ClassVar[dict[str, bool]] = TorchFused.kernel


class TorchForeachCuda(TorchCuda):
    """``torch.optim.Adam(foreach=True)``."""

    kernel: ClassVar[dict[str, bool]] = TorchForeach.kernel


class CupyWrittenOut(OnDevice):
    """Adam in array expressions of CuPy, as one would write it with NumPy."""

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make arrays."""
        self.library = cuda_library.CupyLibrary()
        self.cupy = cupy = self.library.cupy
        self.params = [self.library.upload(param) for param in params]
        own = [self.library.upload(grad) for grad in grads]
        self.keep(own, grads)
        self._moments = [(cupy.zeros_like(p), cupy.zeros_like(p)) for p in self.params]
        self._averages = [param.copy() for param in self.params] if self.tail else []
        self._taken = 0
        if self.tail:
            self.step = self._tail  # type: ignore[method-assign]

    def scalars(self) -> tuple[float, float, float, float]:
        """Count a step; return 1-beta1, 1-beta2, the step size, and 1/sqrt(1-beta2^t)."""
        self._taken += 1
        lr, (beta1, beta2) = HYPERPARAMETERS["lr"], HYPERPARAMETERS["betas"]
        step_size: float = lr / (1 - beta1**self._taken)
        return 1 - beta1, 1 - beta2, step_size, (1 - beta2**self._taken) ** -0.5

    def step(self) -> None:
        """Take one step."""
        self._update(self._own)

    def _update(self, grads: Sequence[Any]) -> None:
        cupy, eps = self.cupy, HYPERPARAMETERS["eps"]
        one_minus_beta1, one_minus_beta2, step_size, inv_sqrt_bias2 = self.scalars()
        for p, g, (m, v) in zip(self.params, grads, self._moments, strict=True):
            m += (g - m) * one_minus_beta1
            v += (g * g - v) * one_minus_beta2
            p -= step_size * m / (cupy.sqrt(v) * inv_sqrt_bias2 + eps)

    def _tail(self) -> None:
        cupy = self.cupy
        squares = cupy.stack([cupy.vdot(grad, grad) for grad in self._own])
        # Stays on the device: nobody waits for it.
        factor = cupy.minimum(TAIL["max_grad_norm"] / (cupy.sqrt(squares.sum()) + 1e-6), 1.0)
        for grad in self._own:
            cupy.multiply(grad, factor, out=grad)
        for param in self.params:
            param *= 1 - HYPERPARAMETERS["lr"] * TAIL["weight_decay"]
        self._update(self._own)
        for average, param in zip(self._averages, self.params, strict=True):
            average += (param - average) * (1 - TAIL["ema_decay"])
        for grad in self._own:
            grad.fill(0)


class CupyKernel(CupyWrittenOut):
    """Adam as one ``cupy.ElementwiseKernel``, launched for each parameter."""

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make arrays, and the kernel."""
        super().setup(params, grads)
        numbers = "T one_minus_beta1, T one_minus_beta2, T step_size, T inv_sqrt_bias2, T eps"
        kernel = self.cupy.ElementwiseKernel
        self._kernel = kernel(f"T g, {numbers}", "T p, T m, T v", ADAM, "adam")

    def step(self) -> None:
        """Take one step."""
        scalars, eps, kernel = self.scalars(), HYPERPARAMETERS["eps"], self._kernel
        for p, g, (m, v) in zip(self.params, self._own, self._moments, strict=True):
            kernel(g, *scalars, eps, p, m, v)
