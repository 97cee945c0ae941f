"""The optimizers of other libraries, and the table of all that is compared.

To add one, write its class here, add it to `PEERS`, and edit no other file.
What it needs is imported when a contender is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastadam.bench import arrays, contenders
from fastadam.bench.contenders import HYPERPARAMETERS, TAIL, Contender, OneByOne
from fastadam.bench.workloads import ONE_BY_ONE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["FASTADAM", "ONE_THREAD", "OWN", "PEERS", "ROOFLINES", "Peer", "by_name"]

LR, (BETA1, BETA2), EPS = (HYPERPARAMETERS[key] for key in ("lr", "betas", "eps"))


class Torch(Contender):
    """A torch optimizer; ``.grad`` is set once."""

    kernel: ClassVar[dict[str, bool]] = {}  # what is asked of `torch.optim.Adam`

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make tensors and the optimizer."""
        self.arrays = own = arrays.TorchArrays(self.device)
        self.torch = own.torch
        self.params = [own.upload(param).requires_grad_() for param in params]
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = own.upload(grad)
        self.remember([param.grad for param in self.params], grads)
        self.opt = self.make_optimizer(self.params)
        self.step = self._tail if self.tail else self.opt.step
        if self.tail:
            self._data = [param.detach() for param in self.params]
            self._averages = [param.clone() for param in self._data]
            self._clip = {"foreach": True} if self.device == "cuda" else {}

    def make_optimizer(self, params: list[Any]) -> Any:
        """Make the optimizer."""
        maker, options = self.torch.optim.Adam, HYPERPARAMETERS | self.kernel
        if self.tail:
            maker = self.torch.optim.AdamW
            options["weight_decay"] = TAIL["weight_decay"]
        return maker(params, **options)

    def _tail(self) -> None:
        torch, params = self.torch, self.params
        torch.nn.utils.clip_grad_norm_(params, TAIL["max_grad_norm"], **self._clip)
        self.opt.step()
        torch._foreach_lerp_(self._averages, self._data, 1 - TAIL["ema_decay"])
        self.opt.zero_grad(set_to_none=False)

    def cpu_threads(self) -> int | None:
        """Return torch's number."""
        threads: int = self.torch.get_num_threads()
        return threads


class TorchFused(Torch):
    """``torch.optim.Adam(fused=True)``."""

    kernel: ClassVar[dict[str, bool]] = {"fused": True}


class TorchForeach(Torch):
    """``torch.optim.Adam(foreach=True)``."""

    kernel: ClassVar[dict[str, bool]] = {"foreach": True}


class FastAdamTorch(Torch):
    """``fastadam.torch.Adam``, and ``AdamW``, which clips and averages as it updates."""

    def make_optimizer(self, params: list[Any]) -> Any:
        """Make the optimizer."""
        from fastadam.torch import Adam, AdamW

        if self.tail:
            return AdamW(params, **HYPERPARAMETERS, **TAIL)
        return Adam(params, **HYPERPARAMETERS)

    def _tail(self) -> None:
        self.opt.step()
        self.opt.zero_grad(set_to_none=False)

    def cpu_threads(self) -> int | None:
        """Return Numba's number."""
        return contenders.numba_threads()


class DeepSpeed(Torch):
    """``DeepSpeedCPUAdam``, which compiles its extension when first used."""

    def make_optimizer(self, params: list[Any]) -> Any:
        """Make the optimizer."""
        adam = import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        decay = TAIL["weight_decay"] if self.tail else 0.0
        return adam(params, **HYPERPARAMETERS, weight_decay=decay, adamw_mode=self.tail)


