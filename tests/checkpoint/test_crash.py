"""What a save leaves behind when it is killed, fails, or runs beside others.

With FASTADAM_TEST_FULL=1, as many times as an issue asked for; else a sample of that.
"""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

import fastadam
from fastadam.checkpoint import atomic_file, file_format

safetensors = pytest.importorskip("safetensors", exc_type=ImportError)
if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

import save_run  # noqa: E402 - it forks
from save_run import Run, each_line, failed, leftovers, no_links, older  # noqa: E402

FULL = os.environ.get("FASTADAM_TEST_FULL") == "1"
# Of `save_run`, how often; of lines, each how-manyth.
USES = (
    {"kills": 500, "lines": 1, "together": 500, "file-size": 200}
    if FULL
    else {"kills": 20, "lines": 9, "together": 30, "file-size": 5}
)
MOUNTED = {"small-disk": 20 if FULL else 2}
SAVES, EVERY = (300, 1) if FULL else (30, 3)
SCRIPT = Path(save_run.__file__)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Start all uses of the script at once: most of their time they wait for the disk."""
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    can_mount = shutil.which("unshare") and not subprocess.run([*unshare, "true"]).returncode
    started = {}
    for before, uses in (([], USES), (unshare, MOUNTED)):
        if before and not can_mount:
            continue
        folder = tmp_path_factory.mktemp("runs")
        command = [*before, sys.executable, SCRIPT, folder, *(f"{u}={n}" for u, n in uses.items())]
        with (folder / "err").open("wb") as err:
            process = subprocess.Popen(command, stderr=err)
        started |= dict.fromkeys(uses, (folder, process))
    yield started
    for _, process in started.values():
        process.kill()
        process.wait()


def result(runs, use):
    folder, process = runs[use]
    process.wait(timeout=280)
    said = folder / f"{use}.json"
    assert said.exists(), (folder / "err").read_text()
    return json.loads(said.read_text())


def test_killed_at_random_moments(runs):
    done = result(runs, "kills")
    assert done["kills"] == USES["kills"]
    assert done["midway"] > done["kills"] // 4  # others met the moments before and after a save


def test_killed_at_every_line(runs):
    assert result(runs, "lines")["kills"] > 20


def test_two_processes_save_and_one_loads(runs):
    assert result(runs, "together")["states"] > 10


def test_a_limit_on_file_sizes(runs):
    assert result(runs, "file-size")["refused"] == USES["file-size"] + 7


def test_a_full_disk(runs):
    if "small-disk" not in runs:
        pytest.skip("no mount namespace can be made")
    done = result(runs, "small-disk")
    if "no_mount" in done:
        pytest.skip(done["no_mount"])
    assert done["refused"] > 20
    assert done["saved"] > 5
    # It was mounted for that process alone.
    assert not list((runs["small-disk"][0] / "small-disk").iterdir())


@pytest.fixture
def run():
    return Run("tiny")


@pytest.fixture
def path(tmp_path, run):
    """Three saved states: 3 at the path, 2 and 1 in the places of older files."""
    path = tmp_path / "run.safetensors"
    for number in (1, 2, 3):
        run.set(number)
        run.save(path, 3)
    run.set(4)
    return path


def numbers(run, path):
    before = run.opt.step_count
    found = [run.loaded(place) for place in (path, *older(path))]
    run.set(before)
    return found


CALLS = [
    (os, "fsync"),
    (os, "link"),
    (os, "mkdir"),
    (os, "open"),
    (os, "replace"),
    (os, "stat"),
    (os, "chmod"),
    (Path, "chmod"),
    (Path, "replace"),
    (Path, "touch"),
    (safetensors, "serialize_file"),
    (shutil, "copy2"),
    (tempfile, "mkdtemp"),
]


@pytest.fixture
def no_flush(monkeypatch):
    """Only a system that ends loses what was not flushed, and disks are slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
