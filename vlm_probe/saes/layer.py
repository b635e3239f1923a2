"""A pretrained autoencoder with the layer that it is for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from vlm_probe.codes import SparseCodes, code
from vlm_probe.saes.offers import place
from vlm_probe.tokens import ENCODINGS, HOOK_POINTS, check_names

_ARCHITECTURES = (
    "standard",
    "jumprelu",
    "topk",
    "gated",
    "abstopk",
    "matching_pursuit",
)
"""Those that code each token by itself, and reconstruct what they were given."""


_NOT_COMPUTED = ("metadata", "device")


@dataclass(frozen=True)
class LayerSae:
    """A pretrained SAE and the layer whose residual stream it was trained on."""

    layer: int
    """Number of the block, from 0."""
    sae: SAE
    """The sae_lens object."""
    name: str
    """Where it came from, for tables."""
    hook_point: str = "resid_post"
    """Where in its block: resid_pre, resid_mid or resid_post."""

    def __post_init__(self) -> None:
        if self.hook_point not in HOOK_POINTS:
            raise ValueError(
                f"SAE {self.name!r} is for {self.hook_point!r}; valid: "
                f"{', '.join(HOOK_POINTS)}"
            )
        hook = self.sae.cfg.metadata.hook_name
        if hook is not None and place(hook) != (self.layer, self.hook_point):
            raise ValueError(
                f"SAE {self.name!r} was trained on {hook!r}, expected "
                f"{self._hook_name!r} for layer {self.layer}"
            )
        architecture = self.sae.cfg.architecture()
        if architecture not in _ARCHITECTURES:
            raise ValueError(
                f"SAE {self.name!r} is of architecture {architecture!r}; known are "
                f"{', '.join(_ARCHITECTURES)}, which code each token by itself and "
                "reconstruct what they code"
            )
        # sae-lens runs these two as if there were nothing to normalize.
        scaling = self.sae.cfg.normalize_activations
        if scaling in ("expected_average_only_in", "covariance_whitening"):
            raise ValueError(
                f"SAE {self.name!r} was trained on activations normalized by "
                f"{scaling!r}, and its weights do not do that yet, so every code would "
                "be wrong; call its fold_activation_norm_scaling_factor or "
                "fold_activation_whitening with what was measured in training"
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

    @property
    def n_bytes(self) -> int:
        """Size of its weights, in bytes."""
        return sum(tensor.nbytes for tensor in self.sae.state_dict().values())

    @property
    def model_name(self) -> str | None:
        """The language model that it was trained on, if known."""
        return self.sae.cfg.metadata.model_name

    @property
    def processing(self) -> dict:
        """How that model's weights were processed, as arguments of TransformerLens."""
        return dict(self.sae.cfg.metadata.model_from_pretrained_kwargs or {})

    @property
    def prepend_bos(self) -> bool | None:
        """Whether the texts it was trained on began with BOS, if known."""
        return self.sae.cfg.metadata.prepend_bos

    @property
    def neuronpedia_id(self) -> str | None:
        """Under which name Neuronpedia shows its features, if it does."""
        return self.sae.cfg.metadata.neuronpedia_id

    def code(
        self, x: Float[Tensor, "token d_model"], *, encoding: str = "auto"
    ) -> tuple[SparseCodes, Float[Tensor, "token d_model"]]:
        """Sparse codes of activations, and their reconstructions.

        Args:
            x: Activations of its hook point.
            encoding: "auto", "dense" or "screened"; see `vlm_probe.codes.code`.
        """
        check_names("encoding", [encoding], ENCODINGS)
        return code(self.sae, x, encoding=encoding)

    def computes(self) -> dict[str, object]:
        """What it does with its weights, in the words of sae-lens' configuration."""
        told = self.sae.cfg.to_dict()
        return {name: v for name, v in told.items() if name not in _NOT_COMPUTED}

    def save(self, folder: str | Path) -> None:
        """Writes it as sae-lens does, with its place, for `load_saes`."""
        self.sae.cfg.metadata.hook_name = self._hook_name
        self.sae.save_model(folder)

    @property
    def _hook_name(self) -> str:
        return f"blocks.{self.layer}.hook_{self.hook_point}"
