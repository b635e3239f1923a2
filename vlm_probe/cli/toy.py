"""Commands around the embedded toy model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_probe.cli.app import app
from vlm_probe.training.settings import AdapterTraining, Stage

if TYPE_CHECKING:
    from vlm_probe.adapter import Adapter
    from vlm_probe.model import FrozenParts


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
    stages: tuple[str, ...] = ("language", "vision", "saes", "labels", "adapter"),
    out: Path = Path("data/toy"),
    seed: int = 0,
) -> None:
    """Train the toy model again, and print what each part reaches on held-out data.

    Args:
        stages: Which parts, in this order: language, vision, saes, labels, adapter.
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


_RECIPE = {"captions": 250, "answers": 800}
"""Steps of the two stages in which the toy's adapter is trained."""
_STAGE = Stage(batch_size=24, learning_rate=3e-3)


def _toy_adapter(stage: str, folder: Path, *, seed: int) -> dict:
    """Trains the toy's adapter through its frozen parts, and lets it answer."""
    from vlm_probe.toy.examples import toy_examples
    from vlm_probe.training.evaluate import evaluate_adapter

    run = folder / "training"
    frozen, trained = trained_toy(folder, run, _RECIPE, AdapterTraining(seed=seed))
    trained.save(folder / f"{stage}.safetensors")
    found = evaluate_adapter(
        frozen.vision, trained, frozen.language, toy_examples(2016)
    )
    shutil.rmtree(run)
    captions = found.summary().set_index("arm").caption_cross_entropy
    return {
        "answers": found.by_kind().round(3).to_dict("index"),
        "caption_cross_entropy": captions.round(4).to_dict(),
    }


def trained_toy(
    folder: Path, run: Path, steps: Mapping[str, int], settings: AdapterTraining
) -> tuple[FrozenParts, Adapter]:
    """An adapter trained between the toy's frozen parts; goes on where it was."""
    from vlm_probe.adapter import load_adapter
    from vlm_probe.model import load_frozen
    from vlm_probe.toy.examples import TrainingExamples
    from vlm_probe.training.adapter import train_adapter

    frozen = load_frozen(folder)
    if (finished := run / "adapter.safetensors").is_file():
        return frozen, load_adapter(finished)
    trained = train_adapter(
        frozen.vision,
        frozen.language,
        [
            (TrainingExamples(stage, n * _STAGE.batch_size, seed=settings.seed), _STAGE)
            for stage, n in steps.items()
        ],
        settings,
        saes=frozen.saes if settings.sae_penalty else None,
        out=run,
        resume=any((run / "checkpoint").glob("*.safetensors")),
    )
    if trained.partial:
        raise KeyboardInterrupt
    return frozen, trained.adapter
