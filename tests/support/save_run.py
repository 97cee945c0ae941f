"""Savers that are killed, run out of disk, or race. Run as ``save_run.py FOLDER USE=COUNT ...``.

All runs in forks of this process, which has imported everything: one kill takes milliseconds. Of
each use, all at once, a file USE.json says how often what happened; what must not happen raises.
"""

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np

import fastadam
from fastadam import schedules
from fastadam.checkpoint import atomic_file

SHAPES = {
    "tiny": {"w": (3, 4), "b": (5,), "none": (0, 2)},
    "big": {"w": (500, 200), "b": (65_537,), "scale": ()},
}
SEED = 20261122


class Run:
    """An optimizer in states that a counter numbers: every array, count and option tells it."""

    def __init__(self, size):
        self.params = {
            name: np.zeros(shape, (np.float32, np.float64)[place % 2])
            for place, (name, shape) in enumerate(SHAPES[size].items())
        }
        self.opt = fastadam.Adam(self.params, amsgrad=True, ema_decay=0.5)
        arrays = self.arrays()
        self.base = {key: np.arange(a.size).reshape(a.shape) % 1021 for key, a in arrays.items()}

    def arrays(self):
        state = self.opt.state
        arrays = {(name, "param"): param for name, param in self.params.items()}
        for name in self.params:
            arrays |= {(name, kind): a for kind, a in state[name].items() if kind != "step"}
        return arrays

    def expected(self, key, place, number):
        # Integers, exact in float32.
        dtype = self.params[key[0]].dtype
        return (self.base[key] + (number % 4093 * 11 + place)).astype(dtype)

    def set(self, number):
        """Take on a state."""
        state = self.opt.state_dict()
        for place, key in enumerate(self.base):
            name, kind = key
            array = self.expected(key, place, number)
            if kind == "param":
                self.params[name][...] = array
            else:
                state["state"][name][kind] = array
        for place, name in enumerate(self.params):
            state["state"][name]["step"] = number + place
        state["step_count"] = number
        state["param_groups"][0]["lr"] = 1 / (number + 2)
        self.opt.load_state_dict(state)
        self.opt.schedule = schedules.cosine(number + 1)

    def save(self, path, keep=1):
        fastadam.save(path, self.opt, keep=keep, extra={"number": self.opt.step_count})

    def loaded(self, path):
        """Load a file, find that it is all of one state, and return its number."""
        self.set(0)
        number = fastadam.load(path, self.opt).extra["number"]
        opt = self.opt
        assert opt.step_count == number
        assert [s["step"] for s in opt.state.values()] == [
            number + place for place in range(len(self.params))
        ]
        assert opt.lr == 1 / (number + 2)
        assert opt.schedule == schedules.cosine(number + 1)
        for place, (key, array) in enumerate(self.arrays().items()):
            wanted = self.expected(key, place, number)
            assert array.dtype == wanted.dtype
            assert array.tobytes() == wanted.tobytes(), (key, number)
        return number


def older(path):
    """Return the numbered files that there are, from new to old."""
    places = (atomic_file.numbered(path, number) for number in range(1, 10))
    return [place for place in places if place.exists()]


def leftovers(folder):
    return [found for found in folder.iterdir() if found.name.startswith(".")]


