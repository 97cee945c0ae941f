"""What the benchmarks share: contenders and workloads, those of ``fastadam bench``.

Nothing here makes an array at import: asv imports every module to list the
benchmarks, and again in every process that runs one.
"""

import os

try:
    from fastadam.bench import peers, workloads
except ImportError:  # a commit from before there was such a thing: asv skips
    peers = workloads = None

# The same lists on every machine, so that results have the same shape; what is not
# installed skips itself.
BACKENDS = ["fastadam", "opt-grads", "roofline", "torch-fused", "fastadam-torch", "deepspeed"]
DTYPES = ["float32", "float64"]
# Those that need memory and minutes.
LARGE = ("67M", "gpt2")


def need(reason, *, unless):
    """Have asv skip the benchmark, unless a condition holds."""
    if not unless:
        raise NotImplementedError(reason)


def shapes_of(name):
    """Return the shapes of a workload of ``fastadam bench``."""
    need("this commit has no fastadam.bench", unless=workloads is not None)
    large = os.environ.get("FASTADAM_ASV_LARGE") == "1"
    need("FASTADAM_ASV_LARGE=1 includes it", unless=large or name not in LARGE)
    need(f"this commit has no workload {name}", unless=name in workloads.WORKLOADS)
    return workloads.WORKLOADS[name]


def make(backend, workload, dtype="float32", *, tail=False):
    """Return a contender with arrays of its own, after its first steps.

    ``workload`` is a name or, for one without, the shapes.
    """
    shapes = shapes_of(workload) if isinstance(workload, str) else workload
    need("this commit has no fastadam.bench", unless=peers is not None)
    try:
        peer = peers.by_name(backend)
    except KeyError:
        raise NotImplementedError(f"this commit has no {backend}") from None
    reason = peer.why_not(dtype, tail)
    need(reason, unless=reason is None)
    contender = peer.contender(workload, *workloads.draw(shapes, dtype), tail)
    # Compiles or loads the kernel, starts the threads, touches the state's memory.
    for _ in range(2):
        contender.refill()
        contender.step()
        contender.wait()
    return contender
