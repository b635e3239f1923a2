"""What must not change while an adapter is learned, and the proof that it did not."""

from __future__ import annotations

from collections.abc import Mapping

from vlm_probe.language import LanguageModel
from vlm_probe.model.identity import digest
from vlm_probe.saes import LayerSae, outlines
from vlm_probe.training.settings import AdapterTraining
from vlm_probe.vision import VisionModel


class Frozen:
    """Vision model, language model, and the SAEs that are asked on the way."""

    def __init__(
        self,
        vision: VisionModel,
        language: LanguageModel,
        saes: Mapping[int, LayerSae],
        settings: AdapterTraining,
    ) -> None:
        """Checks that they can do what is asked, and takes their digests.

        Raises:
            ValueError: A penalty without SAE, or an SAE of a layer that there is not,
                of another width or before the image vectors enter.
        """
        self.vision, self.language = vision, language
        asked = settings.penalty_layers
        if asked is None:
            asked = [layer for layer in saes if layer >= settings.inject_layer]
        if missing := sorted(set(asked) - set(saes)):
            raise ValueError(
                f"penalty_layers {missing}: no SAE given for them; there are SAEs for "
                f"layers {sorted(saes)}"
            )
        if settings.sae_penalty and not asked:
            raise ValueError(
                f"sae_penalty {settings.sae_penalty} given, but no SAE; give saes= (of "
                "load_saes, or a model's .saes)"
            )
        self.saes, self.layers = saes, tuple(sorted(asked))
        """SAEs, which may be streamed, and the layers of those that are asked."""
        told = {layer: outlines(saes)[layer] for layer in self.layers}
        for layer, sae in told.items():
            if sae.d_model != language.d_model:
                raise ValueError(
                    f"SAE {sae.name!r} codes activations of width {sae.d_model}, the "
                    f"language model's are {language.d_model}"
                )
            if not settings.inject_layer <= layer < language.n_layers:
                raise ValueError(
                    f"layer {layer} of SAE {sae.name!r} has no image tokens: they "
                    f"enter before block {settings.inject_layer} of "
                    f"{language.n_layers}"
                )
        if len({sae.hook_point for sae in told.values()}) > 1:
            raise ValueError("the SAEs are of several hook points; give those of one")
        if not 0 <= settings.inject_layer < language.n_layers:
            raise ValueError(
                f"inject_layer {settings.inject_layer}: image vectors enter before one "
                f"of the blocks 0 to {language.n_layers - 1}"
            )
        self.digests = self._digests()
        """SHA-256 of each part's weights, before training."""

    def check(self) -> None:
        """Makes sure that no weight has changed.

        Raises:
            RuntimeError: One has; names the part.
        """
        now = self._digests()
        if changed := [part for part in now if now[part] != self.digests[part]]:
            raise RuntimeError(
                f"the weights of {', '.join(changed)} changed in training, which only "
                "the adapter's may; nothing was saved. Load the models again, and look "
                "for what else has hold of them"
            )

    def _digests(self) -> dict[str, str]:
        found = {
            "vision": digest(self.vision.visual),
            "language": digest(self.language.hooked),
        }
        for layer in self.layers:
            sae = outlines(self.saes)[layer]
            found[f"sae of layer {layer}"] = digest(
                sae.sae, lambda layer=layer: self.saes[layer].sae
            )
        return found
