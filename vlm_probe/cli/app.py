"""What all commands share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm_probe.settings import Parts, ProbeSettings

if TYPE_CHECKING:
    from vlm_probe.model import VisionLanguageModel

Files = Annotated[tuple[Path, ...], tyro.conf.Positional]
Settings = Annotated[ProbeSettings, tyro.conf.arg(name="")]
Model = Annotated[Parts, tyro.conf.arg(name="")]

app = tyro.extras.SubcommandApp()

INTERRUPTED = 130
"""Exit status of what Ctrl-C ended: 128 and the signal's number."""


def given(parts: Parts) -> dict[str, object]:
    """The parts that were said."""
    said = {f.name: getattr(parts, f.name) for f in fields(Parts)}
    return {name: part for name, part in said.items() if part is not None}


def load_model(model: str | None, parts: Parts) -> VisionLanguageModel:
    """The model that was asked for."""
    from vlm_probe.model import load

    return load(model, **given(parts))


def examples_of(files: Sequence[Path]) -> Iterable:
    """Pictures, or the examples of one conversation file or folder with captions."""
    from vlm_probe.examples import read_examples

    told = len(files) == 1 and (
        files[0].suffix in (".json", ".jsonl") or files[0].is_dir()
    )
    return read_examples(files[0]) if told else list(files)
