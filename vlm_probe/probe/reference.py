"""How seldom features fire, on texts and pictures that are the same for all groups.

A feature that fires everywhere says nothing of the image it is strongest in. Search
engines have the same trouble with words, and weigh them by their inverse document
frequency (Sparck Jones 1972). Here the documents are tokens:

    score = value * ln((1 + s) / (r + s))
        r = mean(n_text / N_text, n_image / N_image)
        s = mean(1 / N_text, 1 / N_image)

where n of N tokens of each half of the reference fire the feature. Both halves count
alike, or else the many tokens of a picture would drown the few of a text. s is the rate
that a single token of each half makes, the finest that can be told: one more token
that fires every feature. So a feature that is silent on the reference has a finite
weight, and one that always fires has none; with one half alone it is
ln((N + 1) / (n + 1)).

The reference is measured once, before the run: its weights do not depend on which
images have been through, so neither on batches, nor on processes, nor on whether the
run was stopped. Control arms are ranked by it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from vlm_probe.model import VisionLanguageModel
from vlm_probe.probe.feed import Block, Feed, Item
from vlm_probe.settings import ProbeSettings
from vlm_probe.tokens import Prompt


@dataclass(frozen=True)
class Fired:
    """On how many tokens of the reference each feature of a layer fires."""

    counts: Int[Tensor, "half feature"]
    """Of texts, then of pictures; in tokens."""
    seen: Int[Tensor, " half"]
    """How many tokens there were; 0 for a half that could not be measured, which is
    left out of all means."""

    def rate(self) -> Float64[np.ndarray, " feature"]:
        """The mean of both halves' rates: r above."""
        counts, seen = self._measured()
        return (counts / seen[:, None]).mean(0).numpy()

    def rarity(self) -> Float32[Tensor, " feature"]:
        """What a feature's value is multiplied by: never below zero."""
        _, seen = self._measured()
        finest = (1 / seen).mean()
        weight = ((1 + finest) / (torch.from_numpy(self.rate()) + finest)).log()
        # Of a feature that always fires, rounding might leave less than nothing.
        return weight.clamp(min=0).float()

    def _measured(self) -> tuple[Float[Tensor, "half feature"], Float[Tensor, " half"]]:
        there = self.seen > 0
        return self.counts[there].double(), self.seen[there].double()


