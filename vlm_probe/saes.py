"""One sparse autoencoder per layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from vlm_probe.codes import SparseCodes, code


@dataclass(frozen=True)
class LayerSae:
    """A pretrained SAE and the layer whose residual stream it was trained on."""

    layer: int
    """Number of the block, from 0."""
    sae: SAE
    """The sae_lens object."""
    name: str
    """Where it came from, for tables."""

    def __post_init__(self) -> None:
        expected = f"blocks.{self.layer}.hook_resid_post"
        hook = self.sae.cfg.metadata.hook_name
        if hook is not None and hook != expected:
            raise ValueError(
                f"SAE {self.name!r} was trained on {hook!r}, expected {expected!r} for "
                f"layer {self.layer}"
            )
        self.sae.eval().requires_grad_(False)

    @property
    def d_model(self) -> int:
        """Width of the activations that it codes."""
        return self.sae.cfg.d_in

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.sae.cfg.d_sae

    def code(
        self, x: Float[Tensor, "token d_model"]
    ) -> tuple[SparseCodes, Float[Tensor, "token d_model"]]:
        """Sparse codes of activations, and their reconstructions."""
        return code(self.sae, x)


def load_saes(folder: str | Path) -> dict[int, LayerSae]:
    """Loads SAEs saved by sae-lens, one folder a layer named `layer_0`, `layer_1`, ...

    Weights are computed with in float32, whatever they are stored in.
    """
    found: Mapping[int, Path] = {
        int(match[1]): path
        for path in Path(folder).iterdir()
        if (match := re.fullmatch(r"layer_(\d+)", path.name))
    }
    if not found:
        raise FileNotFoundError(
            f"no SAEs in {folder}: expected folders layer_0, layer_1, ... each with "
            "cfg.json and sae_weights.safetensors"
        )
    return {
        layer: LayerSae(
            layer,
            SAE.load_from_disk(found[layer], device="cpu", dtype="float32"),
            f"{Path(folder).name}/layer_{layer}",
        )
        for layer in sorted(found)
    }