def fork(work):
    """Run a function in a child; return the child's id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_files(run, path, keep, first, last):
    """Find that all files are whole, in order, and no more than `keep`; return the newest."""
    newest = run.loaded(path)
    assert first <= newest <= last, (first, newest, last)
    rest = [run.loaded(place) for place in older(path)]
    # Killed after the file was also given its next place, and before it was replaced.
    if rest[:1] == [newest]:
        rest = rest[1:]
    numbers = [newest, *rest]
    assert numbers == sorted(set(numbers), reverse=True), numbers
    assert len(older(path)) < keep
    return numbers


def kills(folder, count):
    """Kill savers at moments spread over a save; what a save returned for must be there."""
    rng = np.random.default_rng(SEED)
    uses = []
    for size, keep in itertools.product(SHAPES, (1, 3)):
        place = folder / f"{size}-{keep}"
        place.mkdir()
        run, path = Run(size), place / "run.safetensors"
        run.set(1)
        run.save(path, keep)
        uses.append({"run": run, "path": path, "keep": keep, "done": 1, "took": 0.02})
    midway = lost = 0
    shares = rng.permutation(np.linspace(0.0, 1.1, count))
    for attempt in range(count):
        use = uses[attempt % len(uses)]
        run, path, keep = use["run"], use["path"], use["keep"]
        done, started, took = kill_one(use, int(rng.integers(1, 4)), shares[attempt])
        use["took"] = 0.8 * use["took"] + 0.2 * took if took else use["took"]
        midway += bool(leftovers(path.parent))
        numbers = check_files(run, path, keep, done, started)
        lost += started - numbers[0]
        assert keep == 1 or len(numbers) > 1 or attempt < len(uses), numbers
        # The next save removes what the killed one left.
        use["done"] = numbers[0] + 1
        run.set(use["done"])
        run.save(path, keep)
        assert not leftovers(path.parent)
        assert check_files(run, path, keep, use["done"], use["done"])[1:] == numbers[: keep - 1]
    return {"kills": count, "midway": midway, "not_yet": lost}


def kill_one(use, saves, share):
    """Kill a saver in its so-manyth save; return the last number saved, the last begun."""
    run, path, keep = use["run"], use["path"], use["keep"]
    reading, writing = os.pipe()

    def work():
        for number in itertools.count(use["done"] + 1):
            run.set(number)
            os.write(writing, b"%19d\n" % number)
            run.save(path, keep)
            os.write(writing, b"%19d\n" % -number)

    child = fork(work)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        begun, took = 0, 0.0
        said = []
        while begun < saves:
            said.append(int(pipe.readline()))
            if said[-1] > 0:
                begun, start = begun + 1, time.perf_counter()
            else:
                took = time.perf_counter() - start
        until = time.perf_counter() + share * use["took"]
        while time.perf_counter() < until:
            pass
        os.kill(child, signal.SIGKILL)
        said += map(int, pipe.read().split())
    assert ended(child) == -signal.SIGKILL
    return -min([-use["done"], *said]), max(said), took


def each_line(what):
    """Return a trace function that calls ``what`` with the number of each line of a save."""
    lines = itertools.count()

    def trace(frame, event, _):
        if frame.f_code.co_filename != atomic_file.__file__:
            return None
        if event == "line":
            what(next(lines))
        return trace

    return trace


def lines(folder, count):
    """Kill a saver at each ``count``-th of the lines that a save runs through."""
    killed = 0
    os.fsync = lambda _: None  # the system does not end: what is written stays
    for keep, links in itertools.product((1, 3), (True, False)):
        place = folder / f"lines-{keep}-{links}"
        place.mkdir()
        run, path = Run("tiny"), place / "run.safetensors"
        for number in range(1, 5):
            run.set(number)
            run.save(path, keep)
        for line in itertools.count(0, count):
            number = run.loaded(path)

            def work(line=line, run=run, path=path, keep=keep, links=links, number=number):
                run.set(number + 1)
                if not links:
                    os.link = no_links
                sys.settrace(
                    each_line(lambda at: at == line and os.kill(os.getpid(), signal.SIGKILL))
                )
                run.save(path, keep)
                sys.settrace(None)

            if ended(fork(work)) == 0:
                break
            killed += 1
            numbers = check_files(run, path, keep, number, number + 1)
            assert keep == 1 or len(numbers) > 1
            run.set(numbers[0] + 1)
            run.save(path, keep)
            assert not leftovers(place)
            run.set(numbers[0] + 2)
            run.save(path, keep)
        assert line > 10
    return {"kills": killed}


def failed(run, path):
    """Save, and return the number of the error, or None."""
    try:
        run.save(path, 3)
    except OSError as error:
        return error.errno
    return None


def no_links(*_):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def file_size(folder, count):
    """Meet a limit on the size of files, which acts as a full disk, at many sizes."""
    path = folder / "run.safetensors"
    run = Run("big")
    for number in (1, 2, 3):
        run.set(number)
        run.save(path, 3)
    size = path.stat().st_size
    before = {place.name: place.read_bytes() for place in folder.iterdir()}
    run.set(4)
    limits = [0, 1, 8, 100, 4096, size // 2, size - 1]
    limits += np.random.default_rng(SEED).integers(size, size=count).tolist()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        assert failed(run, path) == errno.EFBIG, limit
        assert {place.name: place.read_bytes() for place in folder.iterdir()} == before
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4096, hard))
    run.save(path, 3)
    assert [run.loaded(place) for place in (path, *older(path))] == [4, 3, 2]
    return {"refused": len(limits)}


def small_disk(folder, count):
    """Fill a disk of 12 MiB, in bytes and in files, and save; called in a mount namespace."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m,nr_inodes=40", "none", folder],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"no_mount": done.stderr}
    refused = saved = 0
    run, path = Run("tiny"), folder / "run.safetensors"
    large = Run("big")
    large.set(1)
    large.save(folder / "large.safetensors")
    size = (folder / "large.safetensors").stat().st_size
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    assert size < free < 3 * size, (size, free)
    for links, files, space in itertools.product(
        (True, False), range(1, 6), (0, 4096, 8192, None)
    ):
        if not links:
            os.link, linked = no_links, os.link
        for number in (1, 2, 3):
            run.set(number)
            run.save(path, 3)
        before = [run.loaded(place) for place in (path, *older(path))]
        assert before == [3, 2, 1]
        ballast = folder / "ballast"
        ballast.mkdir()
        info = os.statvfs(folder)
        left = info.f_bavail * info.f_frsize
        if space is not None and left > space:
            (ballast / "space").write_bytes(bytes(left - space))
        for place in range(os.statvfs(folder).f_ffree - files):
            (ballast / str(place)).touch()
        run.set(4)
        code = failed(run, path)
        assert code in (None, errno.ENOSPC), code
        refused, saved = refused + bool(code), saved + (not code)
        wanted = [3, 2, 1] if code else [4, 3, 2]
        assert not leftovers(folder)
        found = [run.loaded(place) for place in (path, *older(path))]
        assert found == wanted, (links, files, space, found, wanted)
        shutil.rmtree(ballast)
        if not links:
            os.link = linked
    # The same with a file that the disk has no room for beside itself twice.
    path = folder / "large.safetensors"
    large.set(2)
    large.save(path)
    for number in range(3, 3 + count):
        large.set(number)
        (folder / "ballast").write_bytes(bytes(size))
        assert failed(large, path) == errno.ENOSPC
        refused += 1
        (folder / "ballast").unlink()
        assert not leftovers(folder)
        assert large.loaded(path) == 2
        assert not older(path)
    return {"refused": refused, "saved": saved}


