"""A whole stack in the files that researchers have, by command line and Python."""

import json
import shutil
import sys

import formats
import hub
import numpy as np
import pytest
import torch

import vlm_probe
from vlm_probe.cli import main
from vlm_probe.examples import data_folder
from vlm_probe.result import ProbeResult

WIDTH, FEATURES, LAYERS = 32, 96, 3
SHORT = dict(replicates=20, progress=False)


def write_saes(folder, *, width=WIDTH):
    """Gemma Scope's layout, each layer's weights its own."""
    for layer in range(LAYERS):
        made = formats.weights(layer, d_model=width, features=FEATURES)
        where = folder / f"layer_{layer}" / "width_16k" / "average_l0_71"
        formats.write_gemma_scope(where, made)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The four sources, by the names of `load`."""
    root = tmp_path_factory.mktemp("stack")
    hub.write_language(root / "tiny-gemma-2", "gemma2")
    hub.write_vision(root / "ViT-tiny")
    write_saes(root / "tiny-scope")
    projector = torch.nn.Linear(24, WIDTH)
    # As the paper's training script leaves it, wrapped for several GPUs.
    state = {f"module.{name}": t for name, t in projector.state_dict().items()}
    torch.save(state, root / "projector.pth")
    return {
        "language": root / "tiny-gemma-2",
        "vision": root / "ViT-tiny",
        "adapter": root / "projector.pth",
        "saes": root / "tiny-scope",
    }


@pytest.fixture
def pictures(tmp_path):
    files = []
    for seed in range(3):
        files.append(tmp_path / f"{seed}.png")
        hub.picture((50 + seed, 40), seed).save(files[-1])
    return files


def test_from_files_to_a_result_in_one_command(parts, pictures, tmp_path, monkeypatch):
    options = [f"--{name}={source}" for name, source in parts.items()]
    words = ["probe", *map(str, pictures), *options, "--replicates=20", "--device=cpu"]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["vlm-probe", *words, f"--out={out}"])
    main()
    assert (out / "report.html").is_file()
    said = ProbeResult.load(out)
    model = vlm_probe.load(**parts, device="cpu")
    result = vlm_probe.probe_layers(model, pictures, **SHORT)
    assert said.layers.equals(result.layers)
    assert said.meta["parts"] == result.meta["parts"] == model.identities()
    assert set(result.layers.layer) == {0, 1, 2}
    assert len(result.layers) == 3 * 3
    assert (result.layers.l0 > 0).all()
    assert result.meta["model"] == "tiny-gemma-2"
    vectors = model.adapter(model.vision.encode([hub.picture()]))
    assert vectors.shape == (1, 16, WIDTH)


def test_both_backends_give_the_same_numbers(parts, pictures):
    tables = [
        vlm_probe.probe_layers(
            vlm_probe.load(**parts, backend=backend, device="cpu"), pictures, **SHORT
        ).layers.select_dtypes("number")
        for backend in ("hooked", "bridge")
    ]
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-3, atol=1e-5)


def test_some_layers_only_and_the_result_says_which(parts, pictures):
    model = vlm_probe.load(**parts, sae_layers=[2, 0], device="cpu")
    result = vlm_probe.probe_layers(model, pictures, **SHORT)
    assert result.meta["layers"] == [0, 2]
    assert result.meta["n_layers"] == 3
    assert sorted(result.layers.layer.unique()) == [0, 2]


def test_a_model_is_saved_whole_and_loaded_again(parts, pictures, tmp_path):
    model = vlm_probe.load(
        **parts,
        dtype="bfloat16",
        vision_block=-2,
        default_prompt="Look.",
        device="cpu",
    )
    folder = model.save(tmp_path / "bundle")
    again = vlm_probe.load(folder, device="cpu")
    expected, found = model.identities(), again.identities()
    assert {n: p["sha256"] for n, p in expected.items()} == {
        n: p["sha256"] for n, p in found.items()
    }
    assert again.language.dtype == torch.bfloat16
    assert (again.name, again.vision.block) == (model.name, -2)
    assert again.language.chat.default_prompt == "Look."
    assert again.reference_texts == model.reference_texts
    assert again.language.name == "tiny-gemma-2"
    assert [sae.model_name for sae in again.saes.values()] == [
        sae.model_name for sae in model.saes.values()
    ]
    tables = [
        vlm_probe.probe_layers(m, pictures, **SHORT).layers for m in (model, again)
    ]
    assert tables[0].equals(tables[1])
    with pytest.raises(FileExistsError, match=r"there is a model in .*bundle already"):
        model.save(folder)


def test_a_bridge_is_saved_and_loaded_as_one(parts, tmp_path):
    model = vlm_probe.load(**parts, backend="bridge", device="cpu")
    again = vlm_probe.load(model.save(tmp_path / "bundle"), device="cpu")
    assert again.language.backend == "bridge"
    ids = model.language.chat.text_prompt("look", "a dog")
    logits = [m.language.logits([ids], None) for m in (model, again)]
    torch.testing.assert_close(logits[0], logits[1])


def test_parts_in_memory_are_taken_as_they_are(parts):
    model = vlm_probe.load(**parts, device="cpu")
    held = dict(
        language=model.language,
        vision=model.vision,
        adapter=model.adapter,
        saes=model.saes,
    )
    again = vlm_probe.load(**held)
    assert all(getattr(again, name) is part for name, part in held.items())
    words = "vision_block given, but vision is an object, which is taken as it is"
    with pytest.raises(ValueError, match=words):
        vlm_probe.load(**held, vision_block=0)
    mixed = vlm_probe.load(**parts | {"language": model.language}, sae_layers=[1])
    assert mixed.language is model.language
    assert list(mixed.saes) == [1]


def test_the_preset_is_the_papers_and_asks_for_its_projector():
    preset = vlm_probe.settings.PRESETS["paper"]
    assert preset.language == "google/gemma-2-2b-it"
    assert preset.saes == "gemma-scope-2b-pt-res-canonical"
    with pytest.raises(ValueError, match=r"adapter not given; a model is made of lang"):
        vlm_probe.load("paper")


def test_what_is_missing_or_unknown_is_named(parts, tmp_path):
    with pytest.raises(ValueError, match="adapter and saes not given"):
        vlm_probe.load(language=parts["language"], vision=parts["vision"])
    with pytest.raises(TypeError, match="unknown part 'sae'; valid: language, vision"):
        vlm_probe.load(sae="x")
    with pytest.raises(FileNotFoundError, match=r'or one of "toy", "paper"'):
        vlm_probe.load(tmp_path)


def test_what_a_folder_says_is_checked(toy, tmp_path):
    shutil.copytree(data_folder() / "toy", tmp_path / "toy")
    described = tmp_path / "toy" / "model.json"
    about = json.loads(described.read_text())
    described.write_text(json.dumps(about | {"sae_leyers": [1]}))
    with pytest.raises(
        ValueError, match=r"model.json says sae_leyers, which is no part"
    ):
        vlm_probe.load(tmp_path / "toy")
    described.write_text(json.dumps(about)[:-5])
    with pytest.raises(ValueError, match=r"model\.json"):
        vlm_probe.load(tmp_path / "toy")


@pytest.mark.parametrize("device", ["gpu0", "cuda:99"])
def test_a_device_that_is_not_there_is_named(parts, device):
    with pytest.raises(ValueError, match=f"'{device}' is not to be had; .* has cpu"):
        vlm_probe.load(**parts, device=device)


def test_options_are_checked_before_anything_is_loaded():
    with pytest.raises(ValueError, match="unknown dtype 'int8'; valid: float32"):
        vlm_probe.load("toy", dtype="int8")
    with pytest.raises(ValueError, match="unknown backend 'tl'; valid: auto, hooked"):
        vlm_probe.load("toy", backend="tl")
    with pytest.raises(ValueError, match="unknown hook_point 'mlp'; valid: resid_pre"):
        vlm_probe.load("toy", hook_point="mlp")


def test_widths_that_do_not_fit_are_named(parts, tmp_path):
    write_saes(tmp_path / "wide", width=40)
    with pytest.raises(ValueError, match="codes activations of width 40, the language"):
        vlm_probe.load(**parts | {"saes": tmp_path / "wide"}, device="cpu")
    torch.save(torch.nn.Linear(20, WIDTH).state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match="takes patch tokens of width 20, the vision"):
        vlm_probe.load(**parts | {"adapter": tmp_path / "narrow.pth"}, device="cpu")


def test_the_doctor_from_the_command_line(parts, monkeypatch, capsys):
    words = [f"--{name}={source}" for name, source in parts.items()]
    monkeypatch.setattr(sys, "argv", ["vlm-probe", "doctor", *words, "--device=cpu"])
    # Random SAEs explain nothing, and so this one does not pass.
    with pytest.raises(SystemExit, match="wrong: explained by the SAEs"):
        main()
    said = capsys.readouterr().out
    assert "ok       soft-cap               attention scores 5, logits 3" in said


def test_saes_of_differently_processed_weights_are_refused(parts):
    model = vlm_probe.load(**parts, device="cpu")
    model.saes[1].sae.cfg.metadata.model_from_pretrained_kwargs = {
        "center_writing_weights": True,
        "dtype": "bfloat16",
    }
    words = (
        r"layers \[1\] were trained on weights processed as "
        r"{'center_writing_weights': True}, that of layer 0 as {}; take SAEs of one"
    )
    with pytest.raises(ValueError, match=words):
        vlm_probe.load(**parts | {"saes": model.saes})
    alone = {1: model.saes[1]}
    loaded = vlm_probe.load(**parts | {"saes": alone})
    assert loaded.language.backend == "hooked"
