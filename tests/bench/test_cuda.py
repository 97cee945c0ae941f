"""``fastadam bench --device cuda``: what can be told without a device, and in the simulator."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest
from bench_tools import python, stepped

from fastadam import cli, machine
from fastadam.bench import arrays, contenders, measure, peers, report, session, worker
from fastadam.bench import workloads as w
from fastadam.cli import bench

NUMBA_CUDA = importlib.util.find_spec("numba_cuda") is not None
NEEDS_NUMBA_CUDA = pytest.mark.skipif(not NUMBA_CUDA, reason="numba-cuda is not installed")
HAS_GPU = NUMBA_CUDA and bool(machine.cuda_devices()[1])
NEEDS_GPU = pytest.mark.skipif(not HAS_GPU, reason="no GPU here, or no driver")
H100 = {
    "name": "NVIDIA H100",
    "compute_capability": "9.0",
    "memory_bytes": 80 * 2**30,
    "multiprocessors": 132,
    "driver": "580.1",
    "driver_cuda": "13.0",
}


def test_imports_nothing_of_cuda():
    code = """
        import sys
        from fastadam import cli, machine
        from fastadam.bench import arrays, contenders, peers, plot, report, tables, worker
        from fastadam.cli import bench
        print(*{"torch", "cupy", "numba", "numba_cuda", "cuda"} & sys.modules.keys())
    """
    assert subprocess.run(python(code), check=True, capture_output=True).stdout.split() == []


# What is asked for


def chosen(*arguments):
    args = cli._build_parser().parse_args(["bench", "--device", "cuda", *arguments])
    return [(part.tail, part.named, part.sizes) for part in bench._parts(args)]


def test_one_command_answers_all():
    sizes = (10**6, 10**7, 10**8, 10**9)
    named = ["many", "gpt2"]
    step = [*named, "one-by-one"]
    assert chosen() == [(False, step, sizes), (True, named, (10**8,))]
    assert chosen("--no-sizes") == [(False, step, ()), (True, named, ())]
    assert chosen("--quick") == [(False, ["many"], (10**6, 10**7)), (True, ["many"], ())]
    assert chosen("--tail") == [(True, named, (10**8,))]
    assert chosen("--workload", "mlp") == [(False, ["mlp"], ())]
    assert chosen("--sizes", "1e8") == [(False, step, (10**8,))]
    assert chosen("--workload", "mlp", "--tail") == [(True, ["mlp"], ())]


def test_the_cpu_is_the_default():
    (part,) = bench._parts(cli._build_parser().parse_args(["bench"]))
    cpu = w.DEFAULTS["cpu"]
    assert (part.tail, part.named, part.sizes) == (False, list(cpu.step), cpu.sizes)


def test_which_peers(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda _: object())
    names = [peer.name for peer in bench._peers(None, "cuda")]
    own = ["roofline", "opt-grads"]
    torchs = ["torch-fused", "torch-foreach", "fastadam-torch"]
    assert names == [*own, *torchs, "cupy", "cupy-kernel"]
    assert [peer.name for peer in bench._peers(["none"], "cuda")] == own
    assert [peer.name for peer in bench._peers(["cupy"], "cuda")] == [*own, "cupy"]


def test_by_name():
    assert peers.by_name("torch-fused") is peers.PEERS[0]
    assert peers.by_name("torch-fused", "cuda") is peers.PEERS[0]
    assert peers.by_name("fastadam", "cuda") is peers.FASTADAM
    assert peers.by_name("roofline").make is contenders.MemoryPass
    assert peers.by_name("roofline", "cuda").make is contenders.DeviceCopy
    assert peers.by_name("cupy").title == "CuPy"  # a report does not say where
    with pytest.raises(KeyError):
        peers.by_name("keras", "cuda")


def test_what_cannot_take_part(monkeypatch):
    cupy, kernel = (peers.by_name(name, "cuda") for name in ("cupy", "cupy-kernel"))
    assert kernel.why_not("float32", True) == "it cannot clip by the global norm"
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    assert cupy.why_not("float32", False) == (
        "not installed: pip install cupy-cuda13x, or cupy-cuda12x for a driver of CUDA 12"
    )


def run_cli(capsys, *arguments):
    status = cli.main(["bench", "--device", "cuda", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--peer optax",
            "--peer must be one of torch-fused, torch-foreach, fastadam-torch, cupy, cupy-kernel",
        ),
        ("--peer none --peer cupy", "--peer none must not be given with others, got cupy"),
        ("--sizes 0", "must be whole numbers with commas between"),
    ],
)
def test_bad_input(capsys, arguments, message):
    status, out, err = run_cli(capsys, *arguments.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_peer_of_cuda_alone(capsys):
    assert cli.main(["bench", "--peer", "cupy"]) == 2
    assert "with --device cpu, got cupy" in capsys.readouterr().err


# What is missing


@NEEDS_NUMBA_CUDA
def test_no_driver(capsys, monkeypatch, optional):
    optional("rich")
    monkeypatch.setattr(arrays, "cuda_devices", lambda: ("no NVIDIA driver found (x)", []))
    monkeypatch.setattr(machine.cuda_backend(), "SIMULATED", False)
    status, out, err = run_cli(capsys)
    assert (status, out) == (2, "")
    assert err == (
        "fastadam bench: error: --device cuda must find a CUDA device, got none: no NVIDIA driver"
        " found (x)\n"
    )


def test_no_numba_cuda(capsys, monkeypatch, optional):
    """The core's own message, which names the extra."""
    optional("rich")
    real = importlib.util.find_spec

    def find_spec(name, *rest):
        return None if name == "numba_cuda" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.delitem(sys.modules, "fastadam.cuda.compiler", raising=False)
    monkeypatch.delattr("fastadam.cuda.compiler", raising=False)
    status, out, err = run_cli(capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "got none: arrays on a CUDA device need numba-cuda: pip install" in err
    assert "fastadam[cuda13]" in err


class FakeDriver:
    """Two functions' worth of libcuda, and the rest that is asked."""

    def cuInit(self, _):  # noqa: N802
        return 0

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device, ordinal):  # noqa: N802
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name, _, __):  # noqa: N802
        name.value = b"NVIDIA H100"

    def cuDeviceTotalMem_v2(self, memory, _):  # noqa: N802
        memory._obj.value = 80 * 2**30

    def cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = 13000

    def cuDeviceGetAttribute(self, number, attribute, _):  # noqa: N802
        number._obj.value = {75: 9, 76: 0, 16: 132}[attribute]


