"""Adam and AdamW, the facade: the constructor, ``step()``, and the settings that can change."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import backends
from .params import checks, hyperparameters
from .params.containers import FixedSequence, check_any_given, check_same
from .params.groups import Groups, counted, describe
from .params.names import Absent, check_attribute, check_keywords
from .params.types import Betas, Grads, Group, Nonfinite, NotGiven, Params, Schedule
from .runtime import kernel_lock, register_after_fork, signals_deferred
from .saveable import Saveable, allow_state_in_torch_load, lock_if_free
from .state.param_state import new_states
from .update.result import StepResult
from .update.scalars import Scalars

_new = tuple.__new__


class Adam(Saveable):
    r"""Adam over arrays that the user owns, updated in place.

    With :math:`t` the number of steps a parameter has had, this one counted,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \eta_t\,
            \frac{m_t/(1-\beta_1^t)}{\sqrt{v_t/(1-\beta_2^t)} + \epsilon}

    where :math:`m` is ``exp_avg``, :math:`v` ``exp_avg_sq``, both zero at
    first, and :math:`\eta_t` is ``lr * schedule(step)``. The defaults of
    ``lr`` and ``betas`` are not PyTorch's (1e-3 and (0.9, 0.999)).

    Parameters
    ----------
    params : array, sequence, mapping, or sequence of group dicts
        NumPy arrays of float32 or float64, of any shape, C- or
        Fortran-contiguous and writable: one array, a sequence of them, a
        mapping by name, or dicts with such ``"params"`` and hyperparameters
        of their own. They are updated in place and never copied.
    lr : float
        Learning rate per step, >= 0.
    betas : pair of float
        Decay rates of the averages of the gradient and of its square, per
        step, each in [0, 1).
    eps : float
        Added to the root of the second moment, >= 0, in units of the
        gradient. With 0, an element whose gradients were all 0 becomes NaN, and
        one whose squares are too small for the dtype infinite.
    weight_decay : float
        Strength of the decay of the parameters towards 0, >= 0: added to the
        gradient as ``weight_decay * param`` (L2), or decoupled.
    decoupled_weight_decay : bool
        Multiply the parameter by ``1 - lr*weight_decay`` instead (AdamW).
    amsgrad : bool
        Divide by the largest ``exp_avg_sq`` so far, for all groups.
    maximize : bool
        Step up the gradient instead of down.
    schedule : callable, optional
        ``schedule(step)`` gives the factor on every group's ``lr``, finite
        and >= 0; steps count from 0. See `fastadam.schedules`.
    max_grad_norm : float, optional
        Scale the gradients down where their global norm, over all groups,
        exceeds this, > 0, as `torch.nn.utils.clip_grad_norm_` does: one NaN
        makes all of them NaN. With ``math.inf`` the norm is only measured.
    nonfinite : {"propagate", "skip", "raise"}
        What to do if a gradient holds NaN or infinity, decided before
        anything is written: compute with it, leave out the whole step, or
        raise `FloatingPointError`.
    ema_decay : float, optional
        Keep an exponential moving average of the parameters in `ema_params`,
        to which each step adds ``(1-ema_decay) * (param-average)``; in [0, 1).
        It begins as a copy of the parameters as given.
    num_threads : int, optional
        At most so many threads take a step, >= 1; no more than Numba has, one
        for each CPU or ``NUMBA_NUM_THREADS``. By default this process's share
        of them, where a launcher such as torchrun has started several
        processes on this machine. No bit depends on it.

    Raises
    ------
    TypeError
        For an array, container or hyperparameter of the wrong kind.
    ValueError
        For one out of range, for read-only, non-contiguous or overlapping
        arrays. The message names the argument, the rule and the value.

    Notes
    -----
    Moments below the smallest normal number of their dtype, 1.2e-38 in float32,
    are set to 0: processors are slow with such numbers, and an average of zeros
    would stay one of them for good.

    An attribute that the class does not have cannot be set:
    ``opt.learning_rate = 1`` raises AttributeError and names ``lr``. A class
    of your own that derives from this one may have attributes of any name, as
    may those that begin with an underscore.

    References
    ----------
    .. [1] Kingma and Ba, *Adam: A Method for Stochastic Optimization*, 2015,
       arXiv:1412.6980.
    .. [2] Loshchilov and Hutter, *Decoupled Weight Decay Regularization*,
       2019, arXiv:1711.05101.
    .. [3] Reddi, Kale and Kumar, *On the Convergence of Adam and Beyond*,
       2018, arXiv:1904.09237.

    Examples
    --------
    >>> import numpy as np, fastadam
    >>> params = {"w": np.array([1.0, -2.0]), "b": np.array([0.5])}
    >>> opt = fastadam.Adam(params, lr=0.1)
    >>> for _ in range(100):
    ...     grads = {name: 2 * array for name, array in params.items()}
    ...     result = opt.step(grads)
    >>> bool(abs(params["w"]).max() < 0.1)
    True
    """

    _scalars: Scalars
    _flatten: Callable[[Any], tuple[Any, ...]]
    # The gradients of our own, made when first asked for: as the user has them, and in a row.
    _grads: Any
    _own_grads: tuple[Any, ...]
    _num_threads: int | None = None

    if not TYPE_CHECKING:  # mypy would take it that every name can be set

        def __setattr__(self, name: str, value: Any) -> None:
            if type(self) in (Adam, AdamW):
                check_attribute(type(self), name)
            super().__setattr__(name, value)

        zero_grad = Absent("use opt.step(grads, zero_grad=True)")

    @check_keywords()
    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        betas: Betas = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        schedule: Schedule | None = None,
        max_grad_norm: float | None = None,
        nonfinite: Nonfinite = "propagate",
        ema_decay: float | None = None,
        num_threads: int | None = None,
    ) -> None:
        defaults = hyperparameters.check_options(
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "maximize": maximize,
            }
        )
        amsgrad = checks.flag(amsgrad, "amsgrad")
        self._schedule = hyperparameters.check_schedule(schedule)
        self._max_grad_norm = hyperparameters.check_max_grad_norm(max_grad_norm)
        self._nonfinite = hyperparameters.check_nonfinite(nonfinite)
        ema_decay = hyperparameters.check_ema_decay(ema_decay)
        self._num_threads = hyperparameters.check_num_threads(num_threads)
        groups = Groups(params, defaults, amsgrad=amsgrad, ema_decay=ema_decay)
        groups.take(backends.of(groups.arrays), new_states)
        self._install(groups, np.zeros(len(groups.states), dtype=np.int64), 0)
        self._lock = threading.Lock()
        register_after_fork(self)
        allow_state_in_torch_load()

    def _after_fork(self) -> None:
        """Be usable in a forked child: no thread that was in a step is there to end it."""
        self._lock = threading.Lock()
        self._stepper.choose_kernels()

    def _install(self, groups: Groups, steps: Any, step_count: int) -> None:
        """Lay out the tables that the kernels read; raise before anything is replaced."""
        backend = backends.of(groups.arrays)
        scalars = Scalars(groups)
        stepper = backend.make_stepper(groups.states, groups.labels, steps, step_count, scalars)
        if self._num_threads is not None:
            stepper.set_num_threads(self._num_threads)
        new = {
            "_groups": groups,
            "_stepper": stepper,
            "_scalars": scalars,
            "_flatten": groups.flattener(),
            "_grads": None,
            "_own_grads": (),
        }
        # So that Ctrl-C cannot leave the old beside the new. (Not by way of vars(self): once
        # Python has made that dict, every attribute takes it longer to find.)
        with kernel_lock, signals_deferred():
            for name, value in new.items():
                setattr(self, name, value)

    def add_param_group(self, group: Group) -> None:
        """Add parameters; from the next step on, ``grads`` has one entry a group.

        Parameters
        ----------
        group : mapping
            ``"params"``, as the constructor takes them, and any of the
            hyperparameters ``lr``, ``betas``, ``eps``, ``weight_decay``,
            ``decoupled_weight_decay``, ``maximize``; the others are the
            constructor's.

        Raises
        ------
        TypeError, ValueError
            As the constructor; the optimizer is then as it was.
        RuntimeError
            If a step is under way.

        Examples
        --------
        >>> import numpy as np, fastadam
        >>> opt = fastadam.Adam([np.zeros(2)])
        >>> opt.add_param_group({"params": [np.zeros(3)], "lr": 1e-4})
        >>> opt.step([[np.ones(2)], [np.ones(3)]]).lr
        0.01
        """
        with lock_if_free(self._lock):
            groups = self._groups.extended(group)
            groups.take(backends.of(groups.arrays), new_states)
            steps = np.zeros(len(groups.states), dtype=np.int64)
            steps[: len(self._groups.states)] = self._stepper.steps
            self._install(groups, steps, self.step_count)

    def step(
        self, grads: Grads | NotGiven = ..., *, grad_scale: float = 1.0, zero_grad: bool = False
    ) -> StepResult:
        """Update every parameter that has a gradient, in place.

        Parameters
        ----------
        grads : array, sequence, mapping, or sequence of those
            The gradients in the shape of container in which the parameters
            came; with groups, one entry a group. Each has its parameter's
            shape, dtype and memory order, and shares memory with nothing
            else here. None leaves its parameter, state, average and step
            count as they are, but not all may be None. By default the arrays
            of `grads`.
        grad_scale : float
            What the loss, and so the gradients, had been multiplied by: they
            are divided by it on their way, before they are clipped, > 0.
        zero_grad : bool
            Set the gradients to 0 in the same pass, in place; also where the
            step is skipped.

        Returns
        -------
        StepResult
            The step, counted from 0, the learning rate it used, the norm of
            the gradients if it was measured, and whether it was skipped.

        Raises
        ------
        TypeError, ValueError
            For a gradient that does not fit, a hyperparameter in
            ``param_groups`` out of range, or a schedule's factor that is NaN,
            infinite or negative; if every gradient is None; if there is no
            argument, and nobody has asked for `grads`. Nothing has then been
            changed.
        FloatingPointError
            With ``nonfinite="raise"``, for a gradient that holds NaN or
            infinity. Nothing has then been changed.
        RuntimeError
            If a step of this optimizer is under way, in another thread or
            further up, calling the schedule.

        Examples
        --------
        >>> import numpy as np, fastadam
        >>> w, b = np.zeros((2, 2)), np.zeros(2)
        >>> opt = fastadam.Adam([w, b], lr=0.5)
        >>> opt.step([np.ones((2, 2)), None])
        StepResult(step=0, lr=0.5, grad_norm=None, skipped=False)
        >>> w.round(6), b
        (array([[-0.5, -0.5],
               [-0.5, -0.5]]), array([0., 0.]))
        """
        with lock_if_free(self._lock):
            stepper = self._stepper
            # The user's own code first, in containers and schedule; then nothing but ours
            # until the kernel has run. The tuple keeps the gradients alive that long.
            if grads is ... or (grads is self._grads and grads is not None):
                flat = self._take_own_grads()
            else:
                flat = self._flatten(grads)
                if flat and flat[0] is None:  # most steps look no further
                    check_any_given(flat)
            if zero_grad is not False:
                zero_grad = checks.flag(zero_grad, "zero_grad")
            lr = self._scalars.refresh(stepper.step_count, self._schedule, grad_scale)
            if self._max_grad_norm is None and self._nonfinite == "propagate":
                # What StepResult(...) does, in half the time.
                return _new(StepResult, (stepper.step(flat, zero_grad), lr, None, False))
            return stepper.limited_step(flat, zero_grad, self._max_grad_norm, self._nonfinite)

    def _step_scheduled(self, grads: Grads, factor: float | None, grad_scale: float) -> StepResult:
        """Take a step that zeroes gradients, and whose schedule has been asked already."""
        with lock_if_free(self._lock):
            stepper, flat = self._stepper, self._flatten(grads)
            check_any_given(flat)
            schedule = None if factor is None else (lambda _: factor)
            lr = self._scalars.refresh(stepper.step_count, schedule, grad_scale)
            if self._max_grad_norm is None and self._nonfinite == "propagate":
                return StepResult(stepper.step(flat, True), lr)
            return stepper.limited_step(flat, True, self._max_grad_norm, self._nonfinite)

    def prepare_replay(self, *, grad_scale: float = 1.0) -> None:
        """Bring up to date what a CUDA graph with a step of this optimizer will read.

        A step that is captured in a graph reads hyperparameters, and the
        schedule's factor, from a buffer on the device, which this fills: to be
        called before a graph is replayed, where any of them has changed. With a
        schedule, it waits for the device, which alone knows how many steps have
        been replayed.

        Parameters
        ----------
        grad_scale : float
            As in `step`.

        Raises
        ------
        TypeError, ValueError
            As `step`, for hyperparameters and ``grad_scale``.
        RuntimeError
            If no step has been captured; if gradients were then clipped or
            checked and are not to be now, or the reverse; if a step is under way.
        """
        with lock_if_free(self._lock):
            self._scalars.refresh(self._stepper.step_count, self._schedule, grad_scale)
            self._stepper.prepare_replay(self._max_grad_norm, self._nonfinite)

    def _compilations(self) -> list[Callable[[], object]]:
        """Return calls that each make ready a kernel that `step` may need."""
        limited = self._max_grad_norm is not None or self._nonfinite != "propagate"
        return self._stepper.compilations(self._nonfinite if limited else None)

    def _take_own_grads(self) -> tuple[Any, ...]:
        if self._grads is None:
            raise ValueError("grads must be given, or opt.grads be filled before, got neither")
        return self._own_grads

    @property
    def grads(self) -> Any:
        """Gradient arrays of our own, in the container that the parameters came in.

        Views of one flat buffer, zeros at first, to be filled in place: they lie
        well, and ``step()`` without an argument uses them, all of them. They are
        made when first asked for, and anew after `add_param_group`. The arrays
        cannot be replaced: ``opt.grads["w"] = array`` raises TypeError.

        Raises
        ------
        RuntimeError
            If they must be made while a step is under way.

        Examples
        --------
        >>> import numpy as np, fastadam
        >>> opt = fastadam.Adam({"w": np.zeros(2), "b": np.zeros(1)}, lr=0.5)
        >>> opt.grads["w"][:] = [1.0, -1.0]
        >>> opt.grads["b"] += 2.0
        >>> opt.step(zero_grad=True).step
        0
        >>> opt.grads["w"]
        array([0., 0.])
        """
        grads = self._grads
        if grads is None:
            with lock_if_free(self._lock):
                if self._grads is None:  # another thread may have been first
                    params = [state.param for state in self._groups.states]
                    flat = tuple(self._backend.allocate(params))
                    self._own_grads, self._grads = flat, self._groups.wrap(flat)
                grads = self._grads
        return grads

    @grads.setter
    def grads(self, grads: Any) -> None:
        check_same(self._grads, grads, "grads")

    @property
    def ema_params(self) -> Any:
        """The averages of the parameters, in the container that the parameters came in.

        The arrays are live: each step moves them. They can be written to, but not
        replaced.

        Raises
        ------
        AttributeError
            If the optimizer was made without ``ema_decay``.

        Examples
        --------
        >>> import numpy as np, fastadam
        >>> opt = fastadam.Adam([np.zeros(2)], lr=1.0, ema_decay=0.75)
        >>> _ = opt.step([np.ones(2)])
        >>> opt.ema_params[0].round(6)
        array([-0.25, -0.25])
        """
        if self._groups.ema_decay is None:
            raise AttributeError("ema_params needs an optimizer made with ema_decay, got None")
        return self._groups.wrap([state.own["ema"] for state in self._groups.states])

    @property
    def amsgrad(self) -> bool:
        """Whether the largest ``exp_avg_sq`` so far is kept and used."""
        return self._groups.amsgrad

    @property
    def max_grad_norm(self) -> float | None:
        """The global norm to which gradients are scaled down, or None; can be set."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        self._max_grad_norm = hyperparameters.check_max_grad_norm(max_grad_norm)

    @property
    def nonfinite(self) -> Nonfinite:
        """What is done if a gradient is not finite: propagate, skip or raise; can be set."""
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, nonfinite: Nonfinite) -> None:
        self._nonfinite = hyperparameters.check_nonfinite(nonfinite)

    @property
    def ema_decay(self) -> float | None:
        """How much of the parameters' average each step keeps, or None."""
        return self._groups.ema_decay

    @property
    def num_threads(self) -> int | None:
        """At most so many threads take a step; can be set, and None means the default.

        From the next step on. What is set above the number that Numba has is that
        number. `numba.set_num_threads` may allow fewer. None for parameters on a
        CUDA device, where it has no meaning.

        Raises
        ------
        RuntimeError
            If it is set while a step is under way.

        Examples
        --------
        >>> import numpy as np, fastadam
        >>> opt = fastadam.Adam(np.zeros(3), num_threads=1)
        >>> opt.num_threads
        1
        """
        return self._stepper.num_threads

    @num_threads.setter
    def num_threads(self, num_threads: int | None) -> None:
        asked = hyperparameters.check_num_threads(num_threads)
        with lock_if_free(self._lock), signals_deferred():
            self._stepper.set_num_threads(asked)
            self._num_threads = asked

    @property
    def lr(self) -> float:
        """The first group's learning rate, before the schedule; setting it sets every group's.

        Examples
        --------
        >>> import numpy as np, fastadam
        >>> opt = fastadam.Adam(np.zeros(3), lr=0.1)
        >>> opt.lr = 0.05
        >>> opt.param_groups[0]["lr"]
        0.05
        """
        lr: float = self._groups.options[0]["lr"] if self._groups.options else 0.0
        return lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._groups.defaults["lr"] = checks.real(lr, "lr")
        for options in self._groups.options:
            options["lr"] = self._groups.defaults["lr"]

    @property
    def schedule(self) -> Schedule | None:
        """The factor on every group's ``lr`` as a function of the step, or None."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule | None) -> None:
        self._schedule = hyperparameters.check_schedule(schedule)

    @property
    def param_groups(self) -> tuple[dict[str, Any], ...]:
        """The groups' hyperparameters; what is changed here holds from the next step on."""
        return FixedSequence(self._groups.options)

    def __repr__(self) -> str:
        groups = self._groups
        elements = sum(state.param.size for state in groups.states)
        dtypes = ", ".join(dtype.name for dtype in self._stepper.dtypes) or "no dtype"
        head = (
            f"{type(self).__name__}({counted(len(groups.states))}, {elements:,} elements of"
            f" {dtypes}, step_count={self.step_count}, amsgrad={groups.amsgrad},"
            f" schedule={self._schedule!r}, max_grad_norm={self._max_grad_norm!r},"
            f" nonfinite={self._nonfinite!r}, ema_decay={groups.ema_decay!r})"
        )
        lines = [head]
        for k, (options, container) in enumerate(
            zip(groups.options, groups.containers, strict=True)
        ):
            lines.append(f"  group {k}: {describe(options, container.arrays)}")
        return "\n".join(lines)


