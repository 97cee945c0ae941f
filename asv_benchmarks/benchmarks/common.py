"""Workloads, and the optimizers that are compared on them.

Nothing here makes an array at import: asv imports every module to list the
benchmarks, and again in every process that runs one.
"""

import os

import numpy as np

import fastadam

# The same list on every machine, so that results have the same shape; what is not
# installed skips itself.
BACKENDS = ["fastadam", "numpy", "torch_fused"]
DTYPES = ["float32", "float64"]
HYPERPARAMETERS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}


def _gpt2():
    width, layer = 768, []
    for rows, columns in [(width, 3 * width), (width, width)]:
        layer += [(rows, columns), (columns,)]
    for rows, columns in [(width, 4 * width), (4 * width, width)]:
        layer += [(rows, columns), (columns,)]
    norms = [(width,)] * 2
    return [(50_257, width), (1_024, width), *(12 * [*layer, *norms, *norms]), *norms]


WORKLOADS = {
    # The character-level transformer of `fastadam train`: 4,192 elements.
    "micro": [(27, 16), (16, 16), (27, 16), *(4 * [(16, 16)]), (64, 16), (16, 64)],
    # 269,322 elements.
    "mlp": [(784, 256), (256,), (256, 256), (256,), (256, 10), (10,)],
    # 1,024,000 elements.
    "many": 1_000 * [(32, 32)],
    # GPT-2 small: 148 tensors, 124,439,808 elements, 2 GB with gradients and state.
    "gpt2": _gpt2(),
}


def workload(name):
    """Return the shapes of a workload, or have asv skip the benchmark."""
    if name == "gpt2" and os.environ.get("FASTADAM_ASV_LARGE") != "1":
        raise NotImplementedError("needs memory and minutes: FASTADAM_ASV_LARGE=1 includes it")
    return WORKLOADS[name]


def draw(shapes, dtype, seed=0):
    """Return a list of parameters and one of gradients."""
    rng = np.random.default_rng(seed)

    def arrays():
        # Away from 0: squares of tiny gradients would be subnormal, which is slow.
        return [rng.uniform(0.1, 1.0, shape).astype(dtype) for shape in shapes]

    return arrays(), arrays()


def make(backend, params, *, weight_decay=0.0, amsgrad=False):
    """Return ``step(grads, zero_grad=False)``, which updates the arrays in place.

    Every backend gets NumPy arrays and updates them: torch shares their memory.
    """
    options = {**HYPERPARAMETERS, "weight_decay": weight_decay, "amsgrad": amsgrad}
    if backend == "fastadam":
        return fastadam.Adam(params, **options).step
    if backend == "numpy":
        return NumpyAdam(params, **options).step
    return TorchFusedAdam(params, **options).step


class NumpyAdam:
    """Adam as well as NumPy alone can do it: in place, one scratch array, no temporaries."""

    def __init__(self, params, lr, betas, eps, weight_decay, amsgrad):
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.params, self.steps = weight_decay, params, 0
        self.exp_avg = [np.zeros_like(p) for p in params]
        self.exp_avg_sq = [np.zeros_like(p) for p in params]
        self.max_exp_avg_sq = [np.zeros_like(p) if amsgrad else None for p in params]
        # Shared by all tensors, so that it stays in the cache from one to the next.
        scratch = np.empty((2, max(p.size for p in params)), params[0].dtype)
        self.scratch = [[row[: p.size].reshape(p.shape) for row in scratch] for p in params]

    def step(self, grads, zero_grad=False):
        beta1, beta2 = self.betas
        self.steps += 1
        step_size = self.lr / (1 - beta1**self.steps)
        inv_sqrt_bias2 = (1 - beta2**self.steps) ** -0.5
        state = zip(
            self.params,
            grads,
            self.exp_avg,
            self.exp_avg_sq,
            self.max_exp_avg_sq,
            self.scratch,
            strict=True,
        )
        for p, grad, m, v, largest, (a, b) in state:
            g = grad
            if self.weight_decay:
                g = np.multiply(p, self.weight_decay, out=b)
                g += grad
            m *= beta1
            m += np.multiply(g, 1 - beta1, out=a)
            v *= beta2
            np.multiply(g, g, out=a)
            a *= 1 - beta2
            v += a
            if largest is not None:
                v = np.maximum(largest, v, out=largest)
            np.sqrt(v, out=a)
            a *= inv_sqrt_bias2
            a += self.eps
            np.divide(m, a, out=a)
            a *= step_size
            p -= a
            if zero_grad:
                grad.fill(0)


class TorchFusedAdam:
    """torch.optim.Adam(fused=True) on the CPU."""

    def __init__(self, params, **options):
        try:
            import torch  # not above: seconds, which the other backends' processes would take too
        except ImportError:
            raise NotImplementedError("torch is not installed") from None
        self.from_numpy = torch.from_numpy
        self.params = [torch.from_numpy(p).requires_grad_() for p in params]
        self.optimizer = torch.optim.Adam(self.params, fused=True, **options)
        self.grads = None

    def step(self, grads, zero_grad=False):
        # Wrapping costs about a microsecond an array, and only new arrays need it.
        if grads is not self.grads:
            for p, grad in zip(self.params, grads, strict=True):
                p.grad = self.from_numpy(grad)
            self.grads = grads
        self.optimizer.step()
        if zero_grad:
            self.optimizer.zero_grad(set_to_none=False)