def test_the_driver_is_asked(monkeypatch, tmp_path):
    (tmp_path / "version").write_text("580.1\n", "utf-8")
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: FakeDriver())
    monkeypatch.setattr(machine, "NVIDIA_VERSION", tmp_path / "version")
    assert machine.cuda_devices()[1] == [H100]
    assert report.device_facts() == {
        **H100,
        "summary": "NVIDIA H100, compute capability 9.0, 80.0 GiB; driver 580.1 for CUDA 13.0",
    }
    monkeypatch.setattr(machine, "NVIDIA_VERSION", tmp_path / "none")
    assert machine.cuda_devices()[1][0]["driver"] is None
    assert report.device_facts()["summary"].endswith("; driver for CUDA 13.0")


# Memory


def test_too_large():
    assert arrays.too_large(2**30, 2**29, 2**40, "on the device") == (
        "needs 1.0 GiB on the device, --max-memory is 512 MiB"
    )
    assert arrays.too_large(2**29, 2**30, 2**30, "on the device") is None
    assert arrays.too_large(2**40, None, float("inf"), "on the device") is None


def test_what_a_pair_needs():
    """A device of 80 GB holds the largest pair, one of 40 GB all but the copy."""
    needed = {
        peer.name: worker.needed_bytes(10**9, peer, "float32", tail=False, device="cuda")
        for peer in (*peers.OWN, *peers.PEERS)
        if "cuda" in peer.devices
    }
    assert needed["roofline"] == (16 + 28) * 10**9
    assert needed["torch-fused"] == 32 * 10**9
    assert max(needed.values()) < 0.9 * 75 * 2**30
    torch = peers.by_name("torch-fused", "cuda")
    tail = worker.needed_bytes(10, torch, "float64", tail=True, device="cuda")
    assert tail == 10 * 8 * (5 + 5 + 2)