class Optax(Contender):
    """optax under ``jax.jit``, parameters and state donated.

    Gradients are values there: every backward pass makes new ones, and there
    is nothing to set to 0.
    """

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Put the arrays on the device; compile at the first step."""
        self.jax = import_module("jax")
        self.arrays, self.clears_grads = arrays.NumpyArrays(), False

        def own(given: Sequence[NDArray[Any]]) -> list[Any]:
            # Copies, since a donated array's memory is written to.
            return [self.jax.numpy.array(array, copy=True) for array in given]

        self.params, self.grads = own(params), own(grads)
        averages = own(params) if self.tail else []
        init, self._update = self._functions(self.tail)
        self._kept = (self.params, init(self.params), averages)

    @staticmethod
    @cache  # so that optimizers of the same shapes compile once
    def _functions(tail: bool) -> tuple[Any, Any]:
        jax, optax = import_module("jax"), import_module("optax")
        transform = optax.adam(LR, BETA1, BETA2, EPS)
        if tail:
            transform = optax.chain(
                optax.clip_by_global_norm(TAIL["max_grad_norm"]),
                optax.adamw(LR, BETA1, BETA2, EPS, weight_decay=TAIL["weight_decay"]),
            )

        def update(params: Any, state: Any, averages: Any, grads: Any) -> Any:
            updates, state = transform.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            if tail:
                averages = optax.incremental_update(params, averages, 1 - TAIL["ema_decay"])
            return params, state, averages

        return transform.init, jax.jit(update, donate_argnums=(0, 1, 2))

    def step(self) -> None:
        """Take one step."""
        self._kept = self._update(*self._kept, self.grads)

    def wait(self) -> None:
        """Return once the steps are done."""
        self.jax.block_until_ready(self._kept)

    def values(self) -> list[NDArray[Any]]:
        """Return the parameters as they are now."""
        return [np.asarray(param) for param in self._kept[0]]


class NumpyContender(Contender):
    """One that updates NumPy arrays, in one thread."""

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make arrays and the optimizer."""
        self.arrays = arrays.NumpyArrays()
        self.params, own = ([array.copy() for array in each] for each in (params, grads))
        self.remember(own, grads)
        self.make_optimizer()

    def make_optimizer(self) -> None:
        """Make the optimizer."""
        raise NotImplementedError

    def cpu_threads(self) -> int | None:
        """Return 1: its loops are serial."""
        return 1


class Thinc(NumpyContender):
    """``thinc.api.Adam``, called with each parameter; a call sets the gradient to 0."""

    def make_optimizer(self) -> None:
        """Make the optimizer."""
        self.clears_grads = True
        options = {"L2": 0.0, "grad_clip": 0.0, "use_averages": False}
        adam = import_module("thinc.api").Adam
        self.opt = adam(LR, beta1=BETA1, beta2=BETA2, eps=EPS, **options)
        pairs = zip(self.params, self.grads, strict=True)
        self._calls = [((k, "W"), param, grad) for k, (param, grad) in enumerate(pairs)]

    def step(self) -> None:
        """Take one step."""
        opt = self.opt
        for key, param, grad in self._calls:
            opt(key, param, grad)
        opt.step_schedules()


class ScikitLearn(NumpyContender):
    """The optimizer inside scikit-learn's ``MLPClassifier``, written in NumPy."""

    def make_optimizer(self) -> None:
        """Make the optimizer."""
        module = import_module("sklearn.neural_network._stochastic_optimizers")
        opt = module.AdamOptimizer(self.params, LR, BETA1, BETA2, EPS)
        self.step = lambda: opt.update_params(self.params, self.grads)


