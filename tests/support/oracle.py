"""What the tests compare with. Nothing here imports fastadam.

`tutorial` is the loop that the library grew from, in plain Python floats.
`Reference` is the same arithmetic with every option, in NumPy float64.
"""

import math

import numpy as np


def tutorial(params, grads_of, num_steps, steps, lr=1e-2, b1=0.9, b2=0.95, eps=1e-8):
    """Run the tutorial's loop over flat lists of floats; return the params after each step."""
    params = list(params)
    m = [0.0] * len(params)
    v = [0.0] * len(params)
    trajectory = []
    for step in range(steps):
        grads = grads_of(step, params)
        lr_t = lr * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for i, g in enumerate(grads):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g**2
            m_hat = m[i] / (1 - b1 ** (step + 1))
            v_hat = v[i] / (1 - b2 ** (step + 1))
            params[i] -= lr_t * m_hat / (v_hat**0.5 + eps)
        trajectory.append(list(params))
    return trajectory


class Reference:
    """Adam with every option over one array, kept in float64 whatever it is given.

    A moment below the smallest normal number of ``dtype``, that of the array unless given,
    becomes 0.
    """

    def __init__(
        self,
        param,
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        decoupled_weight_decay=False,
        amsgrad=False,
        maximize=False,
        schedule=None,
        ema_decay=None,
        dtype=None,
    ):
        self.param = np.array(param, dtype=np.float64)
        self.tiny = float(np.finfo(dtype or np.asarray(param).dtype).tiny)
        self.exp_avg = np.zeros_like(self.param)
        self.exp_avg_sq = np.zeros_like(self.param)
        self.max_exp_avg_sq = np.zeros_like(self.param) if amsgrad else None
        self.ema, self.ema_decay = None if ema_decay is None else self.param.copy(), ema_decay
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.decoupled = weight_decay, decoupled_weight_decay
        self.maximize, self.schedule = maximize, schedule
        self.step_count = self.updates = 0

    def step(self, grad, grad_scale=1.0, coefficient=1.0):
        """Update with ``coefficient * grad / grad_scale``."""
        lr = self.lr * (1.0 if self.schedule is None else self.schedule(self.step_count))
        self.step_count += 1
        if grad is None:
            return
        self.updates += 1
        b1, b2 = self.betas
        g = np.asarray(grad, dtype=np.float64) / grad_scale * coefficient
        g = -g if self.maximize else g
        if self.weight_decay and not self.decoupled:
            g = g + self.weight_decay * self.param
        self.exp_avg = self.least(b1 * self.exp_avg + (1 - b1) * g)
        self.exp_avg_sq = self.least(b2 * self.exp_avg_sq + (1 - b2) * g * g)
        second = self.exp_avg_sq
        if self.max_exp_avg_sq is not None:
            largest = np.maximum(self.max_exp_avg_sq, self.exp_avg_sq)
            second = self.max_exp_avg_sq = self.least(largest)
        m_hat = self.exp_avg / (1 - b1**self.updates)
        v_hat = second / (1 - b2**self.updates)
        if self.decoupled:
            self.param = self.param * (1 - lr * self.weight_decay)
        self.param = self.param - lr * m_hat / (np.sqrt(v_hat) + self.eps)
        if self.ema is not None:
            self.ema = self.ema + (1 - self.ema_decay) * (self.param - self.ema)

    def least(self, values):
        """0 for all that is below the normal numbers."""
        return np.where(np.abs(values) < self.tiny, 0.0, values)

    def arrays(self):
        named = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.max_exp_avg_sq is not None:
            named["max_exp_avg_sq"] = self.max_exp_avg_sq
        if self.ema is not None:
            named["ema"] = self.ema
        return named


def global_norm(grads):
    """Root of the sum of all squares, to the last place; grads of None are left out."""
    values = np.concatenate([[0.0], *(np.ravel(g) for g in grads if g is not None)])
    if not np.isfinite(values).all():
        return float(np.abs(values).max())  # NaN, if there is any, or infinity
    # By a power of 2, so that no square is infinite and none that counts is 0.
    _, exponent = np.frexp(np.abs(values).max())
    scaled = np.ldexp(values.astype(np.float64), -int(exponent))
    root = math.sqrt(math.fsum(x * x for x in scaled.tolist()))
    with np.errstate(over="ignore"):
        return float(np.ldexp(root, int(exponent)))


def clip_coefficient(norm, max_norm):
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies the gradients by."""
    return 1.0 if max_norm is None else min(max_norm / (norm + 1e-6), 1.0)


def ulps(got, exact, scale):
    """Largest difference in units in the last place of ``got``'s dtype.

    A difference of numbers that cancel has the error of its terms, so the
    unit is that of the largest term, ``scale``, of the result if None.
    """
    got, exact = np.asarray(got), np.asarray(exact, dtype=np.float64)
    if got.size == 0:
        return 0.0
    rounded = exact.astype(got.dtype)
    scale = np.abs(rounded) if scale is None else np.maximum(np.abs(rounded), np.abs(scale))
    unit = np.spacing(scale.astype(got.dtype)).astype(np.float64)
    return float(np.max(np.abs(got.astype(np.float64) - rounded.astype(np.float64)) / unit))
