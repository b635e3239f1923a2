"""Short labels of features from the words that they fire at most.

For SAEs that nobody has described. The language model reads texts without pictures,
and of each feature the few strongest activations are kept, nothing else. A label names
words and shows one place, `red · blue (in: "a large [red] circle")`; it says what a
feature responds to in these texts, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from vlm_probe.analysis.descriptions.interface import Descriptions, check_features
from vlm_probe.analysis.descriptions.reading import FIRING, strongest_on, token_ids
from vlm_probe.model import VisionLanguageModel
from vlm_probe.saes import outlines
from vlm_probe.tokens import ranges


class TextLabels(Descriptions):
    """Labels made from the strongest activations on some texts."""

    def __init__(
        self,
        firings: dict[int, np.ndarray],
        widths: dict[int, int],
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        top_tokens: int = 3,
        context: int = 8,
        name: str = "labels from texts",
    ) -> None:
        """Takes what was measured; see `label_from_texts`, which measures it.

        Args:
            firings: By layer, the rows of `Strongest`.
            widths: By layer, the number of features.
            texts: What was read.
            tokenizer: That of the language model.
            top_tokens: Words in a label, at most.
            context: Tokens shown on either side of the strongest one.
            name: Where the labels come from.
        """
        self.name = name
        self._firings, self._widths = firings, widths
        self._tokenizer = tokenizer
        self._top_tokens, self._context = top_tokens, context
        self._ids = lru_cache(256)(lambda text: token_ids(tokenizer, texts[text]))

    def of(self, layer: int, features: Sequence[int]) -> dict[int, str | None]:
        """See `Descriptions.of`; None for features that fired nowhere in the texts."""
        if layer not in self._firings:
            return dict.fromkeys(int(f) for f in features)
        asked = check_features(layer, features, self._widths[layer])
        rows = self._firings[layer]
        starts, stops = (
            np.searchsorted(rows["feature"], asked, side) for side in ("left", "right")
        )
        return {
            feature: self._label(rows[start:stop]) if stop > start else None
            for feature, start, stop in zip(asked, starts, stops, strict=True)
        }

    def layers(self) -> tuple[int, ...]:
        """The layers that were read."""
        return tuple(self._firings)

    def described(self, layer: int) -> tuple[int, ...]:
        """The features that fired, in order."""
        rows = self._firings.get(layer, np.zeros(0, FIRING))
        return tuple(np.unique(rows["feature"]).tolist())

    def _label(self, rows: np.ndarray) -> str:
        """Words by the sum of what is kept of them, and the strongest place."""
        sums: dict[str, float] = {}
        shown: dict[str, str] = {}
        for row in rows:
            word = self._word(int(row["word"]))
            # Red and red are one word; the form that fired most is shown.
            key = word.casefold()
            shown.setdefault(key, word)
            sums[key] = sums.get(key, 0.0) + float(row["value"])
        # Sorting keeps the order of equal ones: that with the strongest token first.
        top = sorted(sums, key=lambda key: -sums[key])[: self._top_tokens]
        words = " · ".join(shown[key] for key in top)
        place = self._place(int(rows["text"][0]), int(rows["position"][0]))
        return f'{words} (in: "{place}")'

    def _word(self, token: int) -> str:
        return _visible(_decode(self._tokenizer, [token]))

    def _place(self, text: int, position: int) -> str:
        ids = self._ids(text)
        start = max(0, position - self._context)
        before = _decode(self._tokenizer, ids[start:position])
        until = _decode(self._tokenizer, ids[start : position + 1])
        stop = position + 1 + self._context
        whole = _decode(self._tokenizer, ids[start:stop])
        if not (until.startswith(before) and whole.startswith(until)):
            # Pieces of one letter, which show only together.
            before, until = "", _decode(self._tokenizer, [ids[position]])
            whole = until
        word = until[len(before) :]
        space = " " if word[:1].isspace() and before else ""
        marked = f"{before}{space}[{_visible(word)}]{whole[len(until) :]}"
        return " ".join(marked.split())


def label_from_texts(
    model: VisionLanguageModel,
    texts: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    top_tokens: int = 3,
    context: int = 8,
    keep: int = 20,
    batch_size: int = 16,
) -> TextLabels:
    """Labels every feature that fires on some texts.

    How texts are read, and which of their tokens count: see `strongest_on`.

    Args:
        model: With its SAEs; pictures are not needed.
        texts: What is read; the model's reference texts if not given.
        layers: Which are labeled; all that have an SAE if not given.
        top_tokens: Words in a label, at most.
        context: Tokens shown on either side of the strongest one.
        keep: Activations kept of each feature, the strongest; a word's weight is the
            sum of those of its activations that are among them. What is kept takes 20
            bytes for each of these.
        batch_size: Texts that are read at once.

    Raises:
        ValueError: No text, a number below 1, or a layer without SAE.
    """
    texts = tuple(model.reference_texts if texts is None else texts)
    layers = tuple(sorted(set(model.saes if layers is None else layers)))
    least = {"top_tokens": top_tokens, "keep": keep, "batch_size": batch_size}
    for what, number in least.items():
        if number < 1:
            raise ValueError(f"{what} is {number}, expected 1 or more")
    if context < 0:
        raise ValueError(f"context is {context}, expected 0 or more")
    lacking = sorted(set(layers) - set(model.saes))
    if lacking or not layers:
        raise ValueError(
            f"no SAE for layers {ranges(lacking) or '(none given)'}; the model has "
            f"SAEs for {ranges(model.saes)}"
        )
    if not any(text.strip() for text in texts):
        raise ValueError("no text to read; give some as texts=")
    told = outlines(model.saes)
    return TextLabels(
        strongest_on(model, texts, layers, keep=keep, batch_size=batch_size),
        {layer: told[layer].n_features for layer in layers},
        texts,
        model.language.tokenizer,
        top_tokens=top_tokens,
        context=context,
        name=f"labels of {model.name} from {len(texts)} texts",
    )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    # Cleaning up spaces would make what comes later change what came before.
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _visible(word: str) -> str:
    """A word without the spaces around it; of nothing but space, its escapes."""
    return word.strip() or word.encode("unicode_escape").decode().replace(" ", "␣")
