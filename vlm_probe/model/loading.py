"""The parts of a model are loaded from where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_probe.adapter import Adapter, load_adapter
from vlm_probe.examples import data_folder
from vlm_probe.language import DEFAULT_PROMPT, LanguageModel
from vlm_probe.language.hooked import PROCESSING
from vlm_probe.model.joined import DESCRIPTION, TEXTS, VisionLanguageModel, lines
from vlm_probe.saes import LayerSae, load_saes, outlines
from vlm_probe.settings import PRESETS, Parts
from vlm_probe.vision import VisionModel
from vlm_probe.weights import read_json


def load(source: str | Path | None = None, **parts: object) -> VisionLanguageModel:
    """Loads a model.

    Three ways: `load("toy")`, a preset or a folder that `save` wrote; `load(language=,
    vision=, adapter=, saes=)`; or a preset or folder with some parts changed, as in
    `load("paper", adapter="projector.pth", dtype="bfloat16")`.

    Args:
        source: "toy" for the embedded model (also if nothing is given at all), the name
            of a preset (`vlm_probe.settings.PRESETS`), or a folder.
        **parts: Fields of `vlm_probe.settings.Parts`, where each is described.
            `language`, `vision`, `adapter` and `saes` may also be objects: a
            `LanguageModel` or a Hugging Face model with its folder, a `VisionModel`, an
            `Adapter`, a mapping from layers to `LayerSae`.

    Raises:
        FileNotFoundError: There is no such folder or file, or the hub gave nothing.
        TypeError: An unknown part.
        ValueError: A part is not said, cannot be read, or does not fit the others.
    """
    wanted, held, kept = _wanted(source, parts)
    if missing := [n for n in _FOUR if n not in held and getattr(wanted, n) is None]:
        raise ValueError(
            f"{' and '.join(missing)} not given; a model is made of "
            f"{', '.join(_FOUR)}, or load one of: toy, {', '.join(PRESETS)}, or a "
            "folder that save wrote"
        )
    adapter, frozen = _loaded(wanted, held, kept.get("texts", ()))
    model = VisionLanguageModel(
        vision=frozen.vision,
        adapter=adapter,
        language=frozen.language,
        saes=frozen.saes,
        name=wanted.name or frozen.language.name,
        reference_texts=frozen.reference_texts,
    )
    if "language" not in parts:
        # Not the name of the folder that it was saved to.
        model.language.name = kept.get("language_name", model.language.name)
    return model


@dataclass(frozen=True)
class FrozenParts:
    """What an adapter is trained between."""

    vision: VisionModel
    """From pictures to patch tokens."""
    language: LanguageModel
    """What reads the adapter's vectors."""
    saes: Mapping[int, LayerSae]
    """One SAE for each layer that has one; none if none were asked for."""
    reference_texts: tuple[str, ...] = ()
    """As of a `VisionLanguageModel`."""


def load_frozen(source: str | Path | None = None, **parts: object) -> FrozenParts:
    """Loads a model without its adapter, which is to be trained.

    Args:
        source: As of `load`.
        **parts: As of `load`; `saes` may be left out.

    Raises:
        FileNotFoundError: There is no such folder or file, or the hub gave nothing.
        TypeError: An unknown part.
        ValueError: A part is not said or cannot be read, or an adapter is given.
    """
    wanted, held, kept = _wanted(source, parts)
    if parts.get("adapter") is not None:
        raise ValueError(
            f"adapter {parts['adapter']} given, but an adapter is to be trained; leave "
            "it out"
        )
    needed = ("language", "vision")
    if missing := [n for n in needed if n not in held and getattr(wanted, n) is None]:
        raise ValueError(
            f"{' and '.join(missing)} not given; an adapter is trained between a "
            "vision and a language model"
        )
    _, frozen = _loaded(replace(wanted, adapter=None), held, kept.get("texts", ()))
    return frozen


def _wanted(
    source: str | Path | None, parts: Mapping[str, object]
) -> tuple[Parts, dict[str, Any], dict[str, Any]]:
    """Where parts come from, those that are objects, and what a folder says else."""
    valid = [field.name for field in fields(Parts)]
    if unknown := [name for name in parts if name not in valid]:
        raise TypeError(
            f"unknown part {', '.join(map(repr, unknown))}; valid: {', '.join(valid)}"
        )
    held = {
        name: part
        for name in _FOUR
        if not isinstance(part := parts.get(name), str | Path | None)
    }
    named = {name: part for name, part in parts.items() if name not in held}
    for name, options in _CONCERNS.items():
        said = [option for option in options if named.get(option) is not None]
        if said and isinstance(held.get(name), LanguageModel | VisionModel | Mapping):
            raise ValueError(
                f"{' and '.join(said)} given, but {name} is an object, which is taken "
                "as it is; give where it is loaded from, or make it so yourself"
            )
    if source is None and not parts:
        source = "toy"
    described, kept = (Parts(), {}) if source is None else _described(source)
    return replace(described, **named), held, kept


