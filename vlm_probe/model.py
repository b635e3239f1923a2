"""The four frozen parts, joined and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm_probe.adapter import LinearAdapter
from vlm_probe.examples import data_folder
from vlm_probe.language import LanguageModel
from vlm_probe.saes import LayerSae, load_saes
from vlm_probe.vision import VisionModel


@dataclass(frozen=True)
class VisionLanguageModel:
    """A frozen vision model, adapter and language model, and the SAEs of its layers."""

    vision: VisionModel
    """From pictures to patch tokens."""
    adapter: LinearAdapter
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
        if not self.saes:
            raise ValueError("no SAE given; at least one layer needs one")
        for layer, sae in self.saes.items():
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

    def identities(self) -> dict[str, dict[str, str]]:
        """Name and SHA-256 of the weights of each part."""
        parts = {
            "vision": (self.vision.name, self.vision.visual),
            "adapter": ("adapter", self.adapter),
            "language": (self.language.name, self.language.hooked),
        } | {
            f"sae of layer {layer}": (sae.name, sae.sae)
            for layer, sae in sorted(self.saes.items())
        }
        return {
            part: {"name": name, "sha256": _digest(module)}
            for part, (name, module) in parts.items()
        }


def load(source: str | Path = "toy") -> VisionLanguageModel:
    """Loads a model from a folder.

    The folder holds `model.json`, `language/`, `vision/`, `adapter.safetensors`,
    `saes/` and, if its own words are few, `reference_texts.txt`.

    Args:
        source: The folder, or "toy" for the embedded model.

    Raises:
        FileNotFoundError: There is no such folder, or a part is missing.
        ValueError: The parts do not fit together.
    """
    folder = data_folder() / "toy" if source == "toy" else Path(source)
    described = folder / "model.json"
    if not described.is_file():
        raise FileNotFoundError(
            f"no model in {folder}: expected a folder with model.json, language/, "
            'vision/, adapter.safetensors and saes/, or "toy" for the embedded model'
        )
    about = json.loads(described.read_text())
    texts = folder / "reference_texts.txt"
    return VisionLanguageModel(
        vision=VisionModel.load(folder / "vision", block=about["vision_block"]),
        adapter=LinearAdapter.load(folder / "adapter.safetensors"),
        language=LanguageModel.load(
            folder / "language", default_prompt=about["default_prompt"]
        ),
        saes=load_saes(folder / "saes"),
        name=about["name"],
        reference_texts=_lines(texts) if texts.is_file() else (),
    )


def _lines(file: Path) -> tuple[str, ...]:
    return tuple(filter(None, file.read_text().splitlines()))


def _digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    state: dict[str, Tensor] = module.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()
