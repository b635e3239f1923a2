"""The command line does what the functions do."""

import signal
import sys

import pytest

from vlm_probe.cli import main
from vlm_probe.probe.run import Run
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


def test_a_run_is_kept_and_gone_on_with(monkeypatch, tmp_path, capsys):
    files = []
    for example in toy_examples(3):
        files.append(tmp_path / f"{example.id}.png")
        example.image.save(files[-1])
    words = ["probe", *files, "--layers", 7, "--batch-size", 1]
    words += ["--checkpoint", tmp_path / "kept", "--checkpoint-every", 0]
    taken = iter([False, True])
    with monkeypatch.context() as patch:
        # Someone presses Ctrl-C as the second picture is looked at.
        add = Run.add
        patch.setattr(
            Run,
            "add",
            lambda *given: (
                next(taken) and signal.raise_signal(signal.SIGINT),
                add(*given),
            ),
        )
        with (
            pytest.warns(UserWarning, match="stopped after 2 of 3 images"),
            pytest.raises(SystemExit) as ended,
        ):
            run(monkeypatch, *words, "--out", tmp_path / "part")
    assert ended.value.code == 130
    assert "A PARTIAL RESULT: stopped after 2 of 3" in capsys.readouterr().out
    page = (tmp_path / "part" / "report.html").read_text()
    assert "A partial result: stopped after 2 of 3 images." in page
    assert ProbeResult.load(tmp_path / "part").partial
    run(monkeypatch, *words, "--out", tmp_path / "whole")
    whole = ProbeResult.load(tmp_path / "whole")
    assert whole.meta["n_images"] == 3
    assert "A partial result" not in (tmp_path / "whole" / "report.html").read_text()


def test_the_first_broken_picture_can_stop_the_run(monkeypatch, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(SystemExit, match=r"image 0, 'bad.png': .*cannot identify"):
        run(monkeypatch, "probe", tmp_path / "bad.png", "--on-error", "raise")


def test_mistakes_end_with_a_sentence(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="unknown group 'text'; valid: image"):
        run(monkeypatch, "demo", "--groups", "text", "--out", tmp_path)
    with pytest.raises(SystemExit, match=r"no model in .*nowhere"):
        run(monkeypatch, "probe", "x.png", "--model", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="unknown stage 'lunch'; valid: language"):
        run(monkeypatch, "toy", "--stages", "lunch", "--out", tmp_path)
