"""Cases that several processes run together, as the ranks of process groups on this machine.

As a script, ``python ranks.py FOLDER FILE...``: the files hold functions marked with `ranks`.
Torch is imported once, since the ranks are forks. Each case has a process group of its own, so
that one which fails leaves the others alone.
"""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

SECONDS = 30  # that a rank waits for the others, before their case fails


def ranks(size):
    """Mark a function as a case for so many ranks; it is called with its rank and a folder."""

    def mark(case):
        case.ranks = size
        return case

    return mark


def run(files, folder, seconds):
    """Run the cases of these files; return what each rank says of each: "passed", or a traceback.

    After so many seconds all processes are ended.
    """
    command = [sys.executable, __file__, str(folder), *map(str, files)]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as parent:
        try:
            output = parent.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(parent.pid, signal.SIGKILL)  # the ranks, too
            output = parent.communicate()[0] + b"\nended: it took too long"
    found = {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}
    return found, output.decode()[-5_000:]


def meet(rank, size, place):
    """Wait for the other ranks, which may need `SECONDS` to see that a case has failed."""
    Path(f"{place}.{rank}").touch()
    end = time.monotonic() + 2 * SECONDS
    while not all(Path(f"{place}.{k}").exists() for k in range(size)):
        if time.monotonic() > end:
            raise TimeoutError("another rank has not come to this case")
        time.sleep(0.005)


def prepare():
    """Compile what most cases need, once, and while nobody waits."""
    import torch

    from fastadam.torch import AdamW

    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    for options in ({}, {"ema_decay": 0.5}, {"amsgrad": True}, {"max_grad_norm": 1.0}):
        AdamW([param], **options).step()


def run_rank(rank, cases, folder):
    """Run the cases that have such a rank: those of most ranks first, so that none waits long."""
    import torch.distributed as dist

    outcomes = {}
    for name, case in sorted(cases.items(), key=lambda pair: -pair[1].ranks):
        if rank >= case.ranks:
            continue
        meet(rank, case.ranks, folder / name)
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(folder / f"{name}.store"), case.ranks),
                rank=rank,
                world_size=case.ranks,
                timeout=timedelta(seconds=SECONDS),
            )
            case(rank, folder)
            outcomes[name] = "passed"
        except BaseException:
            outcomes[name] = traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        (folder / f"{rank}.json").write_text(json.dumps(outcomes))


def main(folder, *paths):
    """Start a process for each rank, and wait for them."""
    names = {name: value for path in paths for name, value in runpy.run_path(path).items()}
    cases = {name: value for name, value in names.items() if hasattr(value, "ranks")}
    prepare()
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=run_rank, args=(rank, cases, Path(folder)))
        for rank in range(max(case.ranks for case in cases.values()))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
