"""Training that is killed goes on, and ends with the very same bytes."""

import random

import pandas as pd
import pytest
from learning import STAGES, examples, start, train

TIMES = ["seconds", "tokens_per_second"]


def end(folder):
    """What must be the same: the adapter's bytes, and the curve without its times."""
    curve = pd.read_csv(folder / "metrics.csv", dtype=str).drop(columns=TIMES)
    return (folder / "adapter.safetensors").read_bytes(), curve.to_csv()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    train(folder)
    return end(folder)


def test_killed_at_random_it_ends_with_the_same_bytes(straight, tmp_path):
    rng, kills, step = random.Random(1), 0, 0
    metrics = tmp_path / "metrics.csv"
    while not (tmp_path / "adapter.safetensors").exists():
        resume = next((tmp_path / "checkpoint").glob("*.safetensors"), None) is not None
        process = start(tmp_path, resume=resume)
        # Killed once it is past where it was, up to three steps on.
        target = step + rng.randint(1, 3)
        while process.is_alive():
            done = metrics.read_text().count("\n") - 1 if metrics.exists() else 0
            if done >= target:
                process.kill()
            process.join(0.002)
        process.close()
        kills += not (tmp_path / "adapter.safetensors").exists()
        step = metrics.read_text().count("\n") - 1
        assert kills < 40
    assert kills >= 4
    assert end(tmp_path) == straight


def test_asked_to_stop_it_ends_after_its_step(straight, tmp_path, monkeypatch):
    from vlm_probe.training import session

    asked, plain = [], session.Session.asked_to_stop

    def stop(self, here):
        asked.append(here)
        return plain(self, here or len(asked) == 5)

    monkeypatch.setattr(session.Session, "asked_to_stop", stop)
    stopped = train(tmp_path)
    assert stopped.partial == "stopped in stage 1 of 2, after step 5 of 12"
    assert stopped.adapter.manifest["partial"] == stopped.partial
    assert len(stopped.curve) == 5
    assert not (tmp_path / "adapter.safetensors").exists()
    resumed = train(tmp_path, resume=True)
    assert resumed.partial is None
    assert end(tmp_path) == straight


def test_other_examples_are_refused(tmp_path, monkeypatch):
    from vlm_probe.training import session

    monkeypatch.setattr(session.Session, "asked_to_stop", lambda self, here: True)
    train(tmp_path)
    monkeypatch.undo()
    (first, stage), second = STAGES
    others = list(reversed(examples(len(first))))
    with pytest.raises(
        ValueError, match=r"last learned from the examples .*, and at t"
    ):
        train(tmp_path, stages=[(others, stage), second], resume=True)