class Cupy(Contender):
    """Adam in array expressions of CuPy, as one would write it with NumPy."""

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make arrays."""
        self.arrays = own = arrays.CupyArrays()
        self.cupy = cupy = own.cupy
        self.params = [own.upload(param) for param in params]
        self.remember([own.upload(grad) for grad in grads], grads)
        self._moments = [(cupy.zeros_like(p), cupy.zeros_like(p)) for p in self.params]
        self._averages = [param.copy() for param in self.params] if self.tail else []
        self._taken = 0

    def scalars(self) -> tuple[float, float, float, float]:
        """Count a step; return 1-beta1, 1-beta2, the step size, and 1/sqrt(1-beta2^t)."""
        self._taken += 1
        step_size: float = LR / (1 - BETA1**self._taken)
        return 1 - BETA1, 1 - BETA2, step_size, (1 - BETA2**self._taken) ** -0.5

    def step(self) -> None:
        """Take one step."""
        cupy = self.cupy
        if self.tail:
            squares = cupy.stack([cupy.vdot(grad, grad) for grad in self.grads])
            # Stays on the device: nobody waits for it.
            factor = cupy.minimum(TAIL["max_grad_norm"] / (cupy.sqrt(squares.sum()) + 1e-6), 1.0)
            for grad in self.grads:
                cupy.multiply(grad, factor, out=grad)
            for param in self.params:
                param *= 1 - LR * TAIL["weight_decay"]
        self.update()
        if self.tail:
            for average, param in zip(self._averages, self.params, strict=True):
                average += (param - average) * (1 - TAIL["ema_decay"])
            for grad in self.grads:
                grad.fill(0)

    def update(self) -> None:
        """Update the moments and the parameters."""
        one_minus_beta1, one_minus_beta2, step_size, inv_sqrt_bias2 = self.scalars()
        for p, g, (m, v) in zip(self.params, self.grads, self._moments, strict=True):
            m += (g - m) * one_minus_beta1
            v += (g * g - v) * one_minus_beta2
            p -= step_size * m / (self.cupy.sqrt(v) * inv_sqrt_bias2 + EPS)


class CupyKernel(Cupy):
    """Adam as one ``cupy.ElementwiseKernel``, launched for each parameter."""

    # What is done with each element, m and v updated in place.
    ADAM = """
        m += (g - m) * one_minus_beta1;
        v += (g * g - v) * one_minus_beta2;
        p -= step_size * m / (sqrt(v) * inv_sqrt_bias2 + eps);
    """

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make arrays, and the kernel."""
        super().setup(params, grads)
        numbers = "T one_minus_beta1, T one_minus_beta2, T step_size, T inv_sqrt_bias2, T eps"
        kernel = self.cupy.ElementwiseKernel
        self._kernel = kernel(f"T g, {numbers}", "T p, T m, T v", self.ADAM, "adam")

    def update(self) -> None:
        """Update the moments and the parameters."""
        scalars, kernel = self.scalars(), self._kernel
        for p, g, (m, v) in zip(self.params, self.grads, self._moments, strict=True):
            kernel(g, *scalars, EPS, p, m, v)


@dataclass(frozen=True)
class Peer:
    """A contender, and what must be known before it is made."""

    name: str  # on the command line
    title: str  # in sentences
    make: type[Contender]
    head: tuple[str, str] = ("", "")  # two lines over its column in a table
    color: str = ""  # of its bars and its line: Okabe and Ito's, for the colour-blind too
    devices: tuple[str, ...] = ("cpu",)
    # How many times a parameter's bytes it holds at its peak: param, grad, two moments, and what
    # it makes in passing; with the tail also an average, or 0 if it has no tail.
    arrays: int = 4
    tail_arrays: int = 5
    package: str = ""  # to import; empty if fastadam has it
    install: str = ""  # for pip, if it has another name
    versions: tuple[str, ...] = ()  # distributions whose versions matter
    dtypes: tuple[str, ...] = ("float32", "float64")
    slow_to_make: bool = False  # so that it is not measured with an optimizer for each parameter

    def contender(self, workload: object, *arguments: Any) -> Contender:
        """Make it for a workload of a name, or any other; `arguments` are those of `Contender`."""
        if workload not in ONE_BY_ONE:
            return self.make(*arguments)
        if self.slow_to_make:
            raise NotImplementedError("to make an optimizer takes it a second")
        return OneByOne(self.make, *arguments)

    @property
    def installed(self) -> bool:
        """Whether its package is there; it may not work yet."""
        return not self.package or find_spec(self.package) is not None

    def why_not(self, dtype: str, tail: bool) -> str | None:
        """Return why it cannot take part, None if nothing is known against it."""
        if tail and not self.tail_arrays:
            return "it cannot clip by the global norm"
        if dtype not in self.dtypes:
            return f"it has no {dtype}"
        if not self.installed:
            return f"not installed: pip install {self.install or self.package}"
        return None