@pytest.mark.parametrize(
    ("owner", "name"), CALLS, ids=lambda part: getattr(part, "__name__", part)
)
@pytest.mark.usefixtures("no_flush")
def test_each_call_that_fails(monkeypatch, run, path, owner, name, links):
    true = getattr(owner, name)
    if not links:
        if name == "link":
            pytest.skip("never called")
        monkeypatch.setattr(os, "link", no_links)
    for failing in range(100):
        calls = 0

        def fails(*arguments, failing=failing, **named):
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return true(*arguments, **named)

        before = numbers(run, path)
        run.set(before[0] + 1)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            code = failed(run, path)
        assert code in (None, errno.ENOSPC)
        saved = code is None
        after = numbers(run, path)
        # Only the folder's own flush comes once the file is in its place.
        assert after[0] == before[0] + saved or name in ("fsync", "open")
        assert after[0] - before[0] in (0, 1)
        rest = after[1:] if after[1:2] != after[:1] else after[2:]
        assert set(rest) >= set(before[1 - (after[0] > before[0]) : 2])
        assert len(older(path)) < 3
        if not (failing < calls and name in ("open", "stat")):  # those that clear up fail too
            assert not leftovers(path.parent)
        run.set(after[0] + 1)
        run.save(path, 3)
        assert not leftovers(path.parent)
        run.set(after[0] + 2)
        run.save(path, 3)
        if failing >= calls:
            break
    else:
        raise AssertionError(f"more than {failing} calls")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.usefixtures("no_flush")
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)
def test_an_exception_at_every_line(run, tmp_path, keep, error):
    path = tmp_path / "run.safetensors"
    run.set(1)
    run.save(path, keep)
    interrupted = 0
    for line in range(0, 1000, EVERY):
        number = run.loaded(path)
        run.set(number + 1)
        seen = 0

        def strike(at, line=line):
            nonlocal seen
            seen += 1
            if at == line:
                raise error(errno.EIO, os.strerror(errno.EIO))

        tracing = sys.gettrace()
        sys.settrace(each_line(strike))
        try:
            run.save(path, keep)
        except (KeyboardInterrupt, OSError, MemoryError):
            interrupted += 1
        finally:
            sys.settrace(tracing)
        assert run.loaded(path) in (number, number + 1)
        for place in older(path):
            assert run.loaded(place) <= number
        if line % 7 == 0 or leftovers(tmp_path):
            run.set(number + 2)
            run.save(path, keep)
            assert not leftovers(tmp_path)
        if seen <= line:
            break
    assert interrupted > 30 // EVERY
    assert len(list(tmp_path.iterdir())) == keep


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_exception_while_writing(monkeypatch, run, path, error):
    def partly(_, new, **__):
        Path(new).write_bytes(b"a part")
        raise error

    monkeypatch.setattr(safetensors, "serialize_file", partly)
    with pytest.raises(error):
        run.save(path, 3)
    assert not leftovers(path.parent)
    assert numbers(run, path) == [3, 2, 1]


def test_without_hard_links_there_are_copies(monkeypatch, run, path):
    monkeypatch.setattr(os, "link", no_links)
    for number in (4, 5):
        run.set(number)
        run.save(path, 4)
    assert numbers(run, path) == [5, 4, 3, 2]
    assert all(place.stat().st_nlink == 1 for place in (path, *older(path)))


@pytest.mark.parametrize("keep", [2, 3])
def test_what_is_kept_is_linked_not_copied(run, path, keep):
    content = path.stat().st_ino
    run.save(path, keep)
    assert older(path)[0].stat().st_ino == content


def test_more_or_fewer_are_kept_when_asked_for(run, path):
    run.save(path, 2)
    assert numbers(run, path)[:2] == [4, 3]
    run.set(5)
    run.save(path)
    assert run.loaded(path) == 5
    for number in (6, 7):
        run.set(number)
        run.save(path, 10**30)
    assert numbers(run, path)[:2] == [7, 6]


