"""The command line does what the functions do."""

import sys

import pytest

from vlm_probe.cli import main
from vlm_probe.result import ProbeResult
from vlm_probe.toy.examples import toy_examples


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["vlm-probe", *map(str, words)])
    main()


def test_demo_prints_the_table_and_writes_the_report(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "demo", "--n", 9, "--layers", 0, 7, "--out", tmp_path / "d")
    printed = capsys.readouterr().out
    for word in ("mse", "fvu", "cosine", "l0", "text_only", "shuffled_images"):
        assert word in printed
    assert "report.html" in printed
    assert (tmp_path / "d" / "report.html").is_file()
    result = ProbeResult.load(tmp_path / "d")
    assert result.meta["n_images"] == 9
    assert result.layers.layer.unique().tolist() == [0, 7]


def test_probe_takes_files(monkeypatch, tmp_path, capsys):
    files = []
    for example in toy_examples(2):
        files.append(tmp_path / f"{example.id}.png")
        example.image.save(files[-1])
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    out = tmp_path / "out"
    run(monkeypatch, "probe", *files, bad, "--out", out, "--layers", 3)
    assert "not read: bad.png" in capsys.readouterr().err
    result = ProbeResult.load(out)
    assert result.meta["n_images"] == 2
    assert result.meta["text_only_words"]["reference texts"] == 2


def test_mistakes_end_with_a_sentence(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="unknown group 'text'; valid: image"):
        run(monkeypatch, "demo", "--groups", "text", "--out", tmp_path)
    with pytest.raises(SystemExit, match=r"no model in .*nowhere"):
        run(monkeypatch, "probe", "x.png", "--model", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="unknown stage 'lunch'; valid: language"):
        run(monkeypatch, "toy", "--stages", "lunch", "--out", tmp_path)
