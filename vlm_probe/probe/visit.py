"""A layer is visited: its tokens are coded, added up and forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm_probe.codes import SparseCodes, peak_table, strongest
from vlm_probe.model import VisionLanguageModel
from vlm_probe.probe.clock import Clock
from vlm_probe.probe.tally import TOP, Tallies, Tally
from vlm_probe.settings import ProbeSettings
from vlm_probe.sums import bootstrap_weights
from vlm_probe.tokens import Prompt


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
        """
        self._model, self._settings = model, settings
        self._tallies, self._clock = tallies, clock
        self._prompts, self._images, self._names = prompts, np.array(images), names
        self._condition = condition
        self.n_close = 0
        """Pairs of token and feature within rounding of the threshold, so far."""
        found = [
            Places(prompts, group, settings.include_special)
            for group in settings.groups
        ]
        self._groups = [places for places in found if len(places)]
        self._row, self._position = (
            torch.from_numpy(
                np.concatenate([np.zeros(0, np.int64), *map(part, self._groups)])
            ).to(model.language.device)
            for part in (lambda g: g.row, lambda g: g.position)
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
            codes, x_hat = self._model.saes[layer].code(
                x, encoding=self._settings.encoding
            )
            self.n_close += codes.n_close
        with self._clock("sums"):
            l0 = codes.l0()
            stops = itertools.accumulate(map(len, self._groups))
            for places, stop in zip(self._groups, stops, strict=True):
                here = slice(stop - len(places), stop)
                tally = self._tallies.of((layer, places.group, self._condition))
                tally.sums.add(
                    x[here],
                    x_hat[here],
                    l0[here],
                    places.row,
                    self._weights,
                    convention=self._settings.convention,
                )
                part = codes.part(here.start, here.stop)
                self._add_features(tally, part, self._row[here], places)

    def _add_features(
        self,
        tally: Tally,
        codes: SparseCodes,
        unit: Int[Tensor, " token"],
        places: Places,
    ) -> None:
        table = peak_table(codes, unit, len(self._prompts))
        tally.features.add(codes, table)
        best = strongest(codes, unit, table, self._settings.top_k)
        rows = np.zeros(len(best.unit), TOP)
        rows["image"] = self._images[best.unit]
        for name in ("rank", "feature", "value"):
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