_FOUR = ("language", "vision", "adapter", "saes")
_CONCERNS = {
    "language": ("backend", "dtype", "default_prompt"),
    "vision": ("vision_block",),
    "saes": ("sae_layers", "sae_width", "sae_l0", "sae_residency", "hook_point"),
}
"""What is said of a part as it is loaded."""


def _described(source: str | Path) -> tuple[Parts, dict]:
    """What a preset or a folder says of its parts, and what else was kept."""
    if source in PRESETS:
        return PRESETS[str(source)], {}
    folder = data_folder() / "toy" if source == "toy" else Path(source)
    if not (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(
            f"no model in {folder}: expected a folder with {DESCRIPTION}, language/, "
            f'vision/, adapter.safetensors and saes/, or one of "toy", '
            + ", ".join(f'"{name}"' for name in PRESETS)
        )
    about = read_json(folder / DESCRIPTION)
    kept = (
        {"language_name": about.pop("language_name")}
        if "language_name" in about
        else {}
    )
    valid = {field.name for field in fields(Parts)}
    if unknown := sorted(set(about) - valid):
        raise ValueError(
            f"{folder / DESCRIPTION} says {', '.join(unknown)}, which is no part or "
            f"option of a model; valid: {', '.join(sorted(valid))}"
        )
    inside = {
        "language": folder / "language",
        "vision": folder / "vision",
        "adapter": folder / "adapter.safetensors",
        "saes": folder / "saes",
    }
    texts = folder / TEXTS
    if texts.is_file():
        kept["texts"] = lines(texts)
    return Parts(**inside | about), kept


def _loaded(
    wanted: Parts, held: Mapping[str, Any], texts: tuple[str, ...]
) -> tuple[Adapter | None, FrozenParts]:
    language = held.get("language", wanted.language)
    device = _device(wanted.device, held)
    # The small parts come first, so that what is wrong with them is said soon; and the
    # SAEs before the language model, whose weights are processed as theirs were.
    adapter = held.get("adapter")
    if adapter is None and wanted.adapter is not None:
        adapter = load_adapter(wanted.adapter, device=device)
    block = wanted.vision_block
    if block is None and adapter is not None:
        block = adapter.manifest.get("vision_block")
    vision = (
        held["vision"]
        if "vision" in held
        else VisionModel.load(wanted.vision, block=block, device=device)
    )
    saes = held.get("saes", {})
    if not saes and wanted.saes is not None:
        saes = load_saes(
            wanted.saes,
            layers=wanted.sae_layers,
            width=wanted.sae_width,
            l0=wanted.sae_l0,
            hook_point=wanted.hook_point,
            device=device,
            residency=wanted.sae_residency or "auto",
        )
    if not isinstance(language, LanguageModel):
        language = LanguageModel.load(
            language,
            backend=wanted.backend or "auto",
            processing=_processing(saes),
            device=device,
            dtype=wanted.dtype or "float32",
            default_prompt=wanted.default_prompt or DEFAULT_PROMPT,
        )
    return adapter, FrozenParts(vision, language, saes, texts)


def _device(asked: str | None, held: Mapping[str, object]) -> str:
    """The device asked for, else where a part in memory is, else a GPU if there is."""
    if asked is None:
        for part in held.values():
            first = next(iter(part.values())) if isinstance(part, Mapping) else part
            module = getattr(first, "visual", getattr(first, "sae", first))
            module = getattr(module, "hooked", module)
            if isinstance(module, nn.Module):
                return str(next(module.parameters()).device)
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:
        found = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
        raise ValueError(
            f"device {asked!r} is not to be had; this machine has "
            f"{', '.join(['cpu', *found])}"
        ) from error
    return asked


def _processing(saes: Mapping[int, LayerSae]) -> dict[str, bool]:
    """The weight processing that all the SAEs were trained on."""
    # Beside it, metadata may name a dtype or devices, which are ours to choose.
    asked = {
        layer: {name: True for name in PROCESSING if sae.processing.get(name)}
        for layer, sae in outlines(saes).items()
    }
    first = next(iter(asked), None)
    if differing := [layer for layer in asked if asked[layer] != asked[first]]:
        raise ValueError(
            f"the SAEs of layers {differing} were trained on weights processed as "
            f"{asked[differing[0]]}, that of layer {first} as {asked[first]}; take "
            "SAEs of one release"
        )
    return asked.get(first, {})
