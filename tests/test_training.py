"""The adapter learns through frozen parts, and they stay as they were."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from learning import LANGUAGE, SAES, STAGES, VISION, examples, four, stack, train
from safetensors.torch import load_file
from tiny import D_MODEL, D_VISION, LAYERS

from vlm_probe.adapter import MlpAdapter, load_adapter
from vlm_probe.model import VisionLanguageModel
from vlm_probe.probe import probe_layers
from vlm_probe.saes import load_saes, outlines
from vlm_probe.training.adapter import train_adapter
from vlm_probe.training.batches import RanOutError
from vlm_probe.training.calibration import word_norm
from vlm_probe.training.curve import COLUMNS
from vlm_probe.training.frozen import Frozen
from vlm_probe.training.learner import Learner
from vlm_probe.training.session import NotFiniteError
from vlm_probe.training.settings import PAPER, AdapterTraining, Stage

TIMES = ["seconds", "tokens_per_second"]
FAST = Stage(epochs=4.0, batch_size=6, learning_rate=2e-2)


class Reading:
    """Examples that are read as they are asked for."""

    def __init__(self, held):
        self.held = held

    def __len__(self):
        return len(self.held)

    def __getitem__(self, index):
        return self.held[index]

    def __iter__(self):
        return iter(self.held)


def same_weights(a, b, tolerance):
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_it_learns_what_is_asked():
    trained = train(stages=[(examples(48), FAST)])
    loss = trained.curve.loss
    assert loss.iloc[-4:].mean() < 0.7 * loss.iloc[:4].mean()
    assert list(trained.curve.columns) == list(COLUMNS)
    assert trained.failures.empty
    assert trained.partial is None
    assert not any(p.requires_grad for p in trained.adapter.parameters())


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("whiten", [True, False])
def test_the_folded_adapter_is_the_one_that_was_learned(kind, whiten):
    learner = Learner(D_VISION, D_MODEL, AdapterTraining(kind=kind))
    patches = VISION.encode([e.picture() for e in examples(8)])
    learner.calibrate(patches.flatten(0, 1), 3.0, whiten=whiten)
    with torch.no_grad():
        expected = learner(patches)
        found = learner.folded({})(patches)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    # The untrained adapter's vectors are as long as words, in the mean.
    assert float(expected.norm(dim=-1).mean()) == pytest.approx(3.0, rel=1e-5)
    if whiten:
        white = (patches.flatten(0, 1) - learner.mean) @ learner.whiten.T
        assert white.mean(0).abs().max() < 1e-2
        assert float(white.var(0).max()) == pytest.approx(1.0, abs=1e-2)


def test_the_norm_of_words_where_vectors_enter():
    found = word_norm(LANGUAGE, ["a large red circle"], 0)
    expected = LANGUAGE.hooked.W_E.norm(dim=1).mean()
    assert found == pytest.approx(float(expected), rel=1e-6)
    later = word_norm(LANGUAGE, ["a large red circle"], 2)
    prompt = LANGUAGE.chat.text_prompt(None, "a large red circle")
    _, cache = LANGUAGE.hooked.run_with_cache(torch.tensor([prompt.ids]))
    words = cache["resid_post", 1][0, prompt.positions("text_only")]
    assert later == pytest.approx(float(words.norm(dim=-1).mean()), rel=1e-5)


def test_four_batches_of_four_are_one_of_sixteen():
    pictures = examples(32)
    for average in ("tokens", "turns"):
        small, large = (
            train(
                stages=[
                    (
                        pictures,
                        Stage(steps=6, batch_size=b, accumulate=a, average=average),
                    )
                ]
            )
            for b, a in ((4, 4), (16, 1))
        )
        same_weights(small.adapter, large.adapter, 1e-6)
        for name in ("loss", "gradient_norm"):
            np.testing.assert_allclose(small.curve[name], large.curve[name], rtol=1e-5)
    # Batches of four alone are something else.
    other = train(stages=[(pictures, Stage(steps=6, batch_size=4))])
    with pytest.raises(AssertionError):
        same_weights(other.adapter, large.adapter, 1e-3)


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """`accelerate launch` on the CPU; one example cannot be read."""
    script = Path(__file__).parent / "learning.py"
    # Without a GPU, what --multi_gpu starts are processes that talk by gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launch, script, tmp_path / "two", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Not whitened: pictures of one color have next to no variance to divide by.
    taught = examples(12, broken=(5,))
    one = train(tmp_path / "one", stages=[(taught, four(6))], whiten=False)
    two = load_adapter(tmp_path / "two" / "adapter.safetensors")
    same_weights(one.adapter, two, 1e-5)
    # The batches that one process takes after the other: not a bit of difference.
    split = train(stages=[(taught, four(3, accumulate=2))], whiten=False)
    same_weights(split.adapter, two, 0)
    curve = pd.read_csv(tmp_path / "two" / "metrics.csv")
    np.testing.assert_allclose(one.curve.loss, curve.loss, rtol=1e-5)
    assert curve.n_conversations.sum() == one.curve.n_conversations.sum() < 24
    failures = pd.read_csv(tmp_path / "two" / "failures.csv")
    assert failures.id.tolist() == one.failures.id.tolist() == ["e5"]


def test_what_cannot_be_learned_from_is_listed(tmp_path):
    pictures = examples(16, broken=(3,))
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    pictures[5] = replace(pictures[5], image=tmp_path / "cut.png")
    pictures[6] = replace(pictures[6], answer=None)
    pictures[7] = replace(pictures[7], prompt="what color ? " * 30)
    pictures[8] = replace(pictures[8], image=None)  # text alone: learned from
    stage = Stage(epochs=2.0, batch_size=4, max_length=60)
    trained = train(tmp_path / "run", stages=[(pictures, stage)])
    found = trained.failures.set_index("id").error
    assert found.index.tolist() == sorted(found.index)
    assert set(found.index) == {"e3", "e5", "e6", "e7"}
    for name, words in {
        "e3": "nowhere.png",
        "e5": "cut.png",
        "e6": "no turn of the assistant",
        "e7": "beyond max_length 60",
    }.items():
        assert words in found[name]
    assert trained.curve.n_conversations.sum() == 2 * 12
    on_disk = pd.read_csv(tmp_path / "run" / "failures.csv")
    assert on_disk.id.tolist() == trained.failures.id.tolist()
    with pytest.raises(ValueError, match=r"example \d+ of stage 1, 'e\d': .*goes on"):
        train(stages=[(pictures, stage)], on_error="raise")
    with pytest.raises(ValueError, match="no example has a picture that can be read"):
        train(stages=[(examples(3, broken=range(3)), stage)])


def test_a_row_that_cannot_be_read_is_one_failure():
    """Rows of datasets are checked as they are read."""

    class Rows(Reading):
        def __getitem__(self, index):
            if index == 5:
                raise ValueError("row 5 has two pictures")
            return super().__getitem__(index)

    stages = [(Rows(examples(9)), Stage(epochs=2.0, batch_size=4))]
    trained = train(stages=stages)
    assert trained.failures[["index", "id", "error"]].to_numpy().tolist() == [
        [5, "5", "row 5 has two pictures"]
    ]
    assert trained.curve.n_conversations.sum() == 16


def test_a_wrong_folder_is_no_million_failures(monkeypatch):
    from vlm_probe.training import batches

    monkeypatch.setattr(batches, "_TOO_MANY", 4)
    pictures = examples(12, broken=range(12))
    with pytest.raises(ValueError, match=r"none of the first 4 examples .*nowhere.png"):
        train(stages=[(pictures, Stage())])


def test_text_alone_is_missing_from_fvu_and_no_zero():
    pictures = examples(12)
    for i in range(0, 12, 2):
        pictures[i] = replace(pictures[i], image=None)
    stages = [(pictures, Stage(epochs=2.0, batch_size=1))]
    measured = train(stages=stages, saes=SAES, penalty_layers=(0,)).curve
    assert measured.fvu.isna().sum() == 12
    assert measured.fvu.min() > 0.05
    whole = train(
        stages=[(pictures, Stage(steps=1, batch_size=12))],
        saes=SAES,
        penalty_layers=(0,),
    ).curve
    pictured = [(e, s) for e, s in zip(pictures, range(12), strict=True) if e.image]
    alone = train(
        stages=[([e for e, _ in pictured], Stage(steps=1, batch_size=6))],
        saes=SAES,
        penalty_layers=(0,),
    ).curve
    # Text beside them changes nothing of it, but for the pictures' order.
    assert whole.fvu[0] == pytest.approx(alone.fvu[0], rel=1e-3)


def test_streamed_saes_are_not_held(tmp_path):
    for layer, sae in SAES.items():
        sae.save(tmp_path / f"layer_{layer}")
    streamed = load_saes(tmp_path, residency="streamed")
    frozen = Frozen(VISION, LANGUAGE, streamed, AdapterTraining())
    assert frozen.saes is streamed
    held = [sae.sae.W_enc.device.type for sae in outlines(frozen.saes).values()]
    assert held == ["meta"] * LAYERS
    stages = [(examples(12), Stage(steps=3, batch_size=4))]
    one, other = (
        train(stages=stages, saes=saes, sae_penalty=0.5) for saes in (SAES, streamed)
    )
    same_weights(one.adapter, other.adapter, 0)


def test_a_loss_that_is_not_a_number_names_its_batch(tmp_path, monkeypatch):
    from vlm_probe.training import step

    stages = [(examples(12), Stage(steps=6, batch_size=2))]
    straight = train(tmp_path / "straight", stages=stages)
    seen, plain = [], step.loss

    def sometimes(language, lessons, vectors, **more):
        found = plain(language, lessons, vectors, **more)
        seen.append(len(lessons))
        return (
            replace(found, cross_entropy=found.cross_entropy * float("nan"))
            if (len(seen) == 4)
            else found
        )

    monkeypatch.setattr(step, "loss", sometimes)
    with pytest.raises(NotFiniteError, match=r"step 4 of stage 1 .*: e\d+, e\d+\. Wh"):
        train(tmp_path / "run", stages=stages)
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
    partial = load_adapter(tmp_path / "run" / "adapter.partial.safetensors")
    assert partial.manifest["partial"] == "stopped in stage 1 of 1, after step 3 of 6"
    # What was learned before is there, and goes on.
    resumed = train(tmp_path / "run", stages=stages, resume=True)
    same_weights(resumed.adapter, straight.adapter, 0)
    assert resumed.curve.step.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_frozen_weight_that_changes_is_an_error(tmp_path):
    vision, language, _ = stack()

    class Meddling(Reading):
        def __getitem__(self, index):
            with torch.no_grad():
                language.hooked.blocks[1].mlp.W_in[0, 0] += 1e-3
            return super().__getitem__(index)

    with pytest.raises(RuntimeError, match="weights of language changed in training"):
        train_adapter(
            vision,
            language,
            [(Meddling(examples(8)), Stage(steps=2, batch_size=2))],
            out=tmp_path,
            calibration=6,
            progress=False,
        )
    assert not list(tmp_path.glob("adapter*"))
    # Nor is what was learned between changed weights gone on with.
    vision, language, _ = stack()
    resumed = train_adapter(
        vision,
        language,
        [(examples(8), Stage(steps=2, batch_size=2))],
        out=tmp_path,
        resume=True,
        calibration=6,
        progress=False,
    )
    assert resumed.curve.step.tolist() == [1, 2]
    alone = train(stages=[(examples(8), Stage(steps=2, batch_size=2))])
    same_weights(resumed.adapter, alone.adapter, 0)


def test_the_penalty_lowers_fvu():
    """Same seed, same examples; cross-entropy stands beside it."""
    stages = [(examples(24), replace(FAST, epochs=6.0))]
    asked = {"penalty_layers": (0, 1)}
    plain, pulled = (
        train(stages=stages, saes=SAES, sae_penalty=penalty, **asked)
        for penalty in (0.0, 3.0)
    )
    assert plain.curve.fvu[0] == pulled.curve.fvu[0]  # begun alike
    last = [t.curve.iloc[-6:] for t in (plain, pulled)]
    assert last[1].fvu.mean() < 0.8 * last[0].fvu.mean()
    assert last[1].cross_entropy.mean() > 0
    first = pulled.curve.iloc[0]
    assert first.loss == pytest.approx(first.cross_entropy + 3.0 * first.fvu)
    assert (plain.curve.loss == plain.curve.cross_entropy).all()


def test_vectors_that_enter_later_are_trained_and_probed():
    longer = replace(FAST, epochs=8.0)
    trained = train(stages=[(examples(48), longer)], inject_layer=1)
    loss = trained.curve.loss
    assert loss.iloc[-8:].mean() < 0.8 * loss.iloc[:8].mean()
    assert trained.adapter.inject_layer == 1
    model = VisionLanguageModel(
        vision=VISION, adapter=trained.adapter, language=LANGUAGE, saes=SAES
    )
    result = probe_layers(model, examples(4), progress=False, replicates=10)
    image = result.layers[result.layers.group == "image"]
    assert image.layer.tolist() == [1, 2]


def test_two_maps_are_trained_and_read_again(tmp_path):
    trained = train(tmp_path, kind="mlp2x_gelu", d_hidden=20)
    again = load_adapter(tmp_path / "adapter.safetensors")
    assert isinstance(again, MlpAdapter)
    same_weights(trained.adapter, again, 0)
    patches = VISION.encode([e.picture() for e in examples(2)])
    torch.testing.assert_close(again(patches), trained.adapter(patches))
    told = again.manifest
    assert told["training"]["kind"] == "mlp2x_gelu"
    assert [stage["n_examples"] for stage in told["stages"]] == [23, 12]
    assert set(told["frozen"]) == {"vision", "language"}
    assert told["n_failures"] == 2


def test_a_language_model_in_bfloat16():
    vision, language, _ = stack()
    language.hooked.to(torch.bfloat16)
    trained = train_adapter(
        vision, language, [(examples(24), FAST)], calibration=6, progress=False
    )
    assert trained.adapter.linear.weight.dtype == torch.float32
    loss = trained.curve.loss
    assert loss.iloc[-4:].mean() < 0.8 * loss.iloc[:4].mean()


def test_a_stream_is_taken_as_it_comes(tmp_path):
    class Stream:
        def __iter__(self):
            yield from examples(10)

    stage = Stage(steps=8, batch_size=2)
    streamed = train(tmp_path / "a", stages=[(Stream(), stage)])
    assert streamed.curve.n_conversations.sum() == 16  # begun again after ten
    with pytest.raises(RanOutError, match="stage 1 ran out of examples after 10; give"):
        train(stages=[(iter(examples(10)), stage)], calibration=1, whiten=False)
    with pytest.raises(ValueError, match="a stream, which has no length; say steps"):
        train(stages=[(Stream(), Stage())])


def test_pictures_are_read_by_workers_alike():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, of forks in processes with threads
        read = [train(workers=workers) for workers in (0, 2)]
    same_weights(read[0].adapter, read[1].adapter, 0)
    pd.testing.assert_frame_equal(
        read[0].curve.drop(columns=TIMES), read[1].curve.drop(columns=TIMES)
    )


def test_patch_tokens_are_kept_on_disk(tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "pictures"
    folder.mkdir()
    pictures = examples(12)
    for i, example in enumerate(pictures):
        file = folder / f"{i}.png"
        example.picture().save(file)
        pictures[i] = replace(example, image=file)
    pictures[2] = replace(pictures[2], image=folder / "nowhere.png")
    stages = [(pictures, Stage(epochs=2.0, batch_size=4))]
    plain = train(stages=stages)
    first = train(stages=stages, vision_cache=cache)
    assert len(list(cache.rglob("*.safetensors"))) == 11
    assert first.failures.equals(plain.failures)
    assert first.failures.id.tolist() == ["e2"]
    # Epochs mix batches anew, in which pictures round in other ways.
    same_weights(first.adapter, plain.adapter, 1e-4)
    again = train(stages=stages, vision_cache=cache)
    same_weights(first.adapter, again.adapter, 0)
    half = train(stages=stages, vision_cache=cache, vision_cache_dtype="float16")
    assert len(list(cache.rglob("*.safetensors"))) == 22
    same_weights(first.adapter, half.adapter, 0.05)


def test_the_seed_decides():
    one, again, other = (train(seed=seed) for seed in (0, 0, 1))
    same_weights(one.adapter, again.adapter, 0)
    with pytest.raises(AssertionError):
        same_weights(one.adapter, other.adapter, 1e-3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stages": []}, "no stage of training given"),
        ({"stages": [([], Stage())]}, "stage 1 has no examples"),
        ({"sae_penalty": 1.0}, "sae_penalty 1.0 given, but no SAE"),
        ({"penalty_layers": (7,), "saes": SAES}, r"penalty_layers \[7\]: no SAE given"),
        (
            {"penalty_layers": (0,), "saes": SAES, "inject_layer": 1},
            "has no image tokens: they enter before block 1 of 3",
        ),
        ({"inject_layer": LAYERS}, "one of the blocks 0 to 2"),
        ({"kind": "resampler"}, "unknown kind of adapter 'resampler'; valid: linear"),
        ({"d_hidden": 3}, "a linear adapter has no width between maps"),
        ({"track": ["mlflow"]}, "unknown tracker 'mlflow'; valid: wandb, tensorboard"),
        ({"resume": True}, "nothing to resume: no checkpoint in None"),
    ],
)
def test_what_cannot_be_asked(given, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train(**given)


def test_examples_are_examples():
    with pytest.raises(TypeError, match="unknown setting 'epoch'; valid: kind, d_hid"):
        train(epoch=3)
    with pytest.raises(TypeError, match="example 0 of stage 1 is of type str; expect"):
        train(stages=[(iter(["a.png"]), Stage(steps=1))])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": 0.0}, "epochs must be above 0, given 0.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, given 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, given 0.0"),
        ({"warm_up": 1.5}, "warm_up is a share of steps, given 1.5"),
        ({"average": "words"}, "unknown average 'words'; valid: tokens, turns"),
    ],
)
def test_settings_that_make_no_sense(given, words):
    with pytest.raises(ValueError, match=words):
        Stage(**given)


def test_the_papers_recipe():
    captions, instructions = PAPER["captions"], PAPER["instructions"]
    assert (captions.learning_rate, captions.batch_size, captions.epochs) == (
        1e-3,
        8,
        1,
    )
    assert (captions.warm_up, captions.final_rate) == (0.03, 1e-8)
    assert (instructions.learning_rate, instructions.batch_size) == (2e-5, 4)
    assert (captions.max_length, instructions.max_length) == (512, 1024)
    assert instructions.epochs == 3


def test_rates_rise_and_fall(tmp_path):
    """By hand: a warm-up of 2 of 10 steps, then a cosine to the final rate."""
    stage = Stage(
        steps=10, batch_size=1, warm_up=0.2, learning_rate=1.0, final_rate=0.1
    )
    trained = train(tmp_path, stages=[(examples(10), stage)], whiten=False)
    rates = trained.curve.learning_rate.tolist()
    assert rates[:3] == pytest.approx([0.0, 0.5, 1.0])
    assert rates[6] == pytest.approx(0.55)  # half-way down
    assert rates[-1] < 0.2
    state = load_file(next((tmp_path / "checkpoint").glob("*.safetensors")))
    assert {"learner.mean", "optimizer.0.exp_avg", "rng"} <= set(state)


def test_stages_differ(tmp_path):
    trained = train(tmp_path)
    assert trained.curve.groupby("stage").step.max().to_dict() == {1: 12, 2: 6}
    assert STAGES[0][1].accumulate == 2
    assert not (tmp_path / "adapter.partial.safetensors").exists()
    again = train(tmp_path, resume=True)  # there is nothing left to do
    same_weights(trained.adapter, again.adapter, 0)
    with pytest.raises(FileExistsError, match=r"there is a run in .* already; ask for"):
        train(tmp_path)
    with pytest.raises(ValueError, match=r"of another run: settings.seed was 0, is no"):
        train(tmp_path, resume=True, seed=3)