@dataclass(frozen=True)
class Reference:
    """How often the features of every layer fire on texts and on pictures."""

    layers: Mapping[int, Fired]
    pictures: int
    """How many there were."""

    def about(self) -> dict[str, int]:
        """What it was measured on, for `meta`: the same for every layer that has it.

        Layers before the one where image vectors enter have none of pictures.
        """
        most = [
            max(f.seen[half].item() for f in self.layers.values()) for half in (0, 1)
        ]
        return {
            "text_tokens": most[0],
            "image_tokens": most[1],
            "pictures": self.pictures,
        }

    def rarity(self, device: torch.device) -> dict[int, Float32[Tensor, " feature"]]:
        """By layer, what a feature's value is multiplied by."""
        return {n: fired.rarity().to(device) for n, fired in self.layers.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything in it, by names that begin with `PREFIX`."""
        found = {f"{PREFIX}pictures": torch.tensor([self.pictures])}
        for layer, fired in self.layers.items():
            found[f"{PREFIX}{layer}.counts"] = fired.counts
            found[f"{PREFIX}{layer}.seen"] = fired.seen
        return found

    @classmethod
    def restored(cls, state: Mapping[str, Tensor]) -> Reference:
        """What `state` gave."""
        layers = {
            int(name.removeprefix(PREFIX).removesuffix(".counts")): Fired(
                counts, state[name.removesuffix("counts") + "seen"]
            )
            for name, counts in state.items()
            if name.endswith(".counts")
        }
        return cls(layers, int(state[f"{PREFIX}pictures"]))


PREFIX = "reference."


def first_pictures(
    feed: Feed, usable: Callable[[Block], list[Item]], n: int
) -> Iterator[list[Item]]:
    """The first usable examples of a run, block by block, without taking them.

    Whole blocks, until there are n: a picture is encoded with the others of its block.
    """
    found = 0
    for block in feed.ahead():
        if items := usable(block):
            yield items
            found += len(items)
        if found >= n:
            return


def settle(
    kept: Reference | None,
    model: VisionLanguageModel,
    settings: ProbeSettings,
    layers: Sequence[int],
    pictures: Iterable[Sequence[Item]],
    *,
    encoding: str,
) -> Reference:
    """The reference of a run: what was kept of it, or else it is measured.

    Args:
        kept: Of the checkpoint of a run that goes on.
        model: Of the run.
        settings: What is asked.
        layers: Those that are probed.
        pictures: Of `first_pictures`.
        encoding: How tokens are coded.

    Raises:
        ValueError: There are more pictures, or fewer, than were measured.
    """
    wanted = settings.calibration
    if kept is None:
        return _measured(model, settings, layers, pictures, encoding)
    now = min(wanted, sum(len(items) for items in pictures))
    if kept.pictures != now:
        raise ValueError(
            f"the run was begun with {kept.pictures} pictures in the reference of "
            f"selectivity, now there are {now}, so its scores would be others; give "
            f"the same pictures, or another folder and {wanted} pictures or more at "
            "its beginning"
        )
    return kept


@torch.no_grad()
def _measured(
    model: VisionLanguageModel,
    settings: ProbeSettings,
    layers: Sequence[int],
    pictures: Iterable[Sequence[Item]],
    encoding: str,
) -> Reference:
    """Runs texts and pictures through the model, and counts what fires.

    Texts are the model's reference texts, each behind what a prompt begins with and
    without a question; of pictures their image tokens.
    """
    counting = _Counting(model, layers, encoding)
    words, size = [_words(model, t) for t in model.reference_texts], settings.batch_size
    for start in range(0, len(words), size):
        batch = words[start : start + size]
        counting.add(batch, None, len(batch), half=0)
    rows, columns = model.vision.grid
    blank = model.language.chat.image_prompt(None, rows * columns)
    blank = blank.until(blank.image.stop)
    found = 0
    for items in pictures:
        patches = model.vision.encode([item.picture for item in items])
        # What is left over of the last block does not count.
        counted = min(len(items), settings.calibration - found)
        counting.add([blank] * len(items), model.adapter(patches), counted, half=1)
        found += counted
    return Reference(counting.fired(), found)


class _Counting:
    """Counts, at each layer, the tokens of each half that fire a feature."""

    def __init__(
        self, model: VisionLanguageModel, layers: Sequence[int], encoding: str
    ) -> None:
        self._model, self._layers, self._encoding = model, layers, encoding
        self._counts: dict[int, Int[Tensor, "half feature"]] = {}
        self._seen = {layer: torch.zeros(2, dtype=torch.int64) for layer in layers}

    def add(
        self,
        prompts: Sequence[Prompt],
        vectors: Float[Tensor, "row patch d_model"] | None,
        counted: int,
        *,
        half: int,
    ) -> None:
        """Reads prompts, and counts the tokens of the first of them."""
        group = "text_only" if vectors is None else "image"
        places = [
            (row, position)
            for row, prompt in enumerate(prompts[:counted])
            for position in prompt.positions(group)
        ]
        if not places:
            return
        language = self._model.language
        row, position = torch.tensor(places, device=language.device).T

        first = self._model.adapter.inject_layer

        def visit(layer: int, residual: Float[Tensor, "row pos d_model"]) -> None:
            if group == "image" and layer < first:
                return  # nothing of the picture stands there yet
            sae = self._model.saes[layer]
            codes, _ = sae.code(residual[row, position], encoding=self._encoding)
            if layer not in self._counts:
                zeros = torch.zeros(2, sae.n_features, dtype=torch.int64)
                self._counts[layer] = zeros
            fired = torch.bincount(codes.feature, minlength=sae.n_features)
            self._counts[layer][half] += fired.cpu()
            self._seen[layer][half] += codes.n_tokens

        language.read(
            prompts,
            vectors,
            self._layers,
            visit,
            hook_point=self._model.hook_point,
            inject_layer=first,
        )

    def fired(self) -> dict[int, Fired]:
        return {n: Fired(counts, self._seen[n]) for n, counts in self._counts.items()}


def _words(model: VisionLanguageModel, text: str) -> Prompt:
    """A text behind what prompts begin with, as far as the model can read."""
    chat = model.language.chat
    prompt = chat.text_prompt(None, text)
    n_words = len(prompt.ids) - len(chat.text_prompt(None, "").ids)
    stop = min(prompt.image.start + n_words, model.language.hooked.cfg.n_ctx)
    return prompt.until(stop)
