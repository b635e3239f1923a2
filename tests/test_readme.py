"""The README's code runs as it stands, top to bottom."""

import json
import re
from pathlib import Path

import formats
import hub
import torch

from vlm_probe.adapter import LinearAdapter
from vlm_probe.examples import data_folder
from vlm_probe.language import LanguageModel
from vlm_probe.model import loading
from vlm_probe.vision import VisionModel

README = Path(__file__).parent.parent / "README.md"
OWN = "## With your own model"


def run(text):
    """Runs the blocks of code in a piece of the README, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    return names


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(README.read_text().split(OWN)[0])
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    assert set(names["result"].layers.condition) == {
        "model",
        "random_adapter",
        "noise",
        "shuffled_images",
    }
    assert names["again"].layers.equals(names["result"].layers)
    assert len(names["model"].saes) == 8


def test_the_recipes_for_real_models_run(tmp_path, monkeypatch, recwarn):
    """With tiny models where the recipes name large ones of the hub."""
    hub.write_language(tmp_path / "gemma-2-2b-it", "gemma2")
    hub.write_language(tmp_path / "gpt2", "gpt2")
    hub.write_vision(tmp_path / "vision")
    for layer in range(3):
        made = formats.weights(layer, d_model=32)
        folder = tmp_path / "scope" / f"layer_{layer}" / "width_16k" / "average_l0_71"
        formats.write_gemma_scope(folder, made)
        hook = f"blocks.{layer}.hook_resid_pre"
        processed = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
        formats.write_saelens(
            tmp_path / "jb" / hook, made, hook_name=hook, metadata=processed
        )
    hub.picture().save(tmp_path / "cat.png")
    LinearAdapter(24, 32).save(tmp_path / "adapter.safetensors")
    torch.save(torch.nn.Linear(24, 32).state_dict(), tmp_path / "projector.pth")
    stored = {
        "google/gemma-2-2b-it": tmp_path / "gemma-2-2b-it",
        "gpt2": tmp_path / "gpt2",
        "ViT-L-14-quickgelu:openai": tmp_path / "vision",
        "gemma-scope-2b-pt-res-canonical": tmp_path / "scope",
        "gpt2-small-res-jb": tmp_path / "jb",
    }

    def locally(load):
        def loaded(source, **options):
            options.pop("width", None)  # these have 32 features, and not 16k
            return load(stored[source], **options)

        return loaded

    monkeypatch.setattr(LanguageModel, "load", locally(LanguageModel.load))
    monkeypatch.setattr(VisionModel, "load", locally(VisionModel.load))
    monkeypatch.setattr(loading, "load_saes", locally(loading.load_saes))
    monkeypatch.chdir(tmp_path)
    names = run(README.read_text().split(OWN)[1])
    assert names["model"].hook_point == "resid_pre"
    assert names["model"].language.processing == {"center_writing_weights": True}
    assert sorted(names["result"].layers.layer.unique()) == [0, 1, 2]


def test_its_pictures_are_there():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()):
        assert (README.parent / path).is_file(), path


def test_its_table_of_answers_is_what_was_measured():
    text = README.read_text()
    head = re.search(r"\| \| (all .*) \|\n", text)[1].split(" | ")
    stated = json.loads((data_folder() / "toy" / "figures.json").read_text())
    for name, column in (
        ("true picture", "true_image"),
        ("another picture", "shuffled_image"),
        ("no picture", "no_image"),
    ):
        cells = re.search(rf"\| {name} \| (.*) \|\n", text)[1].split(" | ")
        found = [f"{stated['adapter']['answers'][kind][column]:.2f}" for kind in head]
        assert cells == found
