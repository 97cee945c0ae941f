"""Adam and AdamW: the facade. Groups, state, ``step()``, ``state_dict()``."""

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from . import _options
from ._groups import Groups, describe
from ._scalars import Scalars
from ._state import export_state, import_state


class StepResult(NamedTuple):
    """What one call of `Adam.step` did.

    Attributes
    ----------
    step : int
        The step just taken, counted from 0: what the schedule was asked for.
    lr : float
        The learning rate it used, per step: the first group's ``lr`` times
        the schedule's factor.

    Examples
    --------
    >>> import numpy as np, fastadam
    >>> opt = fastadam.Adam(np.zeros(3), lr=0.1)
    >>> opt.step(np.ones(3))
    StepResult(step=0, lr=0.1)
    """

    step: int
    lr: float


class Adam:
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
        gradient. With 0, an element whose gradients were all 0 becomes NaN.
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

    Raises
    ------
    TypeError
        For an array, container or hyperparameter of the wrong kind.
    ValueError
        For one out of range, for read-only, non-contiguous or overlapping
        arrays. The message names the argument, the rule and the value.

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

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        defaults = _options.check_options(
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "maximize": maximize,
            }
        )
        amsgrad = _options.flag(amsgrad, "amsgrad")
        self._schedule = _options.check_schedule(schedule)
        self._lock = threading.Lock()
        groups = Groups(params, defaults, amsgrad=amsgrad)
        self._install(groups, np.zeros(len(groups.states), dtype=np.int64), 0)

    def _install(self, groups: Groups, steps: Any, step_count: int) -> None:
        """Lay out the tables that the kernel reads; raise before anything is replaced."""
        # Here, since it brings the compiler along: most of what an import would cost.
        from ._plan import Plan

        plan = Plan(groups.states, steps, step_count)
        scalars = Scalars(groups)
        self._groups, self._plan, self._scalars = groups, plan, scalars

    def add_param_group(self, group: Mapping[str, Any]) -> None:
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
        >>> opt.step([[np.ones(2)], [np.ones(3)]])
        StepResult(step=0, lr=0.01)
        """
        with take_turn(self._lock):
            groups = self._groups.extended(group)
            steps = np.zeros(len(groups.states), dtype=np.int64)
            steps[: len(self._groups.states)] = self._plan.steps
            self._install(groups, steps, self.step_count)

    def step(self, grads: Any, *, grad_scale: float = 1.0, zero_grad: bool = False) -> StepResult:
        """Update every parameter that has a gradient, in place.

        Parameters
        ----------
        grads : array, sequence, mapping, or sequence of those
            The gradients in the shape of container in which the parameters
            came; with groups, one entry a group. Each has its parameter's
            shape, dtype and memory order, and shares memory with nothing
            else here. None leaves its parameter, state and step count as
            they are.
        grad_scale : float
            What the loss, and so the gradients, had been multiplied by: they
            are divided by it on their way, > 0.
        zero_grad : bool
            Set the gradients to 0 in the same pass, in place.

        Returns
        -------
        StepResult
            The step, counted from 0, and the learning rate it used.

        Raises
        ------
        TypeError, ValueError
            For a gradient that does not fit, a hyperparameter in
            ``param_groups`` out of range, or a schedule's factor that is NaN,
            infinite or negative. Nothing has then been changed.
        RuntimeError
            If a step of this optimizer is under way, in another thread or
            further up, calling the schedule.

        Examples
        --------
        >>> import numpy as np, fastadam
        >>> w, b = np.zeros((2, 2)), np.zeros(2)
        >>> opt = fastadam.Adam([w, b], lr=0.5)
        >>> opt.step([np.ones((2, 2)), None])
        StepResult(step=0, lr=0.5)
        >>> w.round(6), b
        (array([[-0.5, -0.5],
               [-0.5, -0.5]]), array([0., 0.]))
        """
        with take_turn(self._lock):
            groups, plan, scalars = self._groups, self._plan, self._scalars
            step = self.step_count
            # The user's own code first, in containers and schedule; then nothing but ours
            # until the kernel has run. The list keeps the gradients alive that long.
            flat = groups.flatten(grads)
            if zero_grad is not False:
                zero_grad = _options.flag(zero_grad, "zero_grad")
            lr = scalars.refresh(step, self._schedule, grad_scale)
            plan.take_grads(flat, groups.labels, writable=zero_grad)
            plan.update(scalars.rows, amsgrad=groups.amsgrad, zero_grad=zero_grad)
            return StepResult(step, lr)

    @property
    def step_count(self) -> int:
        """Calls of `step` so far: the number the schedule is asked for next."""
        return int(self._plan.step_count[0])

    @property
    def amsgrad(self) -> bool:
        """Whether the largest ``exp_avg_sq`` so far is kept and used."""
        return self._groups.amsgrad

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
        self._groups.defaults["lr"] = _options.real(lr, "lr")
        for options in self._groups.options:
            options["lr"] = self._groups.defaults["lr"]

    @property
    def schedule(self) -> Callable[[int], float] | None:
        """The factor on every group's ``lr`` as a function of the step, or None."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Callable[[int], float] | None) -> None:
        self._schedule = _options.check_schedule(schedule)

    @property
    def param_groups(self) -> tuple[dict[str, Any], ...]:
        """The groups' hyperparameters; what is changed here holds from the next step on."""
        return tuple(self._groups.options)

    @property
    def state(self) -> dict[int | str, dict[str, Any]]:
        """Each parameter's step count and moments, by name or place; the arrays are live."""
        states, steps = self._groups.states, self._plan.steps
        return {
            state.key: {"step": int(step), **state.arrays()}
            for state, step in zip(states, steps, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: all that a later run needs but params and schedule.

        Returns
        -------
        dict
            ``"state"``: by name, or by place where there are no names, a dict
            with ``"step"`` (int), ``"exp_avg"``, ``"exp_avg_sq"`` and, with
            AMSGrad, ``"max_exp_avg_sq"`` (arrays of the parameter's shape and
            dtype); ``"param_groups"``: the hyperparameters, with the names or
            places as ``"params"``; ``"step_count"`` (int).

        Raises
        ------
        RuntimeError
            If a step is under way.

        Examples
        --------
        >>> import numpy as np, fastadam
        >>> opt = fastadam.Adam({"w": np.zeros(2)})
        >>> _ = opt.step({"w": np.ones(2)})
        >>> opt.state_dict()["state"]["w"]["exp_avg"]
        array([0.1, 0.1])
        """
        with take_turn(self._lock):
            groups = self._groups
            return export_state(groups.states, self._plan.steps, groups.options, self.step_count)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state that `state_dict` returned, by name where there are names.

        Copies into the optimizer's own arrays; parameters are not touched.

        Raises
        ------
        TypeError, ValueError
            If names, shapes, dtypes, groups or hyperparameters do not fit, with
            every mismatch in the message. The optimizer is then as it was.
        RuntimeError
            If a step is under way.

        Examples
        --------
        >>> import numpy as np, fastadam
        >>> old = fastadam.Adam({"w": np.zeros(2)})
        >>> _ = old.step({"w": np.ones(2)})
        >>> new = fastadam.Adam({"w": np.zeros(2)})
        >>> new.load_state_dict(old.state_dict())
        >>> new.step_count, new.state["w"]["step"]
        (1, 1)
        """
        with take_turn(self._lock):
            groups = self._groups
            loaded = import_state(state_dict, groups.states, groups.options)
            for state, arrays in zip(groups.states, loaded.arrays, strict=True):
                for name, array in state.arrays().items():
                    array[...] = arrays[name]
            self._plan.steps = loaded.steps
            for own, options in zip(groups.options, loaded.options, strict=True):
                own.update(options)
            self._plan.step_count[0] = loaded.step_count

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds addresses: a copy must not write to the original's arrays."""
        left_out = ("_lock", "_plan", "_scalars")
        with take_turn(self._lock):
            kept = {name: value for name, value in vars(self).items() if name not in left_out}
            return {**kept, "steps": self._plan.steps, "step_count": self.step_count}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        """Find the arrays of the copy where they lie now."""
        steps, step_count = kept.pop("steps"), kept.pop("step_count")
        vars(self).update(kept)
        for state in self._groups.states:
            state.thaw()
        self._lock = threading.Lock()
        self._install(self._groups, steps, step_count)

    def __copy__(self) -> "Adam":
        raise TypeError("copy.copy would share params and state: use copy.deepcopy")

    def __repr__(self) -> str:
        groups = self._groups
        elements = sum(state.param.size for state in groups.states)
        dtypes = ", ".join(table.zero.dtype.name for table in self._plan.tables) or "no dtype"
        head = (
            f"{type(self).__name__}({len(groups.states)} parameters, {elements:,} elements of"
            f" {dtypes}, step_count={self.step_count}, amsgrad={groups.amsgrad},"
            f" schedule={self._schedule!r})"
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
    params, lr, betas, eps, amsgrad, maximize, schedule
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

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        weight_decay: float = 1e-2,
        decoupled_weight_decay: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
        schedule: Callable[[int], float] | None = None,
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
        )


def take_turn(lock: threading.Lock) -> threading.Lock:
    """Return the lock of an optimizer for a with statement, unless a step is under way.

    The lock itself, since Python cannot be interrupted between its being taken
    and the with statement's knowing so.

    Raises
    ------
    RuntimeError
        Rather than wait: it may be the step's own schedule that asks.
    """
    if lock.locked():
        raise RuntimeError("an optimizer must not be used in the middle of its own step")
    return lock