class AdamW(Adam):
    """Adam with decoupled weight decay, 1e-2 unless told otherwise.

    The same class as `Adam` with other defaults.

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, maximize, schedule, max_grad_norm, nonfinite
        As in `Adam`.
    ema_decay, num_threads
        As in `Adam`.
    weight_decay : float
        Each step multiplies the parameters by ``1 - lr*weight_decay``.
    decoupled_weight_decay : bool
        False makes the decay an L2 term.

    Raises
    ------
    TypeError, ValueError
        As `Adam`.

    References
    ----------
    .. [1] Loshchilov and Hutter, *Decoupled Weight Decay Regularization*,
       2019, arXiv:1711.05101.

    Examples
    --------
    >>> import numpy as np, fastadam
    >>> w = np.ones(2)
    >>> opt = fastadam.AdamW(w, lr=0.1, weight_decay=0.5)
    >>> _ = opt.step(np.zeros(2))
    >>> w
    array([0.95, 0.95])
    """

    @check_keywords()
    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        betas: Betas = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        weight_decay: float = 1e-2,
        decoupled_weight_decay: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
        schedule: Schedule | None = None,
        max_grad_norm: float | None = None,
        nonfinite: Nonfinite = "propagate",
        ema_decay: float | None = None,
        num_threads: int | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
            ema_decay=ema_decay,
            num_threads=num_threads,
        )
