"""Commands that probe a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlm_probe.cli.app import (
    INTERRUPTED,
    Files,
    Model,
    Settings,
    app,
    examples_of,
    load_model,
)
from vlm_probe.settings import Parts, ProbeSettings
from vlm_probe.tokens import CONTROLS

if TYPE_CHECKING:
    from vlm_probe.result import ProbeResult


@app.command
def probe(
    images: Files,
    settings: Settings = ProbeSettings(),  # noqa: B008 -- frozen
    parts: Model = Parts(),  # noqa: B008 -- frozen
    *,
    model: str | None = None,
    out: Path = Path("probe"),
    checkpoint: Path | None = None,
    checkpoint_every: float = 60.0,
    on_error: Literal["record", "raise"] = "record",
) -> None:
    """Probe pictures, layer by layer.

    `torchrun --nproc-per-node N -m vlm_probe probe ...` shares them among processes.

    Args:
        images: Pictures, or one conversation file in LLaVA's format (.json, .jsonl), or
            one folder of pictures with captions.
        settings: What is asked.
        parts: Of the model; over what `model` says.
        model: "toy", the embedded model (if no part is given either), "paper", the
            setup of arXiv 2506.11976, or a folder that a model was saved to.
        out: Folder for the tables and report.html.
        checkpoint: Folder in which the run is kept; begun again, it goes on from there.
        checkpoint_every: How often it is written, in seconds.
        on_error: What is done about a picture that cannot be used: record lists it and
            goes on, raise stops.
    """
    from vlm_probe.probe import probe_layers
    from vlm_probe.probe.shards import joined

    with joined() as shard:
        result = probe_layers(
            load_model(model, parts),
            examples_of(images),
            settings,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            on_error=on_error,
        )
    if shard.rank == 0:
        _finish(result, out)
    if result.partial:
        sys.exit(INTERRUPTED)


@app.command
def doctor(
    settings: Settings = ProbeSettings(),  # noqa: B008 -- frozen
    parts: Model = Parts(),  # noqa: B008 -- frozen
    *,
    model: str | None = None,
) -> None:
    """Examine whether the parts of a model belong together; fails if one does not.

    Args:
        settings: Of the probe that is planned, for the estimate of its memory.
        parts: Of the model; over what `model` says.
        model: "toy", the embedded model (if no part is given either), "paper", the
            setup of arXiv 2506.11976, or a folder that a model was saved to.
    """
    from vlm_probe.checkup import doctor

    findings = doctor(load_model(model, parts), settings)
    if wrong := [f.check for f in findings if f.verdict == "wrong"]:
        sys.exit(f"vlm-probe: wrong: {', '.join(wrong)}")


@app.command
def demo(
    settings: Settings = ProbeSettings(controls=CONTROLS),  # noqa: B008 -- frozen
    *,
    n: int = 108,
    out: Path = Path("demo"),
    figure: Path | None = None,
) -> None:
    """Probe held-out pictures of the embedded toy model, control arms beside it.

    Args:
        settings: What is asked.
        n: How many pictures.
        out: Folder for the tables and report.html.
        figure: Also write the curves there, as PNG, SVG or PDF; needs the extra
            "plot" and a Chrome or Chromium.
    """
    from vlm_probe.model import load
    from vlm_probe.probe import probe_layers
    from vlm_probe.toy.examples import toy_examples

    result = probe_layers(load("toy"), toy_examples(n), settings)
    _finish(result, out)
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
        result.plot().write_image(figure, width=1200, height=520, scale=2)


def _finish(result: ProbeResult, out: Path) -> None:
    """Prints the layer table, and saves everything."""
    if result.partial:
        print(f"A PARTIAL RESULT: {result.meta['partial']}\n")
    print(result.table().to_string(index=False, float_format="%.4f"))
    if result.layers.condition.nunique() > 1:
        print("\nThe model beside its control arms:")
        print(result.beside().to_string(float_format="%.3f", na_rep=""))
    for failure in result.failures.itertuples():
        print(f"not read: {failure.id}: {failure.error}", file=sys.stderr)
    result.save(out)
    print(f"\ntables in {out}, report: {result.report(out / 'report.html')}")