def test_what_the_killed_left_is_removed_but_not_what_lives(run, path):
    stale, live = (path.parent / f".fastadam-{name}.saving" for name in ("stale", "live"))
    for folder in (stale, live):
        folder.mkdir()
        (folder / "new").touch()
    other = path.parent / ".fastadam-file.saving"
    other.touch()  # no folder: none of ours
    with atomic_file._locked(live, wait=True):
        run.save(path, 3)
    assert leftovers(path.parent) == [live] or set(leftovers(path.parent)) == {live, other}
    assert (live / "new").exists()
    run.save(path, 3)
    assert not live.exists()


def test_a_folder_that_is_taken_before_it_is_locked(monkeypatch, run, path):
    """Another saver may see the folder the moment it is made, and take it for a dead one's."""
    true, taken = tempfile.mkdtemp, []

    def taking(*arguments, **named):
        folder = true(*arguments, **named)
        if len(taken) < 3:
            taken.append(folder)
            atomic_file._sweep(path.parent)
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", taking)
    run.save(path, 3)
    assert len(taken) == 3
    assert numbers(run, path) == [4, 3, 2]
    assert not leftovers(path.parent)


@pytest.mark.usefixtures("no_flush")
def test_two_threads_save_to_one_path(tmp_path):
    path, runs, errors = tmp_path / "run.safetensors", [Run("tiny"), Run("tiny")], []

    def work(run, offset):
        try:
            for number in range(SAVES):
                run.set(offset + number)
                run.save(path, 3)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(run, offset))
        for run, offset in zip(runs, (1, 10_001), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert max(number % 10_000 for number in numbers(runs[0], path)) == SAVES
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027, 0o002])
def test_access_rights_follow_the_umask(run, tmp_path, umask):
    path, before = tmp_path / "run.safetensors", os.umask(umask)
    try:
        run.save(path, 2)
        run.save(path, 2)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(place.stat().st_mode) for place in (path, *older(path))} == {
        0o666 & ~umask
    }


def test_links_stay_and_their_target_is_replaced(run, tmp_path):
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.mkdir()
    outer.mkdir()
    link, chain = outer / "link.safetensors", outer / "chain.safetensors"
    link.symlink_to(Path("..", "inner", "run.safetensors"))
    chain.symlink_to(link)
    for number in (1, 2):  # the target is not there at first
        run.set(number)
        run.save(chain, 2)
        assert link.is_symlink()
        assert chain.is_symlink()
        assert not (inner / "run.safetensors").is_symlink()
    assert sorted(outer.iterdir()) == [chain, link]
    assert [place.name for place in sorted(inner.iterdir())] == [
        "run.1.safetensors",
        "run.safetensors",
    ]
    assert numbers(run, chain) == [2]
    assert numbers(run, inner / "run.safetensors") == [2, 1]


def test_files_that_share_an_inode_are_not_written_to(run, path):
    """A snapshot by hard link keeps its content."""
    snapshot = path.parent / "snapshot"
    os.link(path, snapshot)
    run.save(path, 3)
    assert numbers(run, snapshot) == [3]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda place: place.mkdir(), FileExistsError, "is no file"),
        (os.mkfifo, FileExistsError, "is no file"),
        (lambda place: place.symlink_to("/dev/full"), FileExistsError, "is no file"),
    ],
    ids=["folder", "pipe", "device"],
)
def test_what_is_no_file_is_neither_replaced_nor_read(run, tmp_path, make, error, message):
    place = tmp_path / "run.safetensors"
    make(place)
    with pytest.raises(error, match=message):
        run.save(place)
    with pytest.raises(fastadam.CheckpointError, match="must be a file"):
        fastadam.load(place, run.opt)
    with pytest.raises(fastadam.CheckpointError, match="must be a file"):
        fastadam.checkpoint.inspect(place)
    assert list(tmp_path.iterdir()) == [place]


def test_folders_that_are_not_there(run, tmp_path):
    missing = tmp_path / "missing" / "run.safetensors"
    for call in (run.save, run.loaded, fastadam.checkpoint.inspect):
        with pytest.raises(FileNotFoundError, match="missing"):
            call(missing)
    (tmp_path / "missing").touch()
    for call in (run.save, run.loaded, fastadam.checkpoint.inspect):
        with pytest.raises(NotADirectoryError, match="missing"):
            call(missing)