def together(folder, count):
    """Save from two processes to one path, and load meanwhile."""
    loads, newest = 0, set()
    for keep in (1, 3):
        path = folder / f"run-{keep}.safetensors"
        runs = [Run("tiny"), Run("big")][:1] * 2
        reader = Run("tiny")
        runs[0].set(1)
        runs[0].save(path, keep)

        def work(offset, run=runs[0], path=path, keep=keep):
            for number in range(count):
                run.set(offset + number)
                run.save(path, keep)

        children = {fork(lambda o=o: work(o)) for o in (1_000, 1_001_000)}
        while children:
            newest.add(reader.loaded(path))
            loads += 1
            found, status = os.waitpid(-1, os.WNOHANG)
            if found:
                assert os.waitstatus_to_exitcode(status) == 0
                children.discard(found)
        assert reader.loaded(path) in (1_000 + count - 1, 1_001_000 + count - 1)
        runs[0].set(5)
        runs[0].save(path, keep)
        assert not leftovers(folder)
        assert len(older(path)) == keep - 1
        for place in older(path):
            reader.loaded(place)
    return {"loads": loads, "states": len(newest)}


USES = {
    "kills": kills,
    "lines": lines,
    "file-size": file_size,
    "small-disk": small_disk,
    "together": together,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # of forks, where there are threads
    place = Path(sys.argv[1])
    children = []
    for argument in sys.argv[2:]:
        use, _, count = argument.partition("=")

        def work(use=use, count=int(count)):
            folder = place / use
            folder.mkdir()
            (place / f"{use}.json").write_text(json.dumps(USES[use](folder, count)))

        children.append(fork(work))
    sys.exit(max(map(ended, children)))
