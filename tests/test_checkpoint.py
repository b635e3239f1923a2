"""A run that is stopped or killed goes on, and ends as if it had not been."""

import json
import os
import random
import signal
import time
from itertools import islice
from pathlib import Path

import killable
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from tiny import tiny_model

from vlm_probe.checkpoint import Checkpoint, State, stoppable
from vlm_probe.probe import probe_layers
from vlm_probe.result import TABLES, ProbeResult
from vlm_probe.toy.examples import toy_examples

FILES = [*(f"{name}.parquet" for name in TABLES), "meta.json"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def pictures():
    return toy_examples(7)


@pytest.fixture(scope="module", autouse=True)
def _server():
    # The server, which is started with this environment, has no other path to it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        killable.forked.set_forkserver_preload(["killable"])
        yield


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
    rng = random.Random(time.time_ns())
    begun = time.monotonic()
    finished(killable.start(None, tmp_path / "whole"))
    took = time.monotonic() - begun
    kept, out, killed, reached = tmp_path / "kept", tmp_path / "out", 0, []
    while killed < 20:
        process = killable.start(kept, out)
        # Some die before they have begun, some as they write, some far along.
        process.join(rng.uniform(0, took / 3))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
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
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["record"])["n_seen"]


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
    assert 0 < part.meta["n_images"] < killable.N_IMAGES - 2
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


def interrupting(images, after, times=1):
    """The images; behind some of them, someone presses Ctrl-C."""
    for i, image in enumerate(images):
        if i == after:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        yield image


def test_ctrl_c_gives_back_what_there_is(model, pictures, capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match="a partial result: stopped after 2 images"):
        part = probe(model, interrupting(pictures, after=3))
    assert part.partial
    assert part.meta["n_images"] == 2
    assert "SIGINT: stopping after this batch; once more to" in capsys.readouterr().err
    assert part.layers.equals(probe(model, pictures[:2]).layers)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_stops_at_once(model, pictures):
    with pytest.raises(KeyboardInterrupt):
        probe(model, interrupting(pictures, after=3, times=2))
    with stoppable() as stop:
        assert not stop.asked


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
    words = "the images are not those that the checkpoint is of, by their ids"
    for other in (pictures[1:], pictures[:2], [*pictures[:3], pictures[4]]):
        with pytest.raises(ValueError, match=words):
            probe(model, other, checkpoint=tmp_path)


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
    # What changes no number may change.
    probe(
        model, pictures[:2], checkpoint=tmp_path, checkpoint_every=9.0, on_error="raise"
    )


def test_another_number_of_processes_is_refused(tmp_path):
    Checkpoint(tmp_path, {}, (1, 3)).save(State({}, {}))
    words = "holds the checkpoint of a run by 3 processes, not 1; start as many, or"
    with pytest.raises(ValueError, match=words):
        Checkpoint(tmp_path, {})


def test_a_state_comes_back_as_it_was(tmp_path):
    kept = Checkpoint(tmp_path / "new", {"a": (1, 2), "b": {"c": None}})
    assert kept.load() is None
    tensors = {"x": torch.randn(3), "none": torch.zeros(0, dtype=torch.uint8)}
    kept.save(State(tensors, {"n": 3, "names": [[0, "ä"]]}))
    found = Checkpoint(tmp_path / "new", {"a": [1, 2], "b": {"c": None}}).load()
    assert found.record == {"n": 3, "names": [[0, "ä"]]}
    assert torch.equal(found.tensors["x"], tensors["x"])
    assert found.tensors["none"].shape == (0,)


def test_a_crash_while_writing_leaves_the_old_one(tmp_path, monkeypatch):
    kept = Checkpoint(tmp_path, {})
    kept.save(State({"x": torch.zeros(1)}, {"n": 1}))
    (tmp_path / "checkpoint-0-of-1.unfinished").write_bytes(b"half a file")
    assert kept.load().record == {"n": 1}
    kept.save(State({"x": torch.ones(1)}, {"n": 2}))
    assert kept.load().record == {"n": 2}


def test_a_damaged_checkpoint_is_named(tmp_path):
    kept = Checkpoint(tmp_path, {})
    kept.save(State({"x": torch.zeros(99)}, {"n": 1}))
    kept.file.write_bytes(kept.file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"checkpoint-0-of-1.safetensors is no saf"):
        kept.load()


def test_not_every_batch_is_written(model, pictures, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Checkpoint, "save", lambda _, state: saved.append(state))
    probe(model, pictures, checkpoint=tmp_path, checkpoint_every=3600.0)
    assert len(saved) == 1  # at the end
    probe(model, pictures, checkpoint=tmp_path)
    assert len(saved) == 1 + 4 + 1