BOTH, FLOAT32 = ("cpu", "cuda"), ("float32",)
CUPY: dict[str, Any] = {
    "devices": ("cuda",),
    "package": "cupy",
    "install": "cupy-cuda13x, or cupy-cuda12x for a driver of CUDA 12",
    "versions": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
}
FASTADAM = Peer("fastadam", "fastadam", contenders.FastAdam, color="#000000", devices=BOTH)
PEERS = (
    Peer(
        "torch-fused", "torch fused", TorchFused, ("torch", "fused"), "#d55e00", BOTH,
        package="torch", versions=("torch",),
    ),
    Peer(
        "torch-foreach", "torch foreach", TorchForeach, ("torch", "foreach"), "#e69f00", BOTH,
        arrays=5, tail_arrays=6, package="torch", versions=("torch",),
    ),
    Peer(
        "fastadam-torch", "fastadam.torch", FastAdamTorch, ("fastadam.", "torch"), "#882255", BOTH,
        package="torch", versions=("torch",),
    ),
    Peer(
        "deepspeed", "DeepSpeed CPUAdam", DeepSpeed, ("", "DeepSpeed"), "#0072b2",
        package="deepspeed", versions=("deepspeed", "torch"), dtypes=FLOAT32,
        slow_to_make=True,  # it runs programs to find out about the processor
        install="torch deepspeed ninja (it compiles: g++ must be on PATH)",
    ),
    Peer(
        "optax", "optax", Optax, ("", "optax"), "#009e73",
        arrays=6, tail_arrays=8, package="optax", versions=("optax", "jax", "jaxlib"),
    ),
    Peer(
        "thinc", "thinc", Thinc, ("", "thinc"), "#cc79a7",
        tail_arrays=0, package="thinc", versions=("thinc",), dtypes=FLOAT32,
    ),
    Peer(
        "scikit-learn", "scikit-learn", ScikitLearn, ("scikit-", "learn"), "#56b4e9",
        arrays=8, tail_arrays=0, package="sklearn", install="scikit-learn",
        versions=("scikit-learn",),
    ),
    Peer("cupy", "CuPy", Cupy, ("", "CuPy"), "#009e73", arrays=7, tail_arrays=8, **CUPY),
    Peer(
        "cupy-kernel", "CuPy ElementwiseKernel", CupyKernel, ("CuPy", "kernel"), "#56b4e9",
        tail_arrays=0, **CUPY,
    ),
)  # fmt: skip
# Measured always: they need nothing but fastadam.
OWN = (
    Peer(
        "opt-grads", "fastadam opt.grads", contenders.FastAdamGrads, ("opt.", "grads"), "#555555",
        BOTH,
    ),
    Peer(
        "roofline", "memory roofline", contenders.MemoryPass, ("memory", "roofline"), "#aaaaaa",
    ),
    # One more: it takes a copy of the gradients, without their signs.
    Peer(
        "divider", "divider roofline", contenders.DividerPass, ("divider", "roofline"), "#f0e442",
        arrays=5, tail_arrays=6,
    ),
    Peer(
        "roofline", "device copy", contenders.DeviceCopy, ("memory", "roofline"), "#aaaaaa",
        ("cuda",), arrays=7, tail_arrays=11,
    ),
)  # fmt: skip
ROOFLINES = ("roofline", "divider")
# Beside busy processes: in a process that is told to use one thread.
ONE_THREAD = Peer(
    "fastadam-1", "fastadam, one thread", contenders.FastAdam, ("fastadam", "1 thread")
)


def by_name(name: str, device: str = "cpu") -> Peer:
    """Return a contender by its name on the command line.

    A name that is not known on the device is looked up on the other; KeyError
    if there is none.

    Examples
    --------
    >>> from fastadam.bench.peers import by_name
    >>> by_name("torch-fused").title
    'torch fused'
    """
    named = [peer for peer in (FASTADAM, *PEERS, *OWN, ONE_THREAD) if peer.name == name]
    for peer in sorted(named, key=lambda peer: device not in peer.devices):
        return peer
    raise KeyError(name)
