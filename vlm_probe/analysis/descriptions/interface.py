"""One interface for all that says what features mean.

A description is data: whatever stands in it, HTML or line breaks, is given as it was
found. Who shows it escapes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm_probe.saes import LayerSae, StreamedSaes
from vlm_probe.tokens import ranges


class Descriptions(ABC):
    """What the features of some layers are said to mean."""

    name: str
    """Where they come from, for tables and `meta`."""

    @abstractmethod
    def of(self, layer: int, features: Sequence[int]) -> dict[int, str | None]:
        """Descriptions of some features of a layer.

        Args:
            layer: Number of the block; of one that is not among `layers`, nothing is
                described.
            features: Which are asked for.

        Returns:
            Each feature asked for, once, in the order they were asked for; None where
            there is no description.

        Raises:
            ValueError: The SAE is known, and has no such feature.
        """

    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """The layers that can have descriptions, in order."""

    def described(self, layer: int) -> tuple[int, ...]:
        """The features of a layer that have a description, in order.

        Raises:
            ValueError: This source can only be asked for a feature that is named.
        """
        raise ValueError(
            f"{self.name} cannot list the features that it describes (asked for layer "
            f"{layer}); name the features that are wanted"
        )


@dataclass(frozen=True)
class SaeIdentity:
    """What a source of descriptions must agree with."""

    layer: int
    """Number of the block, from 0."""
    hook_point: str
    """Where in its block: resid_pre, resid_mid or resid_post."""
    n_features: int
    """Number of features."""
    model_name: str | None = None
    """The language model that the SAE was trained on, if known. It may be run on
    another one, as those of gemma-2-2b are on gemma-2-2b-it; this one counts."""
    neuronpedia_id: str | None = None
    """Its name on Neuronpedia, such as gemma-2-2b/20-gemmascope-res-16k, if known."""

    @classmethod
    def of(cls, sae: LayerSae) -> SaeIdentity:
        """What is to be known of an SAE."""
        return cls(
            sae.layer,
            sae.hook_point,
            sae.n_features,
            sae.model_name,
            sae.neuronpedia_id,
        )


Saes = Mapping[int, LayerSae | SaeIdentity]
"""By layer, autoencoders or what is to be known of them."""


def identities(saes: Saes) -> dict[int, SaeIdentity]:
    """What is to be known of each SAE, by layer, in order; no weights are read.

    Raises:
        ValueError: There is none, or one stands under another layer than its own.
    """
    known = saes.outlines if isinstance(saes, StreamedSaes) else saes
    found = {
        layer: sae if isinstance(sae, SaeIdentity) else SaeIdentity.of(sae)
        for layer, sae in known.items()
    }
    if not found:
        raise ValueError("no SAE given; descriptions are of the features of some")
    for layer, sae in found.items():
        if layer != sae.layer:
            raise ValueError(f"an SAE of layer {sae.layer} stands under layer {layer}")
    return dict(sorted(found.items()))


def check_features(
    layer: int, features: Sequence[int], n_features: int | None
) -> list[int]:
    """The features asked for, each once; any may be where their number is not known.

    Raises:
        ValueError: The SAE has no such feature; names those.
    """
    wrong = [f for f in features if n_features and not 0 <= f < n_features]
    if n_features is not None and wrong:
        raise ValueError(
            f"the SAE of layer {layer} has features 0 to {n_features - 1}, asked for "
            f"were {ranges(wrong)}"
        )
    return list(dict.fromkeys(int(f) for f in features))
