"""The four frozen parts, joined if they fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_probe.adapter import Adapter
from vlm_probe.examples import data_folder
from vlm_probe.language import LanguageModel
from vlm_probe.model.identity import digest
from vlm_probe.saes import LayerSae, outlines
from vlm_probe.vision import VisionModel


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
            texts = lines(data_folder() / "reference_texts.txt")
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
        if (folder / DESCRIPTION).exists():
            raise FileExistsError(
                f"there is a model in {folder} already; give another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.language.save(folder / "language")
        self.vision.save(folder / "vision")
        self.adapter.save(folder / "adapter.safetensors")
        for layer in self.saes:
            self.saes[layer].save(folder / "saes" / f"layer_{layer}")
        (folder / TEXTS).write_text("\n".join(self.reference_texts) + "\n")
        about = {
            "name": self.name,
            "language_name": self.language.name,
            "vision_block": self.vision.block,
            "default_prompt": self.language.chat.default_prompt,
            "backend": self.language.backend,
            "dtype": str(self.language.dtype).removeprefix("torch."),
        }
        # Last, so that a folder with a description is whole.
        (folder / DESCRIPTION).write_text(json.dumps(about, indent=1) + "\n")
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


DESCRIPTION, TEXTS = "model.json", "reference_texts.txt"
"""Files of a saved model, beside its parts."""


def lines(file: Path) -> tuple[str, ...]:
    """The lines of a file that are not empty."""
    return tuple(filter(None, file.read_text().splitlines()))
