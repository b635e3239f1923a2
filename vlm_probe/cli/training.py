"""Commands that train an adapter, and say what it is worth."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm_probe.cli.app import INTERRUPTED, Model, app, given, load_model
from vlm_probe.settings import Parts
from vlm_probe.training.settings import PAPER, AdapterTraining, Stage

if TYPE_CHECKING:
    from vlm_probe.training.evaluation import AdapterEvaluation

Training = Annotated[AdapterTraining, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Lessons(Stage):
    """A stage, and what it learns from."""

    data: Path | None = None
    """Conversations in LLaVA's format (.json, .jsonl), a folder of pictures with
    captions, or a folder that Hugging Face's datasets saved. Without it, the stage is
    left out."""
    images: Path | None = None
    """Folder that the conversations' image paths start from; the file's own if not
    given."""

    @classmethod
    def like(cls, stage: Stage) -> Lessons:
        """The stage's settings, and no data yet."""
        return cls(**{f.name: getattr(stage, f.name) for f in fields(Stage)})

    def stage(self) -> Stage:
        """The settings alone."""
        return Stage(**{f.name: getattr(self, f.name) for f in fields(Stage)})


_SHOWN = 20
"""Failures that are printed; the file has all."""
CAPTIONS = Lessons.like(PAPER["captions"])
INSTRUCTIONS = Lessons.like(PAPER["instructions"])


@app.command(name="train-adapter")
def train_adapter(
    captions: Lessons = CAPTIONS,
    instructions: Lessons = INSTRUCTIONS,
    training: Training = AdapterTraining(),  # noqa: B008 -- frozen
    parts: Model = Parts(),  # noqa: B008 -- frozen
    *,
    model: str | None = None,
    out: Path = Path("adapter"),
    resume: bool = False,
    held_out: Path | None = None,
    held_out_images: Path | None = None,
    checkpoint_every: float = 60.0,
    vision_cache: Path | None = None,
    on_error: Literal["record", "raise"] = "record",
    track: tuple[Literal["wandb", "tensorboard"], ...] = (),
) -> None:
    """Train an adapter between a frozen vision and a frozen language model.

    Two stages, captions and instructions, with the settings of arXiv 2506.11976 unless
    said otherwise. `accelerate launch -m vlm_probe train-adapter ...` shares the work
    among processes, GPUs and machines.

    Args:
        captions: First stage.
        instructions: Second stage.
        training: What is learned.
        parts: Of the model, without adapter; over what `model` says.
        model: "toy", the embedded model (if no part is given either), "paper", the
            setup of arXiv 2506.11976, or a folder that a model was saved to.
        out: Folder for adapter.safetensors, metrics.csv, failures.csv and the
            checkpoint.
        resume: Go on with the run that `out` holds.
        held_out: Conversations to evaluate the adapter on when it is trained.
        held_out_images: Folder that their image paths start from.
        checkpoint_every: How often the checkpoint is written, in seconds.
        vision_cache: Folder in which patch tokens are kept for later epochs and runs.
        on_error: What is done about an example that cannot be used: record lists it
            and goes on, raise stops.
        track: Where else to send the curve.
    """
    import torch
    from accelerate import PartialState

    from vlm_probe.examples import read_examples
    from vlm_probe.model import load_frozen
    from vlm_probe.training import adapter

    stages = [
        (read_examples(chosen.data, chosen.images), chosen.stage())
        for chosen in (captions, instructions)
        if chosen.data is not None
    ]
    if not stages:
        raise ValueError(
            "no data to learn from: give --captions.data, --instructions.data, or both "
            "(`vlm-probe toy-examples` writes some to try; `vlm-probe toy --stages "
            "adapter` trains the toy's own adapter)"
        )
    asked = bool(training.sae_penalty or training.penalty_layers)
    if not asked and parts.sae_residency is None:
        # They say how the language model's weights are processed, and no more.
        parts = replace(parts, sae_residency="streamed")
    if "LOCAL_RANK" in os.environ:
        # From here on "cuda" is the GPU of this process' number.
        PartialState(cpu=parts.device == "cpu" or not torch.cuda.is_available())
    frozen = load_frozen(model, **given(parts))
    trained = adapter.train_adapter(
        frozen.vision,
        frozen.language,
        stages,
        training,
        saes=frozen.saes if asked else None,
        reference_texts=frozen.reference_texts,
        out=out,
        resume=resume,
        checkpoint_every=checkpoint_every,
        vision_cache=vision_cache,
        on_error=on_error,
        track=track,
    )
    if int(os.environ.get("RANK", "0")):
        return  # the first process says it
    for failure in trained.failures.head(_SHOWN).itertuples():
        print(f"not learned from: {failure.id}: {failure.error}", file=sys.stderr)
    if (more := len(trained.failures) - _SHOWN) > 0:
        print(f"and {more} more: {out / 'failures.csv'}", file=sys.stderr)
    if trained.partial:
        print(
            f"A PARTIAL ADAPTER, adapter.partial.safetensors: {trained.partial}; "
            "--resume goes on"
        )
        sys.exit(INTERRUPTED)
    print(f"adapter: {out / 'adapter.safetensors'}, curve: {out / 'metrics.csv'}")
    if held_out is not None:
        from vlm_probe.training.evaluate import evaluate_adapter

        _say(
            evaluate_adapter(
                frozen.vision,
                trained.adapter,
                frozen.language,
                read_examples(held_out, held_out_images),
            )
        )


@app.command(name="evaluate-adapter")
def evaluate(
    data: Annotated[Path, tyro.conf.Positional],
    parts: Model = Parts(),  # noqa: B008 -- frozen
    *,
    model: str | None = None,
    images: Path | None = None,
    batch_size: int = 32,
    out: Path | None = None,
) -> None:
    """Let a model answer held-out questions with the true, another, and no picture.

    Args:
        data: Conversations in LLaVA's format, or a folder of pictures with captions.
        parts: Of the model; over what `model` says.
        model: "toy", the embedded model (if no part is given either), "paper", the
            setup of arXiv 2506.11976, or a folder that a model was saved to.
        images: Folder that image paths start from.
        batch_size: Pictures at a time.
        out: CSV file for what was said to each example.
    """
    from vlm_probe.examples import read_examples
    from vlm_probe.training.evaluate import evaluate_adapter

    loaded = load_model(model, parts)
    found = evaluate_adapter(
        loaded.vision,
        loaded.adapter,
        loaded.language,
        read_examples(data, images),
        batch_size=batch_size,
    )
    _say(found)
    if out is not None:
        found.examples.to_csv(out, index=False)


def _say(found: AdapterEvaluation) -> None:
    print(found.summary().to_string(index=False, float_format="%.3f", na_rep=""))
    print(found.verdict)
    for failure in found.failures.itertuples():
        print(f"not read: {failure.id}: {failure.error}", file=sys.stderr)
