"""Who is compared: what each needs, and what is known against it beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastadam.bench import contenders, cuda_contenders
from fastadam.bench.contenders import HYPERPARAMETERS, TAIL, Contender

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = [
    "CUDA_FASTADAM",
    "CUDA_OWN",
    "CUDA_PEERS",
    "FASTADAM",
    "HYPERPARAMETERS",
    "OWN",
    "PEERS",
    "ROOFLINES",
    "TAIL",
    "Contender",
    "Peer",
    "by_name",
]

NO_TAIL = "it cannot clip by the global norm"


@dataclass(frozen=True)
class Peer:
    """A contender, and what must be known before it is made.

    Attributes
    ----------
    name, title : str
        On the command line; in tables.
    make : callable
        ``make(params, grads, tail)`` returns a `Contender`.
    arrays : int
        How many times a parameter's bytes it holds at its peak: param, grad,
        two moments, and what it makes in passing.
    tail_arrays : int
        The same for the whole tail of a step; 0 if it has none.
    package, install : str
        What to import, and to ``pip install``; empty if fastadam has it.
    versions : tuple of str
        Distributions whose versions matter.
    dtypes : tuple of str
        What it can update.
    """

    name: str
    title: str
    make: Callable[[Sequence[NDArray[Any]], Sequence[NDArray[Any]], bool], Contender]
    arrays: int = 4
    tail_arrays: int = 5
    package: str = ""
    install: str = ""
    versions: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "float64")

    @property
    def installed(self) -> bool:
        """Whether its package is there; it may not work yet."""
        return not self.package or find_spec(self.package) is not None

    def why_not(self, dtype: str, tail: bool) -> str | None:
        """Return why it cannot take part, None if nothing is known against it."""
        if tail and not self.tail_arrays:
            return NO_TAIL
        if dtype not in self.dtypes:
            return f"it has no {dtype}"
        if not self.installed:
            return f"not installed: pip install {self.install or self.package}"
        return None


FASTADAM = Peer("fastadam", "fastadam", contenders.FastAdam)
# Measured always: they need nothing but fastadam.
OWN = (
    Peer("opt-grads", "fastadam opt.grads", contenders.FastAdamGrads),
    Peer("roofline", "memory roofline", contenders.RooflinePass),
    # One more: it takes a copy of the gradients, without their signs.
    Peer("divider", "divider roofline", contenders.DividerPass, arrays=5, tail_arrays=6),
)
ROOFLINES = ("roofline", "divider")
FLOAT32 = ("float32",)
PEERS = (
    Peer(
        "torch-fused",
        "torch fused",
        contenders.TorchFused,
        package="torch",
        versions=("torch",),
    ),
    Peer(
        "torch-foreach",
        "torch foreach",
        contenders.TorchForeach,
        arrays=5,
        tail_arrays=6,
        package="torch",
        versions=("torch",),
    ),
    Peer(
        "deepspeed",
        "DeepSpeed CPUAdam",
        contenders.DeepSpeed,
        package="deepspeed",
        install="torch deepspeed ninja (it compiles: g++ must be on PATH)",
        versions=("deepspeed", "torch"),
        dtypes=FLOAT32,
    ),
    Peer(
        "optax",
        "optax",
        contenders.Optax,
        arrays=6,
        tail_arrays=8,
        package="optax",
        versions=("optax", "jax", "jaxlib"),
    ),
    Peer(
        "thinc",
        "thinc",
        contenders.Thinc,
        tail_arrays=0,
        package="thinc",
        versions=("thinc",),
        dtypes=FLOAT32,
    ),
    Peer(
        "scikit-learn",
        "scikit-learn",
        contenders.ScikitLearn,
        arrays=8,
        tail_arrays=0,
        package="sklearn",
        install="scikit-learn",
        versions=("scikit-learn",),
    ),
)

CUDA_FASTADAM = Peer(
    "fastadam", "fastadam", cuda_contenders.FastAdamCuda, versions=("numba-cuda",)
)
CUDA_OWN = (
    Peer("opt-grads", "fastadam opt.grads", cuda_contenders.FastAdamGradsCuda),
    Peer("roofline", "device copy", cuda_contenders.DeviceCopy, arrays=7, tail_arrays=11),
)
CUPY = {
    "package": "cupy",
    "install": "cupy-cuda13x, or cupy-cuda12x for a driver of CUDA 12",
    "versions": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
}
CUDA_PEERS = (
    Peer(
        "torch-fused",
        "torch fused",
        cuda_contenders.TorchFusedCuda,
        package="torch",
        versions=("torch",),
    ),
    Peer(
        "torch-foreach",
        "torch foreach",
        cuda_contenders.TorchForeachCuda,
        arrays=5,
        tail_arrays=6,
        package="torch",
        versions=("torch",),
    ),
    Peer(
        "cupy",
        "CuPy",
        cuda_contenders.CupyWrittenOut,
        arrays=7,
        tail_arrays=8,
        **CUPY,  # type: ignore[arg-type]
    ),
    Peer(
        "cupy-kernel",
        "CuPy ElementwiseKernel",
        cuda_contenders.CupyKernel,
        tail_arrays=0,
        **CUPY,  # type: ignore[arg-type]
    ),
)


def by_name(name: str, device: str = "cpu") -> Peer:
    """Return a contender by its name on the command line.

    Parameters
    ----------
    name : str
        Of ``fastadam``, or of one of its own or a peer.
    device : {"cpu", "cuda"}
        Where it works: most names stand for one on either. A name that is not
        known there is looked up on the other.

    Returns
    -------
    Peer
        The one of that name.

    Raises
    ------
    KeyError
        If there is none.

    Examples
    --------
    >>> from fastadam.bench.peers import by_name
    >>> by_name("torch-fused").title
    'torch fused'
    """
    on_cpu, on_cuda = (FASTADAM, *OWN, *PEERS), (CUDA_FASTADAM, *CUDA_OWN, *CUDA_PEERS)
    # The last of a name counts.
    every = (*on_cpu, *on_cuda) if device == "cuda" else (*on_cuda, *on_cpu)
    return {peer.name: peer for peer in every}[name]
