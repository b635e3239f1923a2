"""The command line."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm_probe.settings import Parts, ProbeSettings
from vlm_probe.tokens import CONTROLS

if TYPE_CHECKING:
    from vlm_probe.model import VisionLanguageModel
    from vlm_probe.result import ProbeResult

Files = Annotated[tuple[Path, ...], tyro.conf.Positional]
Settings = Annotated[ProbeSettings, tyro.conf.arg(name="")]
Model = Annotated[Parts, tyro.conf.arg(name="")]

app = tyro.extras.SubcommandApp()


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
        images: Pictures, or one conversation file in LLaVA's format (.json).
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
    from vlm_probe.examples import read_examples
    from vlm_probe.probe import probe_layers
    from vlm_probe.probe.shards import joined

    conversations = len(images) == 1 and images[0].suffix == ".json"
    examples = read_examples(images[0]) if conversations else list(images)
    with joined() as shard:
        result = probe_layers(
            _load(model, parts),
            examples,
            settings,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            on_error=on_error,
        )
    if shard.rank == 0:
        _finish(result, out)
    if result.partial:
        sys.exit(_INTERRUPTED)


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

    findings = doctor(_load(model, parts), settings)
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


@app.command(name="toy-examples")
def toy_examples(
    *, n: int = 108, out: Path = Path("toy-examples"), seed: int = 0
) -> None:
    """Write held-out toy pictures and questions as a conversation file.

    Args:
        n: How many pictures.
        out: Folder for examples.json, in LLaVA's format, and images/.
        seed: Another seed gives other pictures.
    """
    from vlm_probe.examples import write_examples
    from vlm_probe.toy import examples

    write_examples(examples.toy_examples(n, seed=seed), out / "examples.json")
    print(f"{n} examples in {out / 'examples.json'}")


@app.command
def toy(
    *,
    stages: tuple[str, ...] = ("language", "vision", "saes", "adapter"),
    out: Path = Path("data/toy"),
    seed: int = 0,
) -> None:
    """Train the toy model again, and print what each part reaches on held-out data.

    Args:
        stages: Which parts, in this order: language, vision, saes, adapter.
        out: The toy's folder.
        seed: Of everything random.
    """
    from vlm_probe.toy.build import FROZEN, build_frozen, write_description

    valid = (*FROZEN, "adapter")
    if unknown := [stage for stage in stages if stage not in valid]:
        raise ValueError(f"unknown stage {unknown[0]!r}; valid: {', '.join(valid)}")
    out.mkdir(parents=True, exist_ok=True)
    write_description(out)
    record = out / "figures.json"
    figures = json.loads(record.read_text()) if record.is_file() else {}
    for stage in stages:
        build = _toy_adapter if stage == "adapter" else build_frozen
        figures[stage] = build(stage, out, seed=seed)
        print(f"{stage}: {json.dumps(figures[stage], indent=1)}", flush=True)
        record.write_text(json.dumps(figures, indent=1) + "\n")


def _toy_adapter(stage: str, folder: Path, *, seed: int) -> dict:
    """Trains the toy's adapter through its frozen parts, and lets it answer."""
    from vlm_probe.language import LanguageModel
    from vlm_probe.toy.examples import toy_examples, training_examples
    from vlm_probe.training.adapter import AdapterTraining, train_adapter
    from vlm_probe.training.evaluate import evaluate_adapter
    from vlm_probe.vision import VisionModel

    vision = VisionModel.load(folder / "vision")
    language = LanguageModel.load(folder / "language")
    recipe = AdapterTraining(steps=250, seed=seed)
    adapter = train_adapter(
        vision,
        language,
        [
            (training_examples("captions", seed=seed), recipe),
            (training_examples("answers", seed=seed), replace(recipe, steps=800)),
        ],
        manifest={"seed": seed},
    )
    adapter.save(folder / f"{stage}.safetensors")
    answers = evaluate_adapter(vision, adapter, language, toy_examples(2016))
    right = ["true_right", "shuffled_right"]
    by_kind = answers.groupby("kind")[right].mean()
    by_kind.loc["all"] = answers[right].mean()
    return by_kind.round(3).to_dict("index")


def _load(model: str | None, parts: Parts) -> VisionLanguageModel:
    from vlm_probe.model import load

    given = {f.name: getattr(parts, f.name) for f in fields(Parts)}
    return load(model, **{n: part for n, part in given.items() if part is not None})


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


_INTERRUPTED = 130
"""Exit status of what Ctrl-C ended: 128 and the signal's number."""


def main() -> None:
    """Runs `vlm-probe`."""
    try:
        app.cli(prog="vlm-probe", description="Where image tokens become language.")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"vlm-probe: {error}")
