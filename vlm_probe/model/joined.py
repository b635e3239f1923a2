"""The four frozen parts are loaded from where they are, and joined if they fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from vlm_probe.adapter import Adapter, load_adapter
from vlm_probe.examples import data_folder
from vlm_probe.language import DEFAULT_PROMPT, LanguageModel
from vlm_probe.language.hooked import PROCESSING
from vlm_probe.model.identity import digest
from vlm_probe.saes import LayerSae, load_saes, outlines
from vlm_probe.settings import PRESETS, Parts
from vlm_probe.vision import VisionModel
from vlm_probe.weights import read_json


@dataclass(frozen=True)
class VisionLanguageModel:
    """A frozen vision model, adapter and language model, and the SAEs of its layers."""

    vision: VisionModel
    """From pictures to patch tokens."""
    adapter: Adapter
    """From patch tokens to input vectors of the language model."""
    language: LanguageModel
    """What reads them."""
    saes: Mapping[int, LayerSae]
    """One SAE for each layer that is to be probed."""
    name: str = "model"
    """For tables."""
    reference_texts: tuple[str, ...] = ()
    """What stands in the picture's place in `text_only` for examples without caption;
    the embedded texts of everyday English if none are given."""

    def __post_init__(self) -> None:
        if self.adapter.d_vision != self.vision.d_vision:
            raise ValueError(
                f"the adapter takes patch tokens of width {self.adapter.d_vision}, the "
                f"vision model {self.vision.name!r} gives {self.vision.d_vision}; use "
                "the vision model (and block) that the adapter was trained with"
            )
        if self.adapter.d_model != self.language.d_model:
            raise ValueError(
                f"the adapter gives vectors of width {self.adapter.d_model}, the "
                f"language model {self.language.name!r} takes {self.language.d_model}; "
                "use the language model that the adapter was trained with"
            )
        if not 0 <= self.adapter.inject_layer < self.language.n_layers:
            raise ValueError(
                "the adapter's vectors enter before block "
                f"{self.adapter.inject_layer}; "
                f"the language model {self.language.name!r} has blocks 0 to "
                f"{self.language.n_layers - 1}; use the one it was trained with"
            )
        if not self.saes:
            raise ValueError("no SAE given; at least one layer needs one")
        for layer, sae in outlines(self.saes).items():
            if sae.hook_point != self.hook_point:
                raise ValueError(
                    f"SAE {sae.name!r} is for {sae.hook_point}, others for "
                    f"{self.hook_point}; probe one hook point at a time"
                )
            if layer != sae.layer:
                raise ValueError(f"SAE {sae.name!r} of layer {sae.layer} under {layer}")
            if not 0 <= layer < self.language.n_layers:
                raise ValueError(
                    f"SAE {sae.name!r} is for layer {layer}; the language model has "
                    f"layers 0 to {self.language.n_layers - 1}"
                )
            if sae.d_model != self.language.d_model:
                raise ValueError(
                    f"SAE {sae.name!r} codes activations of width {sae.d_model}, the "
                    f"language model's are {self.language.d_model}; use SAEs trained "
                    "on this language model"
                )
        if not self.reference_texts:
            texts = _lines(data_folder() / "reference_texts.txt")
            object.__setattr__(self, "reference_texts", texts)

    @property
    def hook_point(self) -> str:
        """Where in its blocks the residual stream is read, the same for all SAEs."""
        return next(iter(outlines(self.saes).values())).hook_point

    def save(self, folder: str | Path) -> Path:
        """Writes all parts to a folder that `load` reads, with their weights.

        Raises:
            FileExistsError: There is a model in the folder already.
        """
        folder = Path(folder)
        if (folder / _DESCRIPTION).exists():
            raise FileExistsError(
                f"there is a model in {folder} already; give another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.language.save(folder / "language")
        self.vision.save(folder / "vision")
        self.adapter.save(folder / "adapter.safetensors")
        for layer in self.saes:
            self.saes[layer].save(folder / "saes" / f"layer_{layer}")
        (folder / _TEXTS).write_text("\n".join(self.reference_texts) + "\n")
        about = {
            "name": self.name,
            "language_name": self.language.name,
            "vision_block": self.vision.block,
            "default_prompt": self.language.chat.default_prompt,
            "backend": self.language.backend,
            "dtype": str(self.language.dtype).removeprefix("torch."),
        }
        # Last, so that a folder with a description is whole.
        (folder / _DESCRIPTION).write_text(json.dumps(about, indent=1) + "\n")
        return folder

    def identities(self) -> dict[str, dict[str, str]]:
        """Name and SHA-256 of the weights of each part; hashed anew if changed."""
        found = {
            "vision": (self.vision.name, digest(self.vision.visual)),
            "adapter": ("adapter", digest(self.adapter)),
            "language": (self.language.name, digest(self.language.hooked)),
        }
        for layer, sae in sorted(outlines(self.saes).items()):
            hashed = digest(sae.sae, lambda layer=layer: self.saes[layer].sae)
            found[f"sae of layer {layer}"] = sae.name, hashed
        return {
            part: {"name": name, "sha256": hashed}
            for part, (name, hashed) in found.items()
        }


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
    wanted = replace(described, **named)
    if missing := [n for n in _FOUR if n not in held and getattr(wanted, n) is None]:
        raise ValueError(
            f"{' and '.join(missing)} not given; a model is made of "
            f"{', '.join(_FOUR)}, or load one of: toy, {', '.join(PRESETS)}, or a "
            "folder that save wrote"
        )
    model = _joined(wanted, held, kept.get("texts", ()))
    if "language" not in parts:
        # Not the name of the folder that it was saved to.
        model.language.name = kept.get("language_name", model.language.name)
    return model


_FOUR = ("language", "vision", "adapter", "saes")
_CONCERNS = {
    "language": ("backend", "dtype", "default_prompt"),
    "vision": ("vision_block",),
    "saes": ("sae_layers", "sae_width", "sae_l0", "sae_residency", "hook_point"),
}
"""What is said of a part as it is loaded."""
_DESCRIPTION, _TEXTS = "model.json", "reference_texts.txt"


def _described(source: str | Path) -> tuple[Parts, dict]:
    """What a preset or a folder says of its parts, and what else was kept."""
    if source in PRESETS:
        return PRESETS[str(source)], {}
    folder = data_folder() / "toy" if source == "toy" else Path(source)
    if not (folder / _DESCRIPTION).is_file():
        raise FileNotFoundError(
            f"no model in {folder}: expected a folder with {_DESCRIPTION}, language/, "
            f'vision/, adapter.safetensors and saes/, or one of "toy", '
            + ", ".join(f'"{name}"' for name in PRESETS)
        )
    about = read_json(folder / _DESCRIPTION)
    kept = (
        {"language_name": about.pop("language_name")}
        if "language_name" in about
        else {}
    )
    valid = {field.name for field in fields(Parts)}
    if unknown := sorted(set(about) - valid):
        raise ValueError(
            f"{folder / _DESCRIPTION} says {', '.join(unknown)}, which is no part or "
            f"option of a model; valid: {', '.join(sorted(valid))}"
        )
    inside = {
        "language": folder / "language",
        "vision": folder / "vision",
        "adapter": folder / "adapter.safetensors",
        "saes": folder / "saes",
    }
    texts = folder / _TEXTS
    if texts.is_file():
        kept["texts"] = _lines(texts)
    return Parts(**inside | about), kept


def _joined(
    wanted: Parts, held: Mapping[str, object], texts: tuple[str, ...]
) -> VisionLanguageModel:
    language = held.get("language", wanted.language)
    device = _device(wanted.device, held)
    # The small parts come first, so that what is wrong with them is said soon; and the
    # SAEs before the language model, whose weights are processed as theirs were.
    adapter = (
        held["adapter"]
        if "adapter" in held
        else load_adapter(wanted.adapter, device=device)
    )
    block = wanted.vision_block
    if block is None:
        block = adapter.manifest.get("vision_block")
    vision = (
        held["vision"]
        if "vision" in held
        else VisionModel.load(wanted.vision, block=block, device=device)
    )
    saes = (
        held["saes"]
        if "saes" in held
        else load_saes(
            wanted.saes,
            layers=wanted.sae_layers,
            width=wanted.sae_width,
            l0=wanted.sae_l0,
            hook_point=wanted.hook_point,
            device=device,
            residency=wanted.sae_residency or "auto",
        )
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
    return VisionLanguageModel(
        vision=vision,
        adapter=adapter,
        language=language,
        saes=saes,
        name=wanted.name or language.name,
        reference_texts=texts,
    )


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


def _lines(file: Path) -> tuple[str, ...]:
    return tuple(filter(None, file.read_text().splitlines()))
