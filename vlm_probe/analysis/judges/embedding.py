"""A judge who compares words with words: a description and the picture's caption."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Float

from vlm_probe.analysis.judges.interface import Judge, Question, example_of
from vlm_probe.examples import Example

Embed = Callable[[list[str]], Any]
"""Gives an array "text width" for a list of texts."""

_ROUNDING = 1e-12
"""How far from 1 the cosine of two equal vectors may be found."""

_BLOCK = 1 << 14
"""Questions whose vectors are held side by side: some ten megabytes at usual widths."""


def caption(example: Example) -> str | None:
    """The picture in words, as the example has it."""
    return example.caption


class EmbeddingJudge(Judge):
    """Says yes where a text model finds description and caption similar enough.

    It never sees the picture, and what a caption leaves out counts against a
    description. So its answers are to be read beside their chance level only.
    """

    def __init__(
        self,
        embed: Embed | str,
        *,
        threshold: float,
        text: Callable[[Example], str | None] = caption,
        false_positives: float | None = None,
    ) -> None:
        """Takes the text model.

        Args:
            embed: A function from texts to vectors, or the name or folder of a
                sentence-transformers model (`pip install 'vlm_probe[judge]'`).
            threshold: The cosine from which on it says yes. No number fits every
                model: `calibrated` finds one.
            text: What is said of a picture; its caption. Where it is None or blank,
                the judge has no answer.
            false_positives: The share of permuted pairs the threshold was set at, to
                be remembered in `settings`.

        Raises:
            ImportError: A name was given and sentence-transformers is not installed.
            ValueError: The threshold is no cosine.
        """
        if not -1 <= threshold <= 1:
            raise ValueError(
                f"threshold is a cosine, from -1 to 1, given {threshold}; "
                "EmbeddingJudge.calibrated finds one"
            )
        self._name = embed if isinstance(embed, str) else _name_of(embed)
        self._embed = _load(embed) if isinstance(embed, str) else embed
        self._text = text
        self._vectors: dict[str, np.ndarray] = {}
        self.threshold = threshold
        self.false_positives = false_positives

    @classmethod
    def calibrated(
        cls,
        embed: Embed | str,
        examples: Mapping[str, Example],
        questions: Sequence[Question],
        *,
        false_positives: float = 0.05,
        text: Callable[[Example], str | None] = caption,
    ) -> EmbeddingJudge:
        """A judge whose yes is wrong at a stated rate, if descriptions mean nothing.

        The descriptions asked of one picture are compared with the texts of all other
        pictures for which they were not asked; of these permuted pairs at most the
        stated share is let pass. Better on other pictures than those that are judged
        afterwards: on the same ones the chance level is the stated rate by design.

        Args:
            embed: As for the judge itself.
            examples: By the key that questions name them with.
            questions: Pictures with the descriptions that go with them.
            false_positives: Share of permuted pairs that may pass.
            text: What is said of a picture.

        Raises:
            ValueError: The rate is no share, or there are too few permuted pairs to
                tell it.
        """
        if not 0 < false_positives < 1:
            raise ValueError(
                f"false_positives is a share between 0 and 1, given {false_positives}"
            )
        judge = cls(embed, threshold=1.0, text=text)
        asked = set(questions)
        descriptions = list(dict.fromkeys(q.description for q in questions))
        images = list(dict.fromkeys(q.image for q in questions))
        pairs = [
            pair
            for image in images
            for description in descriptions
            if (pair := Question(image, description)) not in asked
        ]
        cosines = judge.similarities(examples, pairs) if pairs else np.empty(0)
        cosines = np.sort(cosines[~np.isnan(cosines)])[::-1]
        passing = math.floor(false_positives * len(cosines))
        if passing < 1:
            raise ValueError(
                f"{len(cosines)} permuted pairs cannot tell a rate of "
                f"{false_positives}; it takes {math.ceil(1 / false_positives)} pairs "
                "or more: give more pictures, or a higher rate"
            )
        # Just above the first that must not pass, so that its ties do not pass either.
        threshold = float(np.nextafter(cosines[passing], np.inf))
        if threshold > 1 - _ROUNDING:
            raise ValueError(
                f"more than {false_positives} of the permuted pairs have a cosine of "
                f"1, so no threshold lets fewer pass; does {judge.name} give every "
                "text the same vector?"
            )
        judge.threshold = threshold
        judge.false_positives = false_positives
        return judge

    @property
    def name(self) -> str:
        """The text model's."""
        return self._name

    def settings(self) -> dict[str, Any]:
        """Its model and its threshold."""
        return {
            "name": self.name,
            "threshold": self.threshold,
            "false_positives": self.false_positives,
        }

    def ask(
        self, examples: Mapping[str, Example], questions: Sequence[Question]
    ) -> list[bool | None]:
        """Whether each description is similar enough to what is said of its picture.

        Raises:
            ValueError: No picture at all has a text to compare with, or the text model
                gave something else than a vector for each text.
        """
        return [
            None if np.isnan(cosine) else bool(cosine >= self.threshold)
            for cosine in self.similarities(examples, questions)
        ]

    def similarities(
        self, examples: Mapping[str, Example], questions: Sequence[Question]
    ) -> Float[np.ndarray, " question"]:
        """The cosine of each description and its picture's text; NaN without text."""
        said = [self._text(example_of(examples, q)) for q in questions]
        texts = [words if words and words.strip() else None for words in said]
        if questions and not any(texts):
            raise ValueError(
                "none of the pictures asked about has a caption to compare "
                "descriptions with; give examples with captions, or text=, a function "
                "from an example to what is said of it"
            )
        meanings = (q.description for q in questions)
        self._learn(chain((text for text in texts if text), meanings))
        cosines = np.full(len(questions), np.nan)
        there = [i for i, text in enumerate(texts) if text]
        for start in range(0, len(there), _BLOCK):
            block = there[start : start + _BLOCK]
            said_of = np.stack([self._vectors[texts[i] or ""] for i in block])
            meant = np.stack([self._vectors[questions[i].description] for i in block])
            cosines[block] = np.einsum("ij,ij->i", said_of, meant)
        return cosines.clip(-1, 1)

    def _learn(self, texts: Iterable[str]) -> None:
        """Embeds what was not embedded before, each text once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if not new:
            return
        vectors = np.asarray(self._embed(new), dtype=np.float64)
        if vectors.ndim != 2 or len(vectors) != len(new):
            raise ValueError(
                f"{self._name} gave an array of shape {vectors.shape} for {len(new)} "
                "texts; expected one vector a text: (text, width)"
            )
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            bad = new[int(np.argmin((np.isfinite(norms) & (norms > 0))[:, 0]))]
            raise ValueError(
                f"{self._name} gave a zero or infinite vector for {bad!r}; a cosine "
                "needs vectors of finite length"
            )
        self._vectors.update(zip(new, vectors / norms, strict=True))


def _name_of(embed: Embed) -> str:
    return getattr(embed, "__name__", type(embed).__name__)


def _load(name: str) -> Embed:
    """The encoder of a sentence-transformers model."""
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore
    except ImportError as error:
        raise ImportError(
            f"the text model {name!r} needs sentence-transformers: "
            "pip install 'vlm_probe[judge]', or give a function from a list of texts "
            "to vectors"
        ) from error
    return SentenceTransformer(name).encode
