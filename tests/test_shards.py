"""One run by several processes gives what one process gives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import killable
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist

from vlm_probe.checkpoint import State
from vlm_probe.probe import probe_layers, shards
from vlm_probe.probe.feed import Feed
from vlm_probe.probe.run import Run
from vlm_probe.probe.shards import Shard, joined
from vlm_probe.result import TABLES, ProbeResult
from vlm_probe.settings import ProbeSettings

TESTS = Path(__file__).parent


def torchrun(n, *words):
    """Runs words of Python's command line in n processes, one thread each."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    done = subprocess.run(
        [sys.executable, *command, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
    )
    assert done.returncode == 0, done.stderr
    return done


def assert_equal(one, other, rtol=1e-9):
    for name in TABLES:
        a, b = getattr(one, name), getattr(other, name)
        assert list(a.columns) == list(b.columns)
        real = [c for c in a if pd.api.types.is_float_dtype(a[c])]
        pd.testing.assert_frame_equal(a.drop(columns=real), b.drop(columns=real))
        np.testing.assert_allclose(a[real], b[real], rtol=rtol, equal_nan=True)


@pytest.fixture(scope="module")
def alone():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # with two, products are added up in another order
    yield probe_layers(
        killable.MODEL, killable.examples(), progress=False, **killable.SETTINGS
    )
    torch.set_num_threads(before)


def test_torchrun_gives_the_tables_of_one_process(alone, tmp_path):
    torchrun(2, TESTS / "sharded.py", tmp_path, tmp_path / "kept")
    for rank in range(2):
        shared = ProbeResult.load(tmp_path / f"{rank}-of-2")
        assert_equal(shared, alone)
        assert shared.meta == alone.meta
    # Each process has its own part there, for the next time.
    parts = sorted(file.name for file in (tmp_path / "kept").glob("*.safetensors"))
    assert parts == [f"checkpoint-{rank}-of-2.safetensors" for rank in range(2)]


def parts_of(size):
    """The states that processes would have, made one after the other."""
    settings = ProbeSettings(**killable.SETTINGS)
    for rank in range(size):
        run = Run(killable.MODEL, settings)
        feed = Feed(killable.examples(), settings.batch_size)
        run.prepare(feed, None)
        for block in feed.read(rank=rank, size=size):
            run.add(block, "record")
        run.complete = True
        yield run.state()


@pytest.mark.parametrize("size", [1, 2, 3, 16])  # the last: some have nothing to do
def test_any_number_of_processes_adds_up_to_the_same(alone, size):
    settings = ProbeSettings(**killable.SETTINGS)
    whole = Run(killable.MODEL, settings)
    whole.complete = True
    for state in parts_of(size):
        part = Run(killable.MODEL, settings)
        part.restore(state)
        whole.merge(part)
    assert_equal(whole.result({"findings": alone.meta["findings"]}, {}, None), alone)


def test_the_command_line_shares_pictures_too(tmp_path, toy, examples):
    files = []
    for example in examples[:5]:
        files.append(tmp_path / f"{example.id}.png")
        example.image.save(files[-1])
    words = ["probe", *files, "--layers", 7, "--batch-size", 1, "--out"]
    done = torchrun(2, "-m", "vlm_probe", *words, tmp_path / "out")
    assert done.stdout.count("tables in") == 1  # one of them prints, and writes
    shared = ProbeResult.load(tmp_path / "out")
    assert shared.meta["n_images"] == 5
    single = probe_layers(toy, files, layers=[7], batch_size=1, progress=False)
    numbers = shared.layers.select_dtypes("number").columns
    np.testing.assert_allclose(
        shared.layers[numbers], single.layers[numbers], rtol=1e-4
    )


def test_alone_there_is_one():
    state = State({}, {"n": 1})
    assert list(Shard().gather(state)) == [state]
    with joined() as shard:
        assert (shard.rank, shard.size) == (0, 1)
    with pytest.raises(LookupError), Shard().watched():
        raise LookupError


def fails_in_one(rank, store, said, killed):
    """One of two processes of somebody's own group, of which the second fails."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )

    shards._SILENCE = 3.0

    def images():
        yield from killable.examples()
        if rank == 1 and killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            raise LookupError("no disk")

    try:
        probe_layers(killable.MODEL, images(), progress=False, **killable.SETTINGS)
    except (LookupError, RuntimeError) as error:
        said.put((rank, f"{type(error).__name__}: {error}"))
        # Till the other has heard of it: the store may be its own.
        time.sleep(3 * rank)


def start_two(tmp_path, said, killed):
    given = [(rank, tmp_path / "store", said, killed) for rank in range(2)]
    processes = [killable.forked.Process(target=fails_in_one, args=g) for g in given]
    for process in processes:
        process.start()
    return processes


def test_nobody_waits_for_a_process_that_was_killed(tmp_path):
    said = killable.forked.SimpleQueue()
    processes = start_two(tmp_path, said, killed=True)
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    assert said.get()[1].startswith(
        "RuntimeError: process 1 of 2 gave no sign of life for 3 s. What it had done is"
    )


def test_nobody_waits_for_a_process_that_failed(tmp_path):
    said = killable.forked.Queue()
    processes = start_two(tmp_path, said, killed=False)
    heard = dict(said.get(timeout=90) for _ in processes)
    assert heard[1] == "LookupError: no disk"
    assert heard[0].startswith(
        "RuntimeError: process 1 of 2 failed: LookupError: no disk. What it had done is"
    )
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