def test_why_too_large(monkeypatch):
    """What is left behind is given back; then the device's memory counts, then the host's."""
    log = []
    monkeypatch.setattr(arrays, "release", lambda: log.append("release"))
    monkeypatch.setattr(arrays, "free_on_device", lambda: 10.0 * 2**20)
    monkeypatch.setattr(machine, "memory_available", lambda: 2**20)
    spec = {"tail": False, "dtype": "float32", "max_memory": None, "device": "cuda"}
    peer = peers.by_name("torch-fused", "cuda")
    assert worker._why_too_large(2**20, peer, spec) == (
        "needs 32.0 MiB on the device, free are 10.0 MiB"
    )
    assert worker._why_too_large(2**18, peer, spec) == "needs 2.0 MiB, available are 1.0 MiB"
    assert worker._why_too_large(2**14, peer, spec) is None
    assert log == ["release"] * 3


# Contenders


@pytest.fixture
def _torch_on_the_cpu(monkeypatch, optional):
    optional("torch")
    monkeypatch.setattr(arrays.TorchArrays, "CUDA", "cpu")
    monkeypatch.setattr(arrays, "synchronize", lambda: None)


@pytest.fixture
def _numpy_as_cupy(monkeypatch):
    class NumpyAsCupy(arrays.NumpyArrays):
        cupy = np
        on_host = False

    monkeypatch.setattr(arrays, "CupyArrays", NumpyAsCupy)
    monkeypatch.setattr(arrays, "synchronize", lambda: None)


def check_same_update(name, dtype, tail):
    (_, grads), contender = stepped(peers.by_name(name, "cuda"), dtype, tail, "cuda")
    assert contender.clears_grads == tail
    if tail:
        download = contender.arrays.download
        assert not any(download(grad).any() for grad in contender.grads)
        contender.refill()
        for grad, source in zip(contender.grads, grads, strict=True):
            np.testing.assert_array_equal(download(grad), source)
    tolerance = 2e-6 if dtype == "float32" else 2e-9  # torch adds 1e-6 to the norm it clips by
    _, reference = stepped(peers.FASTADAM, dtype, tail)
    for value, expected in zip(contender.values(), reference.values(), strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance)


