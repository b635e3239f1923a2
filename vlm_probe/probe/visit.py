"""A layer is visited: its tokens are coded, added up and forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vlm_probe.codes import SparseCodes, peak_table, strongest
from vlm_probe.model import VisionLanguageModel
from vlm_probe.probe.clock import Clock
from vlm_probe.probe.tally import TOP, Tallies
from vlm_probe.settings import ProbeSettings
from vlm_probe.sums import UnitSums, bootstrap_weights, unit_sums
from vlm_probe.tokens import RANKINGS, Prompt


class Places:
    """Where the tokens of a group stand in some prompts."""

    def __init__(
        self, prompts: Sequence[Prompt], group: str, include_special: bool
    ) -> None:
        """Finds them, row by row."""
        self.group = group
        found = [
            (
                row,
                position,
                -1 if position in prompt.image else prompt.ids[position],
                position - prompt.image.start if position in prompt.image else -1,
            )
            for row, prompt in enumerate(prompts)
            for position in prompt.positions(group, include_special=include_special)
        ]
        self.row, self.position, self.word, self.patch = (
            np.array(found, np.int64).reshape(-1, 4).T
        )

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Coded:
    """What a layer's SAE made of a group's tokens."""

    codes: SparseCodes
    sums: UnitSums

    def after(self, first: Coded) -> Coded:
        """Moved from each image to the next; the first has its own."""
        n_tokens = self.codes.n_tokens - first.codes.n_tokens
        return Coded(
            first.codes.then(self.codes.part(0, n_tokens)), self.sums.after(first.sums)
        )


class Visit:
    """What is done with each layer of a pass over some prompts."""

    def __init__(
        self,
        model: VisionLanguageModel,
        settings: ProbeSettings,
        tallies: Tallies,
        clock: Clock,
        *,
        prompts: Sequence[Prompt],
        images: Sequence[int],
        names: Sequence[str],
        condition: str,
        encoding: str,
        pictured: dict[int, Coded],
        rarity: Mapping[int, Float[Tensor, " feature"]],
    ) -> None:
        """Finds which tokens are wanted.

        Args:
            model: With the SAEs.
            settings: What is asked.
            tallies: What is added to.
            clock: Counts the time.
            prompts: A row each.
            images: Place in the run of each prompt's image.
            names: Its id, for messages.
            condition: Of the pass.
            encoding: How tokens are coded.
            pictured: By layer, what was made of the image tokens under the condition
                `model`, which fills it if it will be asked for. Nothing before a
                picture differs between prompts, and nothing behind it is seen by it:
                under `shuffled_images`, the tokens of each image are those of the
                image before under `model`.
            rarity: By layer, what a feature's value is multiplied by where features
                are ranked by selectivity; none where nobody asks.
        """
        self._model, self._settings = model, settings
        self._tallies, self._clock = tallies, clock
        self._prompts, self._images, self._names = prompts, np.array(images), names
        self._condition, self._pictured = condition, pictured
        self._rarity = rarity
        self._is_asked_again = (
            condition == "model" and "shuffled_images" in settings.controls
        )
        self._encoding = encoding
        self.n_close = 0
        """Pairs of token and feature within rounding of the threshold, so far."""
        found = [
            Places(prompts, group, settings.include_special)
            for group in settings.groups
        ]
        self._groups = [places for places in found if len(places)]
        # Tokens of each group that are coded; of an image seen before, none.
        self._lengths = [
            len(places) // len(prompts) if self._is_shared(places) else len(places)
            for places in self._groups
        ]
        self._row, self._position = (
            torch.from_numpy(
                np.concatenate(
                    [np.zeros(0, np.int64)]
                    + [
                        getattr(places, part)[:length]
                        for places, length in zip(
                            self._groups, self._lengths, strict=True
                        )
                    ]
                )
            ).to(model.language.device)
            for part in ("row", "position")
        )
        self._weights = bootstrap_weights(
            list(images), settings.replicates, settings.seed
        )

    def __bool__(self) -> bool:
        """Whether any token is wanted."""
        return bool(self._groups)

    def __call__(self, layer: int, residual: Float[Tensor, "row pos d_model"]) -> None:
        """Codes the tokens of all groups together, and adds them up."""
        with self._clock("codes"):
            self._check(layer, residual)
            x = residual[self._row, self._position]
            codes, x_hat = self._model.saes[layer].code(x, encoding=self._encoding)
            self.n_close += codes.n_close
        with self._clock("sums"):
            l0, stop = codes.l0(), 0
            for places, length in zip(self._groups, self._lengths, strict=True):
                start, stop = stop, stop + length
                if self._is_not_there_yet(layer, places):
                    continue
                here, unit = slice(start, stop), places.row[:length]
                coded = Coded(
                    codes.part(start, stop),
                    unit_sums(x[here], x_hat[here], l0[here], unit, len(self._images)),
                )
                if self._is_shared(places):
                    coded = self._pictured[layer].after(coded)
                elif places.group == "image" and self._is_asked_again:
                    self._pictured[layer] = coded
                self._add(layer, places, coded)

    def _is_shared(self, places: Places) -> bool:
        return places.group == "image" and self._condition == "shuffled_images"

    def _is_not_there_yet(self, layer: int, places: Places) -> bool:
        """Whether image vectors enter only before a later block."""
        return places.group == "image" and layer < self._model.adapter.inject_layer

    def _add(self, layer: int, places: Places, coded: Coded) -> None:
        tally = self._tallies.of((layer, places.group, self._condition))
        tally.sums.add_units(coded.sums, self._weights, self._settings.convention)
        codes = coded.codes
        unit = torch.from_numpy(places.row).to(codes.token.device)
        table = peak_table(codes, unit, len(self._prompts))
        tally.features.add(codes, table)
        for by, ranking in enumerate(RANKINGS):
            if ranking not in self._settings.rank_by:
                continue
            weight = self._rarity[layer] if ranking == "selectivity" else None
            best = strongest(codes, unit, table, self._settings.top_k, weight)
            rows = np.zeros(len(best.unit), TOP)
            rows["image"], rows["by"] = self._images[best.unit], by
            for name in ("rank", "feature", "value", "score"):
                rows[name] = getattr(best, name)
            for name in ("position", "word", "patch"):
                rows[name] = getattr(places, name)[best.token]
            tally.add_top(rows)

    def _check(self, layer: int, residual: Float[Tensor, "row pos d_model"]) -> None:
        if residual.isfinite().all():
            return
        finite = residual.isfinite().all(-1)
        for row, prompt in enumerate(self._prompts):
            # What stands at padding means nothing.
            if not finite[row, : len(prompt.ids)].all():
                raise ValueError(
                    f"the residual stream of layer {layer} is not a number for "
                    f"example {self._names[row]!r}; look at the picture, the "
                    "adapter's vectors and the dtype of the language model"
                )