def test_errors_name_the_file_that_was_asked_for(run, path, monkeypatch):
    def refuse(place, *_):
        raise OSError(errno.EDQUOT, "no space for you", str(place))

    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(OSError, match="no space for you") as caught:
        run.save(path)
    assert str(caught.value).endswith(f"no space for you: '{path}'")
    with pytest.raises(TypeError, match=r"path must be str or os\.PathLike, got None"):
        fastadam.checkpoint.inspect(None)


def test_a_folder_that_is_read_only(run, path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    path.parent.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            run.save(path)
        assert numbers(run, path) == [3, 2, 1]
    finally:
        path.parent.chmod(0o755)


class PathLike:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


@pytest.mark.parametrize(
    "name", ["ö ü 漢字 🙂", "no suffix", ".hidden", "a.b.c", "-", "[*?]", "x\ny"]
)
def test_names_of_files(monkeypatch, run, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate((name, PathLike(name), Path(name), tmp_path / name), 1):
        run.set(number)
        run.save(path, 3)
        assert run.loaded(path) == number
    assert numbers(run, Path(name)) == [4, 3, 2]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("length", [200, 250, 253, 254, 255])
def test_a_name_as_long_as_there_may_be(run, tmp_path, length):
    path = tmp_path / ("x" * (length - 12) + ".safetensors")
    for number in (1, 2):
        run.set(number)
        run.save(path)
        assert run.loaded(path) == number
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_too_long(run, tmp_path):
    for call in (run.save, run.loaded):
        with pytest.raises(OSError, match="too long"):
            call(tmp_path / ("x" * 256))
    with pytest.raises(TypeError, match=r"str|path"):
        run.save(3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change", [os.unlink, lambda path: os.truncate(path, path.stat().st_size - 500)]
)
def test_a_file_removed_or_cut_short_while_it_is_read(monkeypatch, run, path, change):
    true, reads = file_format.Reader.read, []

    def read(reader, name):
        if len(reads) == 2:
            change(path)
        reads.append(name)
        return true(reader, name)

    run.save(path)
    run.set(5)
    before = [array.tobytes() for array in run.arrays().values()]
    monkeypatch.setattr(file_format.Reader, "read", read)
    if change is os.unlink:  # what is open stays
        assert fastadam.load(path, run.opt).extra == {"number": 4}
    else:
        with pytest.raises(fastadam.CheckpointError, match="damaged"):
            fastadam.load(path, run.opt)
        assert [array.tobytes() for array in run.arrays().values()] == before
        assert run.opt.step_count == 5


def test_a_file_replaced_while_it_is_read(monkeypatch, run, path):
    """Every tensor comes from the file that was opened, under whatever name."""
    true = file_format.Reader.read
    other = Run("tiny")

    def read(reader, name):
        other.set(other.opt.step_count + 100)
        other.save(path, 2)
        return true(reader, name)

    other.set(1)
    monkeypatch.setattr(file_format.Reader, "read", read)
    assert run.loaded(path) == 3


def test_a_save_of_nothing_at_all(tmp_path):
    opt = fastadam.Adam([np.zeros((0, 3)), np.zeros(())])
    empty = fastadam.Adam([])
    for made in (opt, empty):
        fastadam.save(tmp_path / "x", made, keep=2)
        fastadam.load(tmp_path / "x", made)
    with pytest.raises(fastadam.CheckpointError, match="must fit the optimizer"):
        fastadam.load(tmp_path / "x", opt)


def test_a_save_as_python_exits(tmp_path):
    """In a handler of atexit, when no thread can be started."""
    code = """
        import atexit, sys
        import numpy as np
        import fastadam
        opt = fastadam.Adam({"w": np.ones(3)})
        atexit.register(lambda: fastadam.save(sys.argv[1], opt, extra={"at": "exit"}))
    """
    path = tmp_path / "run.safetensors"
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert fastadam.checkpoint.inspect(path).extra == {"at": "exit"}