BOTH = pytest.mark.parametrize("tail", [False, True], ids=["step", "tail"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


@BOTH
@DTYPES
@pytest.mark.usefixtures("_torch_on_the_cpu")
@pytest.mark.parametrize("name", ["torch-fused", "torch-foreach", "fastadam-torch"])
def test_torch_does_the_same(name, dtype, tail):
    check_same_update(name, dtype, tail)


@BOTH
@DTYPES
@pytest.mark.usefixtures("_numpy_as_cupy")
def test_written_out_does_the_same(dtype, tail):
    check_same_update("cupy", dtype, tail)


@pytest.mark.usefixtures("_numpy_as_cupy")
def test_the_kernel_gets_what_it_names(monkeypatch):
    """In the order of its declaration; a fake in place of the compiled one."""

    def elementwise(inputs, outputs, code, _):
        names = [part.split()[1] for part in f"{inputs}, {outputs}".split(", ")]

        def kernel(*arguments):
            own = dict(zip(names, arguments, strict=True)) | {"sqrt": np.sqrt}
            exec(textwrap.dedent(code).replace(";", ""), {}, own)

        return kernel

    fake = types.SimpleNamespace(**{n: getattr(np, n) for n in ("zeros_like", "sqrt")})
    fake.ElementwiseKernel = elementwise
    monkeypatch.setattr(arrays.CupyArrays, "cupy", fake)
    check_same_update("cupy-kernel", "float64", False)


def test_torch_without_a_device(optional):
    torch = optional("torch")
    if torch.cuda.is_available():
        pytest.skip("this torch finds a device")
    with pytest.raises(RuntimeError, match="this build of torch finds no CUDA device: "):
        arrays.TorchArrays("cuda")


def test_the_copy_moves_what_a_step_moves(monkeypatch):
    copied = []

    def buffer(size):
        return types.SimpleNamespace(address=size)

    driver = types.SimpleNamespace(Buffer=buffer, copy=lambda *a: copied.append(a))
    backend = types.SimpleNamespace(driver=driver)
    monkeypatch.setattr(contenders, "cuda_backend", lambda: backend)
    for dtype, tail, nbytes in [("float32", False, 14), ("float64", True, 44)]:
        params, grads = w.draw([(10, 10)], dtype)
        contender = contenders.DeviceCopy(params, grads, tail, "cuda")
        assert contender.nbytes == 100 * nbytes
        contender.step()
        assert copied.pop() == (100 * nbytes, 100 * nbytes, 100 * nbytes, 0)
        assert contender.clears_grads == tail
        contender.refill()


# Timing


class Clockwork:
    """A contender whose calls take a made-up time, and whose steps take longer."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.calls, self.most = clock, seconds, 0, 0

    def step(self):
        self.clock[0] += self.seconds
        self.calls += 1
        self.most = max(self.most, self.calls)

    def wait(self):
        self.clock[0] += 100.0 * self.calls
        self.calls = 0


def test_host_costs_leave_out_the_device():
    clock = [0.0]
    both = Clockwork(clock, 2.0), Clockwork(clock, 3.0)
    times = measure.host_costs(*both, rounds=9, budget=1e9, clock=lambda: clock[0])
    assert times == ([2.0] * 9, [3.0] * 9)
    assert both[0].most == both[1].most == measure.CALLS
    short = measure.host_costs(*both, rounds=9, budget=0.0, clock=lambda: clock[0])
    assert [len(each) for each in short] == [measure.LEAST_ROUNDS] * 2


def test_bursts_are_as_long_as_asked():
    class Steady:
        def __init__(self):
            self.now = 0.0

        def step(self):
            self.now += 1

        def wait(self):
            pass

        refill = wait

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "burst", lambda *_, **__: 1e-3)
        patch.setattr(measure, "REST", 0.0)
        found = measure.compare(Steady(), Steady(), rounds=1, burst_seconds=measure.CUDA_BURST)
    assert found.number == found.other_number == 20


# What is reported


def one_of(name, workload, median, seconds=1.0, host=None, tail=False):
    ratio = measure.Spread(median, median * 0.9, median * 1.1)
    hosts = [None if host is None else measure.Spread(each, each, each) for each in host or (0, 0)]
    rounds = (seconds,) * 7
    step = median * seconds
    return session.Measured(name, workload, step, rounds, ratio, 7, 3, 2, *hosts, tail=tail)


@pytest.fixture
def found():
    return session.Session(
        "cuda",
        measured=[
            one_of("roofline", "100000000", 0.8, 1e-3, (9.0, 9.0)),
            one_of("roofline", "many", 0.5, 1e-5),
            one_of("torch-fused", "100000000", 1.25, 1e-3, (3e-5, 2e-5)),
            one_of("torch-fused", "many", 2.0, 1e-5, (4e-5, 2.5e-5)),
            one_of("opt-grads", "many", 1.0, 1e-5, (1e-5, 1.5e-5)),
            one_of("roofline", "many", 0.4, 2e-5, tail=True),
            one_of("torch-fused", "many", 3.0, 2e-5, tail=True),
        ],
        missing=[
            session.Missing("cupy", None, "not installed: pip install that", tail)
            for tail in (False, True)
        ],
        other_cpus={"roofline": 0.4, "cupy": None},
    )


SHAPES = {"many": w.WORKLOADS["many"], "100000000": [(10**8,)]}


def test_figures(found):
    figures = report.figures(found, SHAPES, "float32")
    large = figures["copy_fraction"]["100000000"]
    assert large["median"] == 0.8
    assert large["bytes_per_parameter"] == 28
    assert large["bytes_per_second"] == pytest.approx(2.8e12)
    assert large["copy_bytes_per_second"] == pytest.approx(3.5e12)
    tail = figures["tail_copy_fraction"]["many"]
    assert tail["bytes_per_parameter"] == 44
    assert tail["bytes_per_second"] == pytest.approx(44 * 1_024_000 / 2e-5)
    assert {name: one["median"] for name, one in figures["torch_fused"].items()} == {
        "100000000": 1.25,
        "many": 2.0,
    }
    assert figures["tail_torch_fused"]["many"]["median"] == 3.0
    medians = {who: one["median"] for who, one in figures["host_seconds"]["many"].items()}
    # By the pair of opt.grads, in which both ways were timed in turn.
    assert medians == {"opt.step(grads)": 1.5e-5, "opt.step()": 1e-5, "torch-fused": 4e-5}
    assert set(figures["host_seconds"]["100000000"]) == {"opt.step(grads)", "torch-fused"}
    doubles = report.figures(found, SHAPES, "float64")
    assert doubles["copy_fraction"]["many"]["bytes_per_parameter"] == 56


@pytest.fixture
def _pretend(monkeypatch, found, optional):
    optional("rich")
    asked = []

    def measure_nothing(into, *_, tail, **__):
        asked.append((tail, into.device))
        into.measured += found.results(tail)
        into.missing += [one for one in found.missing if one.tail == tail]
        into.other_cpus = found.other_cpus

    monkeypatch.setattr(session, "measure", measure_nothing)
    monkeypatch.setattr(arrays, "why_no_device", lambda: None)
    monkeypatch.setattr(machine, "cuda_devices", lambda: ("", [H100]))
    yield
    assert asked == [(False, "cuda"), (True, "cuda")]


@pytest.mark.usefixtures("_pretend")
def test_command(capsys, tmp_path, optional):
    optional("matplotlib")
    path, picture = tmp_path / "out.json", tmp_path / "out.png"
    status, out, err = run_cli(capsys, "--json", str(path), "--plot", str(picture))
    assert (status, err) == (0, "")
    assert "NVIDIA H100, compute capability 9.0, 80.0 GiB; driver" in out
    assert "Time of a step; after it" in out
    assert "Time of the tail of a training step; after it" in out
    words = " ".join(out.split())
    assert "Bandwidth of a step, 100,000,000 elements: 2,800 GB/s, 80.0% of a copy's" in words
    assert "The whole tail, many: torch fused takes 3.00 times as long" in words
    assert "on the host, many: opt.step(grads) 15.0" in words
    assert words.count("CuPy: not installed") == 1
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")

    saved = json.loads(path.read_text("utf-8"))
    assert saved["date"][:2] == "20"
    assert saved["device"] == report.device_facts()
    assert {"fastadam", "python", "numba", "numpy"} <= saved["versions"].keys()
    assert ("numba-cuda" in saved["versions"]) == NUMBA_CUDA
    assert saved["settings"]["device"] == "cuda"
    assert saved["settings"]["max_grad_norm"] == 1.0
    assert [one["tail"] for one in saved["results"]] == [False] * 5 + [True] * 2
    assert [one["tail"] for one in saved["not_measured"]] == [False, True]
    first, *_, last = saved["results"]
    assert first["host_seconds"] == {
        **dict.fromkeys(("median", "q1", "q3"), 9.0),
        "noisy": False,
    }
    assert last["host_seconds"] is None
    assert saved["other_cpus"] == {"roofline": 0.4, "cupy": None}
    assert saved["workloads"]["1000000000"] == {"tensors": 1, "elements": 10**9}
    assert saved["figures"].keys() == {
        *("copy_fraction", "tail_copy_fraction", "torch_fused", "tail_torch_fused"),
        "host_seconds",
    }


@pytest.mark.usefixtures("_pretend")
def test_json_alone(capsys):
    status, out, err = run_cli(capsys, "--json", "-")
    assert (status, err) == (0, "")
    assert json.loads(out)["figures"]["torch_fused"]["many"]["median"] == 2.0


def test_nothing_is_said_twice():
    both = [report.Part(tail, {"many": []}) for tail in (False, True)]
    missing = [session.Missing("cupy", None, "no", part.tail) for part in both]
    assert report.not_measured(missing, both) == ["CuPy: no"]


def test_the_event_carries_the_host_costs():
    found = session.Session("cuda")
    event = {"event": "result", "workload": "many", "seconds": [1.0], "other_seconds": [2.0]}
    event |= {"number": 1, "other_number": 1, "host_seconds": [0.5], "other_host_seconds": [0.25]}
    found.record(peers.by_name("torch-fused", "cuda"), False, event)
    (one,) = found.measured
    assert (one.fastadam_host_seconds.median, one.host_seconds.median) == (0.5, 0.25)


# In the simulator, and on a device


def served(name, tail, **environment):
    code = f"""
        import json
        from fastadam.bench import measure, worker
        measure.REST = 0.0
        worker.CUDA_BURST = 1e-9
        worker.HOST_ROUNDS = 1
        spec = dict(contender={name!r}, workloads=[["tiny", [[5, 3], [4]]]], tail={tail},
                    dtype="float32", rounds=1, max_memory=None, device="cuda")
        worker.serve(spec, lambda event, **content: print(json.dumps([event, content])))
    """
    done = subprocess.run(
        python(code),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_served(events, tail):
    assert [kind for kind, _ in events if kind != "round"] == ["ready", "start", "result", "end"]
    result = dict(events)["result"]
    assert len(result["seconds"]) == len(result["other_seconds"]) == 1
    assert min(result["seconds"] + result["other_seconds"]) > 0
    assert ("host_seconds" in result) == (not tail)


@NEEDS_NUMBA_CUDA
@pytest.mark.parametrize(("name", "tail"), [("opt-grads", False), ("roofline", True)])
def test_worker_in_the_simulator(name, tail):
    check_served(served(name, tail, NUMBA_ENABLE_CUDASIM="1"), tail)


@NEEDS_NUMBA_CUDA
def test_contenders_in_the_simulator():
    code = """
        import numpy as np
        from fastadam.bench import peers, workloads
        arrays = workloads.draw([(5, 3), (4,)], "float32")
        for tail in (False, True):
            found = []
            for device, name in (("cpu", "fastadam"), ("cuda", "fastadam"), ("cuda", "opt-grads")):
                one = peers.by_name(name, device).make(*arrays, tail, device)
                for _ in range(2):
                    one.refill()
                    one.step()
                one.wait()
                found.append(one.values())
            for values in found[1:]:
                for value, expected in zip(values, found[0]):
                    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)
        print("same")
    """
    done = subprocess.run(
        python(code),
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "same\n", done.stderr


@BOTH
@NEEDS_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["roofline", "opt-grads"])
def test_worker_on_a_device(name, tail):
    check_served(served(name, tail), tail)


@BOTH
@DTYPES
@NEEDS_GPU
@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    [
        *("fastadam", "opt-grads", "torch-fused", "torch-foreach", "fastadam-torch", "cupy"),
        "cupy-kernel",
    ],
)
def test_the_same_update_on_a_device(name, dtype, tail):
    peer = peers.by_name(name, "cuda")
    reason = peer.why_not(dtype, tail)
    if reason is not None:
        pytest.skip(reason)
    try:
        peer.make(*w.draw([(3,)], dtype), tail, "cuda")
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
    check_same_update(name, dtype, tail)


@NEEDS_GPU
@pytest.mark.gpu
def test_command_on_a_device(capsys, tmp_path, optional):
    optional("rich")
    path = tmp_path / "out.json"
    arguments = ["--workload", "many", "--peer", "none", "--rounds", "2", "--json", str(path)]
    assert run_cli(capsys, *arguments)[0] == 0
    saved = json.loads(path.read_text("utf-8"))
    assert saved["not_measured"] == []
    assert saved["figures"]["copy_fraction"]["many"]["median"] > 0
    assert {"opt.step(grads)", "opt.step()"} == saved["figures"]["host_seconds"]["many"].keys()
