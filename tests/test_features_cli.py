"""What `vlm-probe features`, `match` and `shared` say of a saved run."""

import json
import sys
import warnings

import pandas as pd
import pytest
from neuronpedia import line, write_batch
from tiny import tiny_model

from vlm_probe.adapter import LinearAdapter
from vlm_probe.analysis.descriptions import DescriptionTable
from vlm_probe.analysis.judges import TruthJudge
from vlm_probe.analysis.match import MatchResult, match_rate
from vlm_probe.analysis.places import patch_maps
from vlm_probe.cli import main
from vlm_probe.cli.printing import printable
from vlm_probe.model import VisionLanguageModel
from vlm_probe.probe import probe_layers
from vlm_probe.result import ProbeResult
from vlm_probe.toy.labels import toy_labels
from vlm_probe.toy.truth import describes


@pytest.fixture(scope="module")
def result(toy, examples):
    return probe_layers(
        toy,
        examples[:8],
        layers=[0, 2],
        top_k=16,
        replicates=0,
        progress=False,
    )


@pytest.fixture
def saved(result, tmp_path):
    return result.save(tmp_path / "run")


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["vlm-probe", *map(str, words)])
    main()


def refused(monkeypatch, *words):
    """What a command that fails says."""
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *words)
    return str(stopped.value)


def older(saved, **changes):
    """A run whose meta is another; None leaves a part out."""
    file = saved / "meta.json"
    meta = json.loads(file.read_text()) | changes
    told = {name: part for name, part in meta.items() if part is not None}
    file.write_text(json.dumps(told))
    return saved


def test_a_run_says_which_saes_it_had(result):
    told = {
        "hook_point": "resid_post",
        "n_features": 1024,
        "model_name": "toy",
        "neuronpedia_id": None,
    }
    assert result.meta["saes"] == {"0": told, "2": told}


