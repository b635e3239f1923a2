"""What goes to the image positions: the model's own vectors, and the control arms'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_probe import controls
from vlm_probe.model import VisionLanguageModel
from vlm_probe.probe.clock import Clock
from vlm_probe.probe.feed import Block, Feed, Item
from vlm_probe.settings import ProbeSettings


class Arms:
    """Makes the vectors of each condition, which depend on other pictures, too.

    Pictures are always encoded with the others of their block, so that an arm has the
    same vectors to the bit whoever makes them, and when.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        settings: ProbeSettings,
        usable: Callable[[Block], list[Item]],
        clock: Clock,
    ) -> None:
        """Has seen no picture yet.

        Args:
            model: With the vision model and the adapter.
            settings: Which arms are asked for.
            usable: The examples of a block that go through the model.
            clock: Counts the time.
        """
        self._model = model
        self._settings = settings
        self._usable = usable
        self._clock = clock
        self._untrained: controls.Map | None = None
        self.last: Float[Tensor, "patch d_model"] | None = None
        """Vectors of the picture before the next one; only `shuffled_images` asks."""
        self.calibrated = 0
        """Pictures that `random_adapter` was calibrated on."""

    def prepare(self, feed: Feed) -> None:
        """Looks at the first pictures of the run for what needs them."""
        if "random_adapter" in self._settings.controls:
            self._calibrate(feed)
        if "shuffled_images" in self._settings.controls and self.last is None:
            self.last = self._second(feed)

    @torch.no_grad()
    def of(
        self, items: Sequence[Item], skipped: Sequence[Block]
    ) -> Iterator[tuple[str, Float[Tensor, "image patch d_model"]]]:
        """Each condition, and its vectors for some pictures.

        Args:
            items: The usable examples of a block.
            skipped: Blocks before it that other processes take.
        """
        patches = self._encode(items)
        vectors = self._model.adapter(patches)
        yield "model", vectors
        for control in self._settings.controls:
            if control == "random_adapter":
                # Calibrated by the time there are pictures.
                arm = self._untrained(patches)  # pyright: ignore[reportOptionalCall]
            elif control == "noise":
                units = [item.index for item in items]
                arm = controls.noise(vectors, units, self._settings.seed)
            else:
                arm = controls.previous_image(vectors, self._before(skipped))
                self.last = vectors[-1].clone()
            yield control, arm

    def pass_over(self, skipped: Sequence[Block]) -> None:
        """Sees the pictures before a block that has none of its own."""
        if "shuffled_images" in self._settings.controls:
            self.last = self._before(skipped)

    def _encode(self, items: Sequence[Item]) -> Float[Tensor, "image patch d_vision"]:
        with self._clock("vision"):
            return self._model.vision.encode([item.picture for item in items])

    @torch.no_grad()
    def _before(self, skipped: Sequence[Block]) -> Float[Tensor, "patch d_model"]:
        """Vectors of the picture before a block, whoever's it is."""
        for block in reversed(skipped):
            if items := self._usable(block.read()):
                return self._model.adapter(self._encode(items))[-1].clone()
        # Set by the time there are pictures.
        return self.last  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def _second(self, feed: Feed) -> Float[Tensor, "patch d_model"]:
        """Vectors of the second picture, which stand in for one before the first."""
        found = 0
        for block in feed.ahead():
            items = self._usable(block)
            if found + len(items) >= 2:
                return self._model.adapter(self._encode(items))[1 - found].clone()
            found += len(items)
        raise ValueError(
            f"shuffled_images needs at least two readable images, given {found}"
        )

    def _calibrate(self, feed: Feed) -> None:
        """Fits the untrained adapter to patch tokens of the first pictures."""
        encoded: list[Tensor] = []
        for block in feed.ahead():
            if items := self._usable(block):
                encoded += self._encode(items)
            if len(encoded) >= self._settings.calibration:
                break
        self.calibrated = min(len(encoded), self._settings.calibration)
        if encoded:
            self._untrained = controls.random_adapter(
                self._model.adapter,
                torch.cat(encoded[: self._settings.calibration]),
                self._settings.seed,
            )
