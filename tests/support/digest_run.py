"""A trajectory through every option, and a digest of the bits it ends in; run as a script too."""

import hashlib
import sys
from itertools import pairwise

import numpy as np

import fastadam
from fastadam import schedules

# What every machine, processor and version must end in. If a change of the
# formula is meant, print(digest()) gives the new ones.
DIGEST = {
    "float32": "6778bbe08ac20ae9696894a2004f6fc4",
    "float64": "f1dc580fed602ec972509384ddc4a283",
}
# The same with all of the optimizer tail: print(tail_digest()).
TAIL_DIGEST = {
    "float32 tail": "197b2d979b2971b5652fe190674d5f5c",
    "float64 tail": "f119956e99290379bb4d6de8cc577ba7",
}
# The same with moments and gradients that become denormal: print(fading_digest()).
FADING_DIGEST = {
    "float32 fading": "1d6f80c4593ee058b0912cda561f0151",
    "float64 fading": "e5140c5d88f50f0fd4c46655b4abf6c7",
}

MODES = (
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"amsgrad": True, "maximize": True, "betas": (0.9, 0.999), "lr": 1e-3},
)
SIZE, STEPS = 70_001, 12
# The options of the tail, each alone and all at once; zero_grad is one of a step.
TAIL_MODES = {
    "max_grad_norm": {"max_grad_norm": 1.0},
    "nonfinite": {"nonfinite": "skip"},
    "ema_decay": {"ema_decay": 0.9},
    "zero_grad": {"zero_grad": True},
    "everything": {
        "weight_decay": 0.1,
        "amsgrad": True,
        "max_grad_norm": 1.0,
        "nonfinite": "skip",
        "ema_decay": 0.9,
        "zero_grad": True,
    },
}


def cut(array, pieces):
    """Cut into contiguous views, of sizes that no vector length divides."""
    if pieces == 1:
        return [array]
    edges = np.linspace(0, array.size, pieces + 1).astype(int)
    return [array[start:end] for start, end in pairwise(edges)]


def trajectory(dtype, mode, pieces=1, size=SIZE):
    """Return the bytes of parameters and moments after some steps."""
    # Integers turned to floats: the draws are the same under every NumPy.
    raw = np.random.Generator(np.random.PCG64(7)).integers(-(2**20), 2**20, (STEPS + 1, size))
    values = (raw / 2**20).astype(dtype)
    param = values[0].copy()
    opt = fastadam.Adam(cut(param, pieces), schedule=schedules.cosine(20), **mode)
    for step in range(STEPS):
        opt.step(cut(values[step + 1], pieces), grad_scale=1.5)
    moments = [
        np.concatenate([opt.state[k][name] for k in range(pieces)])
        for name in ("exp_avg", "exp_avg_sq")
    ]
    return b"".join(array.astype(f"<f{param.itemsize}").tobytes() for array in (param, *moments))


def digest(pieces=1, size=SIZE):
    """Return a digest for each dtype, over all modes."""
    found = {}
    for dtype in (np.float32, np.float64):
        bits = hashlib.sha256()
        for mode in MODES:
            bits.update(trajectory(dtype, mode, pieces, size))
        found[np.dtype(dtype).name] = bits.hexdigest()[:32]
    return found


def tail_trajectory(dtype, mode, pieces=1, size=SIZE, steps=STEPS, keep_norms=True):
    """Return the bytes of all that an optimizer holds after some steps, and of the norms."""
    raw = np.random.Generator(np.random.PCG64(11)).integers(-(2**20), 2**20, (steps + 1, size))
    values = (raw / 2**20).astype(dtype)
    if mode.get("nonfinite"):
        values[2, size // 2] = np.nan  # a step that is skipped
    param = values[0].copy()
    zero_grad = mode.get("zero_grad", False)
    options = {name: value for name, value in mode.items() if name != "zero_grad"}
    opt = fastadam.Adam(cut(param, pieces), schedule=schedules.cosine(20), **options)
    norms = []
    for grads in values[1:]:
        result = opt.step(cut(grads, pieces), grad_scale=1.5, zero_grad=zero_grad)
        norms += [-1.0 if result.skipped else result.grad_norm or 0.0]
    state = opt.state
    names = [name for name in state[0] if name != "step"]
    arrays = [np.concatenate([state[k][name] for k in range(pieces)]) for name in names]
    parts = [a.astype(f"<f{a.itemsize}").tobytes() for a in (param, values, *arrays)]
    return b"".join([*parts, np.array(norms, "<f8").tobytes() if keep_norms else b""])


def tail_digest():
    """Return a digest for each dtype, with all of the tail on."""
    found = {}
    for dtype in (np.float32, np.float64):
        bits = hashlib.sha256(tail_trajectory(dtype, TAIL_MODES["everything"]))
        found[f"{np.dtype(dtype).name} tail"] = bits.hexdigest()[:32]
    return found


# Through numbers that become denormal: each dtype has betas by which moments do in so many steps.
FADING_STEPS = 1_000
FADING_BETAS = {"float32": (0.9, 0.91), "float64": (0.4, 0.5)}
FADING_MODES = (
    {},
    {"lr": 1e-3, "weight_decay": 1e-5, "maximize": True},  # by which weights fade as well
    {"lr": 0.5, "weight_decay": 0.5, "decoupled_weight_decay": True},
    {"lr": 1e-13, "amsgrad": True, "ema_decay": 0.3, "max_grad_norm": 1e-3},
)


def fading_trajectory(dtype, mode, pieces=1, size=301):
    """Return the bytes of all that an optimizer holds once units died, or have tiny gradients."""
    raw = np.random.Generator(np.random.PCG64(13)).integers(-(2**20), 2**20, (2, size))
    param, grad = (raw / 2**20).astype(dtype)
    # In float32 about 1e-21, 1e-36 and 1e-42, whose squares, or they themselves, are denormal.
    powers = (-70, -120, -140) if dtype is np.float32 else (-512, -1018, -1060)
    for k, power in enumerate(powers):
        grad[k::8] = np.ldexp(grad[k::8], power)
        param[k::16] = 0.0
    opt = fastadam.Adam(cut(param, pieces), betas=FADING_BETAS[np.dtype(dtype).name], **mode)
    for step in range(FADING_STEPS):
        if step == 5:
            grad[3::8] = grad[4::8] = grad[5::8] = 0.0
        opt.step(cut(grad, pieces), grad_scale=0.75)
    state = opt.state
    names = [name for name in state[0] if name != "step"]
    arrays = [np.concatenate([state[k][name] for k in range(pieces)]) for name in names]
    return b"".join(a.astype(f"<f{a.itemsize}").tobytes() for a in (param, *arrays))


def fading_digest(pieces=1):
    """Return a digest for each dtype, over all of these modes."""
    found = {}
    for dtype in (np.float32, np.float64):
        bits = hashlib.sha256()
        for mode in FADING_MODES:
            bits.update(fading_trajectory(dtype, mode, pieces))
        found[f"{np.dtype(dtype).name} fading"] = bits.hexdigest()[:32]
    return found


if __name__ == "__main__":
    sys.stdout.write(repr({**digest(), **tail_digest(), **fading_digest()}))