def test_features_are_printed_with_places_and_labels(
    monkeypatch, saved, result, tmp_path, capsys
):
    out = tmp_path / "out" / "features.csv"
    words = ["features", saved, "--layer", 2, "--image", "toy-0-3", "--out", out]
    run(monkeypatch, *words)
    printed = capsys.readouterr().out
    table = pd.read_csv(out)
    assert set(table["layer"]) == {2}
    assert set(table["id"]) == {"toy-0-3"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = result.best_features(layer=2, image="toy-0-3")
    assert table["feature"].tolist() == chosen["feature"].tolist()
    labels = toy_labels()[2].concepts()
    for row in table.itertuples():
        said = labels.get(row.feature)
        assert row.description == said if said else pd.isna(row.description)
        assert str(row.feature) in printed
        if row.group == "image":
            assert f"patch {row.patch_row:.0f},{row.patch_column:.0f}: x " in printed
            # The toy's pictures are as large as its input: a patch has 8 pixels.
            assert (row.left, row.top) == (8 * row.patch_column, 8 * row.patch_row)
        else:
            assert f"{row.token!r} at {row.position}" in printed
    named = table["description"].notna().sum()
    assert f"{named} of {len(table)} described by: toy labels" in printed


def test_an_image_is_named_by_its_place_too(monkeypatch, saved, capsys):
    run(monkeypatch, "features", saved, "--image", 3, "--k", 1)
    printed = capsys.readouterr().out
    assert "toy-0-3" in printed
    assert "toy-0-4" not in printed
    words = "no top features of id 'cat' in this result; it has toy-0-0, toy-0-1"
    assert words in refused(monkeypatch, "features", saved, "--image", "cat")


def test_many_rows_are_cut_and_said_to_be(monkeypatch, saved, capsys):
    run(monkeypatch, "features", saved, "--rows", 5)
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 + 5 + 2
    assert "more rows: choose with --layer" in said.out
    # Warnings are for a person here.
    assert "UserWarning" not in said.err


def test_a_table_of_the_user_goes_without_control_characters(
    monkeypatch, saved, tmp_path, capsys
):
    result = ProbeResult.load(saved)
    feature = int(result.top_features["feature"].iloc[0])
    told = "<b>red\x1b[31m\n\u202ething</b>"
    file = tmp_path / "told.json"
    file.write_text(json.dumps([{"layer": 0, "feature": feature, "description": told}]))
    run(monkeypatch, "features", saved, "--descriptions", file, "--rows", 999)
    printed = capsys.readouterr().out
    assert not {"\x1b", "\u202e"} & set(printed)
    assert "described by: told.json" in printed


def test_printable():
    assert printable("a\tb\n c") == "a b c"
    assert printable("<i>rot\x1b[2J</i> 猫 é") == "<i>rot\ufffd[2J</i> 猫 é"
    assert printable("\u202egnp.exe\u200b\x7f\x9b") == "\ufffdgnp.exe\ufffd\ufffd\ufffd"


def test_match_is_what_the_functions_say(
    monkeypatch, saved, result, examples, tmp_path, capsys
):
    out = tmp_path / "matched"
    run(monkeypatch, "match", saved, "--layer", 2, "--out", out)
    said = capsys.readouterr()
    found = MatchResult.load(out)
    told = DescriptionTable({n: of.concepts() for n, of in toy_labels().items()})
    judge = TruthJudge(describes, name="the toy world's truth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = result.best_features(layer=2)
        again = result.match(examples[:8], told, judge, layer=2)
    plain = match_rate(chosen, told, judge, examples[:8])
    pd.testing.assert_frame_equal(found.rates, plain.rates)
    pd.testing.assert_frame_equal(found.rates, again.rates)
    row = found.rates[found.rates.group == "image"].iloc[0]
    assert row.n_features > 0
    assert f"{row.n_features}/{row.n_features + row.n_undescribed}" in said.out
    for words in ("rate chance", "any p", "Judge: the toy world's truth", str(out)):
        assert words in said.out


def test_shared_prints_overlaps(monkeypatch, saved, result, tmp_path, capsys):
    run(monkeypatch, "shared", saved, "--out", tmp_path / "a" / "shared.csv")
    printed = capsys.readouterr().out
    found = result.shared_features()
    for row in found.itertuples():
        assert f"{row.overlap:.3g} ({row.overlap_low:.3g}-" in printed
    table = pd.read_csv(tmp_path / "a" / "shared.csv")
    pd.testing.assert_frame_equal(table, found, check_dtype=False)


def test_an_export_of_another_sae_is_refused_without_the_model(
    monkeypatch, saved, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_batch(tmp_path / "export", 0, [line(1, "cats")])
    said = refused(
        monkeypatch, "features", saved, "--descriptions", tmp_path / "export"
    )
    assert "gemma-2-2b" in said
    said = refused(monkeypatch, "match", saved, "--descriptions", "neuronpedia")
    assert "none of the SAEs says its Neuronpedia id" in said


def test_runs_of_other_models_and_older_runs(monkeypatch, saved, tmp_path, capsys):
    older(saved, saes=None)
    words = "this run does not say which SAEs it had (it was saved by an older version)"
    assert words in refused(
        monkeypatch, "features", saved, "--descriptions", "neuronpedia"
    )
    # A table can be read without.
    (tmp_path / "t.csv").write_text("layer,feature,description\n2,1,a cat\n")
    run(monkeypatch, "features", saved, "--descriptions", tmp_path / "t.csv")
    assert "described by: t.csv" in capsys.readouterr().out
    parts = json.loads((saved / "meta.json").read_text())["parts"]
    parts["sae of layer 2"]["sha256"] = "0" * 64
    older(saved, parts=parts)
    run(monkeypatch, "features", saved, "--layer", 2)
    assert "described by" not in capsys.readouterr().out
    assert "the model of" in refused(monkeypatch, "match", saved)
    words = "this run is not of the embedded toy model as it is now"
    assert words in refused(monkeypatch, "match", saved, "--descriptions", "toy")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--judge", "endpoint"], "'endpoint' needs --judge-model and --base-url"),
        (["--judge", "embedding"], "'embedding' needs --judge-model; see"),
        (["--base-url", "http://h/v1"], "'truth' does not take --base-url"),
        (
            ["--judge", "embedding", "--judge-model", "m", "--price", "1", "2"],
            "'embedding' does not take --price",
        ),
    ],
)
def test_a_judge_gets_what_it_needs(monkeypatch, saved, words, said):
    assert said in refused(monkeypatch, "match", saved, *words)


def test_what_asking_takes_is_said_without_asking(monkeypatch, saved, capsys):
    words = ["--judge", "endpoint", "--judge-model", "eyes"]
    words += ["--base-url", "http://127.0.0.1:9/v1", "--price", "1.0", "4.0"]
    run(monkeypatch, "match", saved, *words, "--layer", 2, "--dry-run")
    printed = capsys.readouterr().out
    assert "requests with" in printed
    assert "cost: about 0.0" in printed


def test_pictures_of_other_worlds_must_be_given(monkeypatch, saved):
    result = ProbeResult.load(saved)
    top = result.top_features.assign(id="cat.png")
    top.to_parquet(saved / "top_features.parquet", index=False)
    said = refused(monkeypatch, "match", saved)
    assert "'cat.png' is no id of a toy picture" in said
    assert "given with --examples" in said


def later(layer):
    """The tiny model with vectors that enter at a layer."""
    model = tiny_model()
    made = LinearAdapter(24, 16, manifest={"inject_layer": layer})
    made.load_state_dict(model.adapter.state_dict())
    return VisionLanguageModel(
        vision=model.vision,
        adapter=made.requires_grad_(False),
        language=model.language,
        saes=model.saes,
        reference_texts=model.reference_texts,
    )


def test_vectors_that_are_not_there_yet_are_no_reference(examples):
    def probed(model):
        return probe_layers(
            model,
            examples[:2],
            groups=["image", "text_only"],
            rank_by=["selectivity"],
            replicates=0,
            progress=False,
        )

    result = probed(later(1))
    rates = result.features[["layer", "feature", "reference_rate"]].drop_duplicates()
    plain = probed(later(0))
    first = plain.features[["layer", "feature", "reference_rate"]].drop_duplicates()
    # Before the vectors, texts alone: rates are whole numbers of text tokens.
    n_text = result.meta["reference"]["text_tokens"]
    early = rates[rates.layer == 0].reference_rate * n_text
    assert (early - early.round()).abs().max() < 1e-9
    assert (early > 0).any()
    whole = first[first.layer == 0].reference_rate * n_text
    assert (whole - whole.round()).abs().max() > 1e-3
    assert result.meta["reference"]["image_tokens"] == 2 * 16


def test_maps_are_of_vectors_where_they_enter(examples):
    model = later(1)
    result = probe_layers(
        model, examples[:2], groups=["image"], replicates=0, progress=False
    )
    top = result.top_features[result.top_features["rank"] == 1]
    row = top[(top.layer == 1) & (top.image == 1)].iloc[0]
    maps = patch_maps(model, examples[:2], {1: [int(row.feature)]})
    found = maps.of(1, int(row.feature))[1]
    assert found.max() == pytest.approx(row.value, rel=1e-4)
    assert found[row.patch_row, row.patch_column] == found.max()
    with pytest.raises(ValueError, match="layer 0 comes before block 1, where the ad"):
        patch_maps(model, examples[:2], {0: [1]})
