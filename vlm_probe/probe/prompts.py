"""The prompts of an example, with its picture and with words in its place."""

from __future__ import annotations

from vlm_probe.model import VisionLanguageModel
from vlm_probe.probe.feed import Item
from vlm_probe.settings import ProbeSettings
from vlm_probe.tokens import Prompt


class Prompts:
    """Writes the prompts of a run."""

    def __init__(self, model: VisionLanguageModel, settings: ProbeSettings) -> None:
        """Has written none yet."""
        rows, columns = model.vision.grid
        self._n_patches = rows * columns
        self._model = model
        self._groups = set(settings.groups)
        self.instead = {"captions": 0, "reference texts": 0}
        """How often which words stood in a picture's place."""

    def with_picture(self, item: Item) -> Prompt:
        """As far as any group that is asked for reaches."""
        prompt = self._model.language.chat.image_prompt(
            item.example.prompt, self._n_patches
        )
        if "text_after_image" in self._groups:
            return prompt
        # What comes behind the picture is not seen by it.
        return prompt.until(prompt.image.stop)

    def with_words(self, item: Item) -> Prompt:
        """With the caption, else a reference text."""
        kind = "captions" if item.example.caption is not None else "reference texts"
        self.instead[kind] += 1
        return self._worded(item)

    def too_long(self, item: Item) -> ValueError | None:
        """What is wrong with an example that has more tokens than there may be.

        Found before the models run, so that one of many does not end them all.
        """
        most = self._model.language.hooked.cfg.n_ctx
        prompts = []
        if self._groups & {"image", "text_after_image"}:
            prompts.append(self.with_picture(item))
        if "text_only" in self._groups:
            prompts.append(self._worded(item))
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest <= most:
            return None
        return ValueError(
            f"a prompt of {longest} tokens is longer than the {most} positions that "
            "the language model is run with; shorten the prompt or caption"
        )

    def _worded(self, item: Item) -> Prompt:
        texts = self._model.reference_texts
        words = item.example.caption
        if words is None:
            words = texts[item.index % len(texts)]
        return self._model.language.chat.text_prompt(item.example.prompt, words)
