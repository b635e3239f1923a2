"""Adapters are trained and evaluated from the command line."""

import pandas as pd
import pytest

from vlm_probe.adapter import load_adapter
from vlm_probe.cli import main, markdown
from vlm_probe.cli.training import CAPTIONS, INSTRUCTIONS
from vlm_probe.cli.variants import by_layer
from vlm_probe.training.settings import PAPER


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `vlm-probe` and gives what it wrote."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["vlm-probe", *map(str, words)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Ten toy pictures in LLaVA's format."""
    from vlm_probe.examples import write_examples
    from vlm_probe.toy.examples import toy_examples

    folder = tmp_path_factory.mktemp("written")
    write_examples(toy_examples(10), folder / "examples.json")
    return folder / "examples.json"


@pytest.mark.filterwarnings("ignore:the adapter")  # is not worth much after three steps
def test_from_a_file_to_an_adapter(run, written, tmp_path):
    out = tmp_path / "run"
    words = ["train-adapter", "--model", "toy", "--out", out, "--calibration", 6]
    words += ["--captions.data", written, "--captions.steps", 1]
    words += ["--instructions.data", written, "--instructions.images", written.parent]
    words += ["--instructions.steps", 3, "--instructions.batch-size", 2]
    words += ["--kind", "mlp2x_gelu", "--inject-layer", 2, "--held-out", written]
    words += ["--vision-cache", tmp_path / "cache", "--penalty-layers", 2, 4]
    said = run(*words)
    assert f"adapter: {out / 'adapter.safetensors'}" in said
    assert "the shuffled image in answers (p = " in said
    adapter = load_adapter(out / "adapter.safetensors")
    assert (adapter.kind, adapter.inject_layer) == ("mlp2x_gelu", 2)
    curve = pd.read_csv(out / "metrics.csv")
    assert curve.stage.tolist() == [1, 2, 2, 2]
    assert curve.fvu.notna().all()
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 10
    with pytest.raises(
        SystemExit, match=r"there is a run in .* already; ask for resume"
    ):
        run(*words)
    assert "adapter.safetensors" in run(*words, "--resume")
    table = tmp_path / "said.csv"
    model = ["--model", "toy", "--adapter", out / "adapter.safetensors"]
    said = run("evaluate-adapter", written, *model, "--out", table)
    assert "no_image" in said
    assert len(pd.read_csv(table)) == 10


def test_what_is_missing_is_said(run, written):
    with pytest.raises(
        SystemExit, match=r"no data to learn from: give --captions\.data"
    ):
        run("train-adapter")
    with pytest.raises(
        SystemExit, match="but an adapter is to be trained; leave it out"
    ):
        run("train-adapter", "--adapter", "a.pth", "--captions.data", written)
    with pytest.raises(
        SystemExit, match="language not given; an adapter is trained be"
    ):
        run("train-adapter", "--vision", "eye/", "--captions.data", written)


def test_the_defaults_are_the_papers():
    assert CAPTIONS.stage() == PAPER["captions"]
    assert INSTRUCTIONS.stage() == PAPER["instructions"]


def test_variants_stand_beside_each_other_by_layer():
    rows = [
        ("linear", 0, "image", 0.5, 0.4, 0.6),
        ("linear", 0, "text_only", 0.125, 0.1, 0.15),
        ("linear", 1, "text_only", 0.25, 0.2, 0.3),
        ("linear", 1, "image", 0.75, 0.7, 0.8),
        ("enters at layer 3", 1, "image", 0.3, 0.2, 0.4),
    ]
    columns = ["adapter", "layer", "group", "fvu", "fvu_low", "fvu_high"]
    found = by_layer(pd.DataFrame(rows, columns=columns), "fvu")
    assert found["linear"].tolist() == ["0.5 (0.4-0.6)", "0.75 (0.7-0.8)"]
    assert found["enters at layer 3"].tolist() == ["", "0.3 (0.2-0.4)"]
    assert found["MLP"].tolist() == ["", ""]
    assert found["text"].tolist() == ["0.125 (0.1-0.15)", "0.25 (0.2-0.3)"]
    assert markdown.table(pd.DataFrame({"a": ["x"], "b": [0.25]})) == (
        "| a | b |\n| --- | --- |\n| x | 0.250 |"
    )
