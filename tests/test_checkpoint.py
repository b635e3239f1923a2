"""A run that is stopped or killed goes on, and ends as if it had not been."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from itertools import islice

import killable
import pandas as pd
import pytest
import torch
from safetensors.torch import load
from tiny import tiny_model

from vlm_probe.checkpoint import Checkpoint, State, stoppable
from vlm_probe.probe import probe_layers
from vlm_probe.probe.run import Run
from vlm_probe.probe.visit import Visit
from vlm_probe.result import TABLES, ProbeResult
from vlm_probe.toy.examples import toy_examples

FILES = [*(f"{name}.parquet" for name in TABLES), "meta.json"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def pictures():
    return toy_examples(7)


def probe(model, images, **settings):
    settings = {"replicates": 20, "batch_size": 2, "checkpoint_every": 0.0} | settings
    return probe_layers(model, images, progress=False, **settings)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def finished(process):
    process.join(60)
    assert process.exitcode == 0
    return process


def test_killed_twenty_times_it_ends_with_the_same_bytes(tmp_path):
    seed = time.time_ns()
    rng = random.Random(seed)
    sys.stderr.write(f"seed {seed}")  # shown where the test fails
    finished(killable.start(None, tmp_path / "whole"))  # and the server is warm
    begun = time.monotonic()
    finished(killable.start(None, tmp_path / "whole"))
    took = time.monotonic() - begun
    kept, out, killed, reached = tmp_path / "kept", tmp_path / "out", 0, []
    while killed < 20:
        process = killable.start(kept, out)
        # Some die before they have begun, some as they write, some far along.
        process.join(rng.uniform(0, took))
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.kill(process.pid, signal.SIGKILL)
            process.join()
        if process.exitcode == -signal.SIGKILL:
            killed += 1
            reached.append(seen_by(kept))
        else:  # done before it was killed: once more from the start
            assert process.exitcode == 0
            assert contents(out) == contents(tmp_path / "whole")
            for file in kept.iterdir():
                file.unlink()
    assert max(reached) > 0
    finished(killable.start(kept, out))
    assert contents(out) == contents(tmp_path / "whole")
    # And once more: there is nothing left to do, and the result is the same.
    finished(killable.start(kept, tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def seen_by(folder):
    """How many images the checkpoint in a folder has seen; 0 without one."""
    file = folder / "checkpoint-0-of-1.safetensors"
    if not file.is_file():
        return 0
    # All of it at once: opened, it is mapped anew by its name, which another may have
    # taken by then.
    record = load(file.read_bytes())["record"]
    return json.loads(record.numpy().tobytes())["n_seen"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_a_part_that_says_so_and_goes_on(tmp_path, number):
    finished(killable.start(None, tmp_path / "whole"))
    process = killable.start(tmp_path / "kept", tmp_path / "part")
    while seen_by(tmp_path / "kept") < 6:
        assert process.exitcode is None
        time.sleep(0.01)
    os.kill(process.pid, number)
    finished(process)
    part = ProbeResult.load(tmp_path / "part")
    assert part.partial
    assert 0 < part.meta["n_images"] < killable.N_IMAGES - len(killable.BROKEN)
    n_seen = part.meta["n_images"] + len(part.failures)
    # It came as a generator, of which nobody knows the length.
    assert part.meta["partial"] == f"stopped after {n_seen} images"
    # What is there is right: a run over these images alone says the same.
    alone = probe_layers(
        killable.MODEL,
        list(islice(killable.examples(), n_seen)),
        progress=False,
        **killable.SETTINGS,
    )
    # But for the untrained adapter, which is calibrated on more of them.
    a, b = (r.layers.query("condition != 'random_adapter'") for r in (alone, part))
    pd.testing.assert_frame_equal(a, b, rtol=1e-12)
    finished(killable.start(tmp_path / "kept", tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not ProbeResult.load(tmp_path / "out").partial


def interrupting(images, after, times=1, number=signal.SIGINT):
    """The images; behind some of them, someone presses Ctrl-C."""
    for i, image in enumerate(images):
        if i == after:
            for _ in range(times):
                signal.raise_signal(number)
        yield image


def test_ctrl_c_gives_back_what_there_is(model, pictures, capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match="a partial result: stopped after 2 images"):
        part = probe(model, interrupting(pictures, after=3))
    assert part.partial
    assert part.meta["n_images"] == 2
    assert "SIGINT: stopping after this batch; Ctrl-C once m" in capsys.readouterr().err
    assert part.layers.equals(probe(model, pictures[:2]).layers)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_stops_at_once(model, pictures, monkeypatch):
    monkeypatch.setattr("vlm_probe.checkpoint._AGAIN", 0.0)
    with pytest.raises(KeyboardInterrupt):
        probe(model, interrupting(pictures, after=3, times=2))
    with stoppable() as stop:
        assert not stop.asked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_that_comes_twice_is_one(model, pictures, number):
    """As under torchrun, which passes on what its processes have got themselves."""
    with pytest.warns(UserWarning, match="stopped after 2 images"):
        part = probe(model, interrupting(pictures, after=3, times=3, number=number))
    assert part.meta["n_images"] == 2


@pytest.mark.parametrize(("batch", "partial"), [(2, True), (3, False)])
def test_ctrl_c_in_the_last_batch_stops_nothing(
    model, pictures, monkeypatch, batch, partial
):
    add = Run.add

    def interrupted(run, block, on_error):
        if block.number == batch:
            signal.raise_signal(signal.SIGINT)
        add(run, block, on_error)

    monkeypatch.setattr(Run, "add", interrupted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert probe(model, pictures).partial is partial


def test_a_list_says_how_much_is_missing(model, pictures):
    class Interrupting(list):
        def __iter__(self):
            return interrupting(super().__iter__(), after=3)

    with pytest.warns(UserWarning, match="stopped after 2 of 7 images"):
        probe(model, Interrupting(pictures))


def test_more_images_go_on_from_a_whole_block(model, pictures, tmp_path):
    probe(model, pictures[:4], checkpoint=tmp_path)
    more = probe(model, pictures, checkpoint=tmp_path)
    assert more.layers.equals(probe(model, pictures).layers)
    assert more.meta["partial"] is None


def test_other_images_are_refused(model, pictures, tmp_path):
    probe(model, pictures[:4], checkpoint=tmp_path)
    words = "the images are not those that the checkpoint is of, by their path"
    repainted = replace(pictures[3], image=pictures[4].image)
    for other in (
        pictures[1:],
        pictures[:2],
        [*pictures[:3], pictures[4]],
        [*pictures[:3], repainted],
    ):
        with pytest.raises(ValueError, match=words):
            probe(model, other, checkpoint=tmp_path)


def test_pictures_of_the_same_name_are_told_apart(model, pictures, tmp_path):
    for folder, chosen in (("a", pictures[:2]), ("b", pictures[2:4])):
        (tmp_path / folder).mkdir()
        for i, example in enumerate(chosen):
            example.image.save(tmp_path / folder / f"{i}.png")
    files = [[tmp_path / folder / f"{i}.png" for i in range(2)] for folder in "ab"]
    probe(model, files[0], checkpoint=tmp_path / "kept")
    with pytest.raises(ValueError, match="not those that the checkpoint is of, by th"):
        probe(model, files[1], checkpoint=tmp_path / "kept")


def test_another_configuration_is_refused_by_name(model, pictures, tmp_path):
    probe(model, pictures[:2], checkpoint=tmp_path)
    with pytest.raises(
        ValueError,
        match=r"of another run: settings.batch_size was 2, is now 3; "
        r"settings.seed was 0, is now 5. Go on with what it was begun with, delete it",
    ):
        probe(model, pictures[:2], checkpoint=tmp_path, batch_size=3, seed=5)
    with pytest.raises(ValueError, match=r"settings.controls was \[\], is now \['nois"):
        probe(model, pictures[:2], checkpoint=tmp_path, controls=["noise"])
    other = tiny_model()
    with torch.no_grad():
        other.saes[1].sae.b_dec.add_(1)
    with pytest.raises(ValueError, match=r"parts.sae of layer 1.sha256 was '[0-9a-f]+"):
        probe(other, pictures[:2], checkpoint=tmp_path)
    # The same weights, used in another way.
    other = tiny_model()
    other.saes[1].sae.cfg.apply_b_dec_to_input = True
    words = "saes.layer 1.apply_b_dec_to_input was False, is now True"
    with pytest.raises(ValueError, match=words):
        probe(other, pictures[:2], checkpoint=tmp_path)
    # What changes no number may change; "auto" is what it is here.
    probe(model, pictures[:2], checkpoint=tmp_path, encoding="dense")
    probe(
        model, pictures[:2], checkpoint=tmp_path, checkpoint_every=9.0, on_error="raise"
    )


def test_another_number_of_processes_is_refused(tmp_path):
    with Checkpoint(tmp_path, {}, (1, 3)) as kept:
        kept.save(State({}, {}))
    words = "holds the checkpoint of a run by 3 processes, not 1; start as many, or"
    with pytest.raises(ValueError, match=words):
        Checkpoint(tmp_path, {})


def test_a_state_comes_back_as_it_was(tmp_path):
    tensors = {"x": torch.randn(3), "none": torch.zeros(0, dtype=torch.uint8)}
    with Checkpoint(tmp_path / "new", {"a": (1, 2), "b": {"c": None}}) as kept:
        assert kept.load() is None
        kept.save(State(tensors, {"n": 3, "names": [[0, "ä"]]}))
    with Checkpoint(tmp_path / "new", {"a": [1, 2], "b": {"c": None}}) as kept:
        found = kept.load()
    assert found.record == {"n": 3, "names": [[0, "ä"]]}
    assert torch.equal(found.tensors["x"], tensors["x"])
    assert found.tensors["none"].shape == (0,)


@pytest.fixture
def kept(tmp_path):
    with Checkpoint(tmp_path, {}) as opened:
        yield opened


def test_a_crash_while_writing_leaves_the_old_one(kept):
    kept.save(State({"x": torch.zeros(1)}, {"n": 1}))
    kept.file.with_suffix(".unfinished").write_bytes(b"half a file")
    assert kept.load().record == {"n": 1}
    kept.save(State({"x": torch.ones(1)}, {"n": 2}))
    assert kept.load().record == {"n": 2}


@pytest.mark.parametrize("left", [0, 5, 300])
def test_a_damaged_checkpoint_is_named(kept, left):
    kept.save(State({"x": torch.zeros(99)}, {"n": 1}))
    kept.file.write_bytes(kept.file.read_bytes()[:left])
    words = r"checkpoint-0-of-1.safetensors is damaged, .*; delete it, and the run beg"
    with pytest.raises(ValueError, match=words):
        kept.load()


def test_two_processes_do_not_write_to_one(kept, tmp_path):
    with pytest.raises(BlockingIOError, match="another process goes on with the check"):
        Checkpoint(tmp_path, {})
    with Checkpoint(tmp_path / "other", {}):
        pass
    with kept:
        pass
    with Checkpoint(tmp_path, {}):
        pass


def test_where_it_cannot_be_written_is_said_at_once(model, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"is a file; give a folder, which is"):
        probe(model, pictures, checkpoint=tmp_path / "file")
    (tmp_path / "kept" / "checkpoint-0-of-1.unfinished").mkdir(parents=True)
    with pytest.raises(OSError, match=r"cannot be written to .*kept .*; make room"):
        probe(model, pictures, checkpoint=tmp_path / "kept")


def test_a_full_disk_ends_no_run(model, pictures, tmp_path):
    """It is told, and the result is given back all the same."""
    kept = tmp_path / "kept"

    def filling():
        for i, example in enumerate(pictures):
            if i == 4:
                (kept / "checkpoint-0-of-1.unfinished").mkdir()
            yield example

    with pytest.warns(UserWarning, match="the checkpoint cannot be written to .*kept"):
        result = probe(model, filling(), checkpoint=kept)
    assert result.layers.equals(probe(model, pictures).layers)


class BrokenError(Exception):
    pass


def test_what_went_through_before_an_error_is_kept(model, pictures, tmp_path):
    def broken():
        yield from pictures[:5]
        raise BrokenError

    every = {"checkpoint": tmp_path, "checkpoint_every": 3600.0}
    with pytest.raises(BrokenError):
        probe(model, broken(), **every)
    assert seen_by(tmp_path) == 4  # two whole batches
    wrong = [*pictures[:6], "nowhere.png"]
    with pytest.raises(ValueError, match=r"image 6, 'nowhere.png'"):
        probe(model, wrong, on_error="raise", **every)
    assert seen_by(tmp_path) == 6
    assert probe(model, pictures, **every).layers.equals(probe(model, pictures).layers)


def test_half_a_batch_is_not_kept(model, pictures, tmp_path, monkeypatch):
    probe(model, pictures[:4], checkpoint=tmp_path)

    add, calls = Visit._add, itertools.count()

    def failing(*given):
        if next(calls) == 3:  # the first layers have this batch, the others not
            raise BrokenError
        add(*given)

    with monkeypatch.context() as patch, pytest.raises(BrokenError):
        patch.setattr(Visit, "_add", failing)
        probe(model, pictures, checkpoint=tmp_path)
    assert seen_by(tmp_path) == 4
    whole = probe(model, pictures, checkpoint=tmp_path)
    assert whole.layers.equals(probe(model, pictures).layers)


def test_other_pictures_after_no_batch_at_all(model, pictures, tmp_path):
    """Nothing of those that the run was begun with is left."""
    arms = {"controls": ["shuffled_images"]}
    wrong = ["nowhere.png", *pictures[:3]]
    with pytest.raises(ValueError, match=r"image 0, 'nowhere.png'"):
        probe(model, wrong, checkpoint=tmp_path, on_error="raise", **arms)
    found = probe(model, pictures[3:], checkpoint=tmp_path, **arms)
    assert found.layers.equals(probe(model, pictures[3:], **arms).layers)


def test_another_calibration_is_refused(model, pictures, tmp_path):
    arms = {"controls": ["random_adapter"], "calibration": 6}
    probe(model, pictures[:4], checkpoint=tmp_path, **arms)
    with pytest.raises(
        ValueError, match="begun with 4 pictures to calibrate random_ad"
    ):
        probe(model, pictures, checkpoint=tmp_path, **arms)


def test_a_lock_does_not_stay_with_forked_processes(tmp_path):
    with Checkpoint(tmp_path, {}) as kept:
        # What a fork would do without being asked: the child has the open file, too.
        child = subprocess.Popen(["sleep", "60"], pass_fds=[kept._lock.fileno()])
    try:
        with Checkpoint(tmp_path, {}):
            pass
        # A run that was never saved stands in nobody's way.
        with Checkpoint(tmp_path, {}, (0, 2)):
            pass
    finally:
        child.kill()
        child.wait()


def test_very_many_names_fit(kept):
    names = [[i, "x" * 100] for i in range(1_100_000)]  # more than a header may hold
    kept.save(State({}, {"names": names}))
    assert kept.load().record["names"][-1] == names[-1]


def test_not_every_batch_is_written(model, pictures, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Checkpoint, "save", lambda _, state: saved.append(state))
    probe(model, pictures, checkpoint=tmp_path, checkpoint_every=3600.0)
    assert len(saved) == 2  # at the door, and at the end
    probe(model, pictures, checkpoint=tmp_path)
    assert len(saved) == 2 + 1 + 4 + 1
