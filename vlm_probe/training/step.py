"""One step: what can be learned from, its loss, and the gradient of all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from vlm_probe.examples import UNREADABLE
from vlm_probe.training.batches import Batch, Batches, Failure, Item
from vlm_probe.training.frozen import Frozen
from vlm_probe.training.learner import Learner
from vlm_probe.training.objective import loss
from vlm_probe.training.settings import AdapterTraining, Stage
from vlm_probe.vision import TokenCache


@dataclass(frozen=True)
class Seen:
    """A batch whose pictures were looked at."""

    items: Sequence[Item]
    """What can be learned from."""
    patches: Float[Tensor, "image patch d_vision"] | None
    """Patch tokens of those with a picture, in order; None if none has."""
    failures: Sequence[Failure]
    """What cannot."""


@dataclass(frozen=True)
class Sums:
    """Of a step, over all processes."""

    cross_entropy: float
    """Weighted sum over the assistant's tokens, in nats."""
    weight: float
    """Sum of the weights."""
    fvu: float
    """Mean FVU of the SAEs that were asked, times the number of pictures."""
    n_pictures: int
    """Of those with a picture; FVU is of these."""
    n_tokens: int
    """Of the assistant."""
    n_conversations: int
    """That were learned from."""
    n_failures: int
    """That could not be."""
    gradient_norm: float
    """Before it was shortened."""


class Step:
    """Takes batches through the models, as one of several processes."""

    def __init__(
        self,
        frozen: Frozen,
        learner: Learner,
        settings: AdapterTraining,
        accelerator: Accelerator,
        cache: TokenCache | None,
    ) -> None:
        """Has done nothing yet."""
        self._frozen, self._learner, self._settings = frozen, learner, settings
        self._accelerator, self._cache = accelerator, cache

    def look(self, batch: Batch, batches: Batches) -> Seen:
        """Encodes the pictures, from disk where they are kept."""
        pictured = [item for item in batch.items if item.example.image is not None]
        if not pictured:
            return Seen(batch.items, None, batch.failures)
        if self._cache is None:
            return Seen(batch.items, self.encode(pictured), batch.failures)
        try:
            patches = self._cache.encode([item.example for item in pictured])
        except UNREADABLE:
            broken = dict(_broken(pictured, batches))
            if not broken:  # but the disk is full
                raise
            rest = tuple(item for item in batch.items if item.index not in broken)
            failures = (*batch.failures, *broken.values())
            return self.look(Batch(rest, failures), batches)
        return Seen(batch.items, patches, batch.failures)

    def encode(self, items: Sequence[Item]) -> Float[Tensor, "image patch d_vision"]:
        """Patch tokens of pictures that were read."""
        pictures = [item.picture for item in items if item.picture is not None]
        return self._frozen.vision.encode(pictures)

    def learn(self, seen: Sequence[Seen], stage: Stage) -> Sums:
        """Leaves the step's gradient in the learner.

        It is that of the mean over all that all processes have seen: of cross-entropy
        by the tokens' weights, of FVU by pictures.
        """
        lessons = [[item.lesson for item in s.items] for s in seen]
        counts = torch.zeros(5, dtype=torch.float64)
        for part, of_part in zip(seen, lessons, strict=True):
            weight = sum(sum(lesson.weights(stage.average)) for lesson in of_part)
            n_pictures = 0 if part.patches is None else len(part.patches)
            n_tokens = sum(len(lesson.said) for lesson in of_part)
            counts += torch.tensor(
                [weight, n_pictures, n_tokens, len(of_part), len(part.failures)],
                dtype=torch.float64,
            )
        weight, n_pictures, *numbers = self.of_all(counts).tolist()
        sums = torch.zeros(2, dtype=torch.float64)
        for part, of_part in zip(seen, lessons, strict=True):
            if not of_part:
                continue
            found = loss(
                self._frozen.language,
                of_part,
                None if part.patches is None else self._learner(part.patches),
                average=stage.average,
                inject_layer=self._settings.inject_layer,
                saes=self._frozen.saes,
                layers=self._frozen.layers,
                penalized=self._settings.sae_penalty > 0,
            )
            total = found.cross_entropy / weight
            if found.fvu is not None:
                total = total + self._settings.sae_penalty * found.fvu / n_pictures
                sums[1] += float(found.fvu.detach())
            if total.requires_grad:
                total.backward()
            sums[0] += float(found.cross_entropy.detach())
        cross_entropy, fvu = self.of_all(sums).tolist()
        n_tokens, n_conversations, n_failures = map(int, numbers)
        return Sums(
            cross_entropy,
            weight,
            fvu,
            int(n_pictures),
            n_tokens,
            n_conversations,
            n_failures,
            self._gathered(stage.clip) if weight else 0.0,
        )

    def of_all(self, here: Tensor) -> Tensor:
        """Summed over the processes."""
        if self._accelerator.num_processes == 1:
            return here
        device = self._frozen.language.device
        return self._accelerator.reduce(here.to(device), "sum").cpu()

    def _gathered(self, clip: float | None) -> float:
        """Adds up the processes' gradients, and shortens them; gives their norm."""
        parameters = list(self._learner.parameters())
        for parameter in parameters:
            grad = parameter.grad
            if grad is None:  # this process had no picture; others may
                grad = torch.zeros_like(parameter)
            parameter.grad = self._accelerator.reduce(grad, "sum")
        most = float("inf") if clip is None else clip
        return float(nn.utils.clip_grad_norm_(parameters, most))


def _broken(items: Sequence[Item], batches: Batches) -> Iterator[tuple[int, Failure]]:
    """Those whose picture cannot be read, by index."""
    for item in items:
        try:
            item.example.picture()
        except UNREADABLE as error:
            yield item.index, batches.failure(item.index, str(item.example.id), error)
