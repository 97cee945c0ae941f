"""Every optimizer that is compared, behind one interface.

Each is used in its own fastest sensible way, with the same hyperparameters
and with its gradients in place before a step. What a peer needs is imported
when a contender is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = [
    "HYPERPARAMETERS",
    "TAIL",
    "Contender",
    "DeepSpeed",
    "DividerPass",
    "FastAdam",
    "FastAdamGrads",
    "Optax",
    "RooflinePass",
    "ScikitLearn",
    "Thinc",
    "TorchForeach",
    "TorchFused",
]

HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
# What the tail of a training step adds; the gradients are set to 0 as well.
TAIL: dict[str, Any] = {"weight_decay": 0.01, "max_grad_norm": 1.0, "ema_decay": 0.999}


class Contender:
    """An optimizer with parameters and gradients of its own.

    Parameters
    ----------
    params, grads : sequences of ndarray
        What it starts from; copied.
    tail : bool
        Whether `step` is the whole tail of a training step: clip, update
        with decoupled weight decay, average, zero the gradients.
    """

    # Whether a step sets the gradients to 0, so that they are refilled before the next.
    clears_grads = False

    def __init__(
        self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]], tail: bool
    ) -> None:
        self.tail = tail
        # The gradients as NumPy arrays, and where they come from.
        self.filled: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self.setup(params, grads)

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make the optimizer, and `step`."""
        raise NotImplementedError

    def step(self) -> object:
        """Take one step."""
        raise NotImplementedError

    def wait(self) -> None:
        """Return once the steps are done."""

    def refill(self) -> None:
        """Set the gradients to what they were at first, by a plain copy."""
        for grad, source in self.filled:
            np.copyto(grad, source)

    def fill_from(self, own: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Fill the gradients, and remember from where."""
        self.filled = list(zip(own, grads, strict=True))
        self.refill()

    def values(self) -> list[NDArray[Any]]:
        """Return the parameters as they are now."""
        raise NotImplementedError

    def threads(self) -> int | None:
        """Return how many threads a large step may use, None if it does not tell."""
        return None


class FastAdam(Contender):
    """``opt.step(grads)``, with the same arrays at each step."""

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make the optimizer, and gradients."""
        self._make(params)
        own = [np.empty_like(grad) for grad in grads]
        self.fill_from(own, grads)
        step = self.opt.step
        # The plain name where nothing needs an option: a lambda would cost 50 nanoseconds.
        self._bind((lambda: step(own, zero_grad=True)) if self.tail else (lambda: step(own)))

    def _make(self, params: Sequence[NDArray[Any]]) -> None:
        import fastadam

        self.params = [param.copy() for param in params]
        maker: Any = fastadam.AdamW if self.tail else fastadam.Adam
        self.opt = maker(self.params, **HYPERPARAMETERS, **(TAIL if self.tail else {}))
        self.clears_grads = self.tail

    def _bind(self, step: Callable[[], object]) -> None:
        self.step = step  # type: ignore[method-assign]

    def values(self) -> list[NDArray[Any]]:
        """Return the parameters as they are now."""
        return self.params

    def threads(self) -> int | None:
        """Return Numba's number."""
        threads: int = import_module("numba").get_num_threads()
        return threads


class FastAdamGrads(FastAdam):
    """``opt.step()``, with the gradients in ``opt.grads``."""

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make the optimizer; fill its gradients."""
        self._make(params)
        self.fill_from(self.opt.grads, grads)
        step = self.opt.step
        self._bind((lambda: step(zero_grad=True)) if self.tail else step)


class RooflinePass(FastAdam):
    """The same traffic to memory, next to no arithmetic."""

    roofline: ClassVar[str] = "Roofline"

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make the arrays."""
        self.clears_grads = self.tail
        self.params = [param.copy() for param in params]
        own = [np.empty_like(grad) for grad in grads]
        self.fill_from(own, grads)
        make = getattr(import_module("fastadam.bench.roofline"), self.roofline)
        self._bind(make(self.params, own, tail=self.tail).step)


class DividerPass(RooflinePass):
    """The same traffic to memory, and a square root and a division for each element."""

    roofline: ClassVar[str] = "Divider"

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make the arrays, of positive numbers."""
        super().setup([np.abs(param) for param in params], [np.abs(grad) for grad in grads])


class Torch(Contender):
    """A torch optimizer; ``.grad`` is set once."""

    # What is asked of `torch.optim.Adam`, and of the function that clips.
    kernel: ClassVar[dict[str, bool]] = {}
    clip: ClassVar[dict[str, bool]] = {}

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make tensors and the optimizer."""
        self.torch = torch = import_module("torch")
        self.params = [torch.tensor(param).requires_grad_() for param in params]
        for param in self.params:
            param.grad = torch.empty_like(param, requires_grad=False)
        self.fill_from([param.grad.numpy() for param in self.params], grads)
        self._begin()

    def _begin(self) -> None:
        """Make the optimizer, of what has been set up."""
        self.opt = self.make(self.params)
        self.clears_grads = self.tail
        if self.tail:
            self._data = [param.detach() for param in self.params]
            self._averages = [param.clone() for param in self._data]
            self.step = self._tail  # type: ignore[method-assign]
        else:
            self.step = self.opt.step  # type: ignore[method-assign]

    def make(self, params: list[Any]) -> Any:
        """Make the optimizer."""
        optim = self.torch.optim
        if self.tail:
            return optim.AdamW(
                params, **HYPERPARAMETERS, weight_decay=TAIL["weight_decay"], **self.kernel
            )
        return optim.Adam(params, **HYPERPARAMETERS, **self.kernel)

    def _tail(self) -> None:
        torch, params = self.torch, self.params
        torch.nn.utils.clip_grad_norm_(params, TAIL["max_grad_norm"], **self.clip)
        self.opt.step()
        torch._foreach_lerp_(self._averages, self._data, 1 - TAIL["ema_decay"])
        self.opt.zero_grad(set_to_none=False)

    def values(self) -> list[NDArray[Any]]:
        """Return the parameters as they are now."""
        return [param.detach().numpy() for param in self.params]

    def threads(self) -> int | None:
        """Return torch's number."""
        threads: int = self.torch.get_num_threads()
        return threads


class TorchFused(Torch):
    """``torch.optim.Adam(fused=True)``."""

    kernel: ClassVar[dict[str, bool]] = {"fused": True}


class TorchForeach(Torch):
    """``torch.optim.Adam(foreach=True)``."""

    kernel: ClassVar[dict[str, bool]] = {"foreach": True}


class DeepSpeed(Torch):
    """``DeepSpeedCPUAdam``, which compiles its extension when first used."""

    def make(self, params: list[Any]) -> Any:
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
        self.jax = jax = import_module("jax")
        optax = import_module("optax")
        lr, (b1, b2), eps = (HYPERPARAMETERS[key] for key in ("lr", "betas", "eps"))
        # Copies, since a donated array's memory is written to.
        self.params = [jax.numpy.array(param, copy=True) for param in params]
        self.grads = [jax.numpy.array(grad, copy=True) for grad in grads]
        if self.tail:
            transform = optax.chain(
                optax.clip_by_global_norm(TAIL["max_grad_norm"]),
                optax.adamw(lr, b1, b2, eps, weight_decay=TAIL["weight_decay"]),
            )
            averages = [jax.numpy.array(param, copy=True) for param in params]
        else:
            transform, averages = optax.adam(lr, b1, b2, eps), []

        def update(params: Any, state: Any, averages: Any, grads: Any) -> Any:
            updates, state = transform.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            if self.tail:
                averages = optax.incremental_update(params, averages, 1 - TAIL["ema_decay"])
            return params, state, averages

        self._update = jax.jit(update, donate_argnums=(0, 1, 2))
        self._kept = (self.params, transform.init(self.params), averages)

    def step(self) -> None:
        """Take one step."""
        self._kept = self._update(*self._kept, self.grads)

    def wait(self) -> None:
        """Return once the steps are done."""
        self.jax.block_until_ready(self._kept)

    def values(self) -> list[NDArray[Any]]:
        """Return the parameters as they are now."""
        return [np.asarray(param) for param in self._kept[0]]


class Thinc(Contender):
    """``thinc.api.Adam``, called with each parameter; a call sets the gradient to 0."""

    clears_grads = True

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make the optimizer."""
        lr, (beta1, beta2), eps = (HYPERPARAMETERS[key] for key in ("lr", "betas", "eps"))
        options = {"L2": 0.0, "grad_clip": 0.0, "use_averages": False}
        adam = import_module("thinc.api").Adam
        self.opt = adam(lr, beta1=beta1, beta2=beta2, eps=eps, **options)
        self.params = [param.copy() for param in params]
        own = [np.empty_like(grad) for grad in grads]
        self.fill_from(own, grads)
        self._calls = [
            ((k, "W"), param, grad)
            for k, (param, grad) in enumerate(zip(self.params, own, strict=True))
        ]

    def step(self) -> None:
        """Take one step."""
        opt = self.opt
        for key, param, grad in self._calls:
            opt(key, param, grad)
        opt.step_schedules()

    def values(self) -> list[NDArray[Any]]:
        """Return the parameters as they are now."""
        return self.params

    def threads(self) -> int | None:
        """Return 1: its loop is serial."""
        return 1


class ScikitLearn(Contender):
    """The optimizer inside scikit-learn's ``MLPClassifier``, written in NumPy."""

    def setup(self, params: Sequence[NDArray[Any]], grads: Sequence[NDArray[Any]]) -> None:
        """Make the optimizer."""
        module = import_module("sklearn.neural_network._stochastic_optimizers")
        lr, (beta1, beta2), eps = (HYPERPARAMETERS[key] for key in ("lr", "betas", "eps"))
        self.params = [param.copy() for param in params]
        own = [np.empty_like(grad) for grad in grads]
        self.fill_from(own, grads)
        opt = module.AdamOptimizer(self.params, lr, beta1, beta2, eps)
        self.step = lambda: opt.update_params(self.params, own)  # type: ignore[method-assign]

    def values(self) -> list[NDArray[Any]]:
        """Return the parameters as they are now."""
        return self.params

    def threads(self) -> int | None:
        """Return 1: NumPy's elementwise operations are serial."""
        return 1
