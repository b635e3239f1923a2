"""The strongest activations of each feature on some texts.

The language model reads without pictures, batch by batch, and of each feature a few
activations are kept with their places, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlm_probe.model import VisionLanguageModel
from vlm_probe.saes import encoding_of
from vlm_probe.tokens import Prompt

FIRING = np.dtype(
    [
        ("feature", np.int32),
        ("value", np.float32),
        ("text", np.int32),
        ("position", np.int32),
        ("word", np.int32),
    ]
)
_SORT_AT = 1 << 18
"""How many new activations are gathered before all but the strongest are dropped."""


class Strongest:
    """The k strongest activations of each feature of a layer, so far."""

    def __init__(self, k: int) -> None:
        """Has seen none yet."""
        self._k = k
        self._kept = np.zeros(0, FIRING)
        self._new: list[np.ndarray] = []
        self._n_new = 0

    def add(self, firings: np.ndarray) -> None:
        """Adds activations; of equal ones, the first in reading order is stronger."""
        self._new.append(firings)
        self._n_new += len(firings)
        if self._n_new >= _SORT_AT:
            self.rows()

    def rows(self) -> np.ndarray:
        """Those kept, by feature, and of a feature the strongest first."""
        all_rows = np.concatenate([self._kept, *self._new])
        self._new, self._n_new = [], 0
        order = np.lexsort(
            (
                all_rows["position"],
                all_rows["text"],
                -all_rows["value"],
                all_rows["feature"],
            )
        )
        feature = all_rows["feature"][order]
        rank = np.arange(len(order)) - np.searchsorted(feature, feature)
        self._kept = all_rows[order[rank < self._k]]
        return self._kept


def strongest_on(
    model: VisionLanguageModel,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    keep: int,
    batch_size: int,
) -> dict[int, np.ndarray]:
    """By layer, the rows of `Strongest` on some texts.

    Each text is read plainly behind the beginning-of-text token, no chat around it;
    one that is longer than the model's positions is read in pieces. What counts are
    the text's own tokens, without special ones, and without the first position where
    there is no beginning-of-text token, for it draws attention whatever stands there.
    """
    strongest = {layer: Strongest(keep) for layer in layers}
    encoding = encoding_of(model.saes, "auto")
    for pieces in _batches(model, texts, batch_size):
        _read(model, pieces, strongest, encoding)
    return {layer: strongest[layer].rows() for layer in layers}


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text's own tokens, nothing before or behind them."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


class _Piece:
    """A prompt, and which tokens of which text it holds."""

    def __init__(
        self, prompt: Prompt, text: int, positions: list[int], offset: int
    ) -> None:
        self.prompt, self.text = prompt, text
        self.positions = positions
        self.offset = offset
        """What is taken from a position to give the token's place in its text."""


def _batches(
    model: VisionLanguageModel, texts: Sequence[str], batch_size: int
) -> Iterator[list[_Piece]]:
    chat = model.language.chat
    bos = chat.tokenizer.bos_token_id
    head = () if bos is None else (bos,)
    length = model.language.hooked.cfg.n_ctx - len(head)
    batch: list[_Piece] = []
    for text, words in enumerate(texts):
        ids = token_ids(chat.tokenizer, words)
        for start in range(0, len(ids), length):
            piece = (*head, *ids[start : start + length])
            counted = [p for p in range(1, len(piece)) if piece[p] not in chat.special]
            if not counted:
                continue
            prompt = Prompt(piece, range(0), chat.special)
            batch.append(_Piece(prompt, text, counted, len(head) - start))
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def _read(
    model: VisionLanguageModel,
    pieces: Sequence[_Piece],
    strongest: dict[int, Strongest],
    encoding: str,
) -> None:
    """Codes the tokens of some prompts, and keeps the strongest."""
    places = np.array(
        [
            (row, p, piece.text, p - piece.offset, piece.prompt.ids[p])
            for row, piece in enumerate(pieces)
            for p in piece.positions
        ]
    )
    row, position, text, place, word = places.T
    device = model.language.device
    rows, positions = (
        torch.from_numpy(each.copy()).to(device) for each in (row, position)
    )

    def visit(layer: int, residual: Float[Tensor, "row pos d_model"]) -> None:
        codes, _ = model.saes[layer].code(residual[rows, positions], encoding=encoding)
        token = codes.token.cpu().numpy()
        firings = np.zeros(len(token), FIRING)
        firings["feature"] = codes.feature.cpu().numpy()
        firings["value"] = codes.value.float().cpu().numpy()
        for name, told in (("text", text), ("position", place), ("word", word)):
            firings[name] = told[token]
        # Of a matching pursuit or a TopK of magnitudes, some values are negative.
        strongest[layer].add(firings[firings["value"] > 0])

    model.language.read(
        [piece.prompt for piece in pieces],
        None,
        list(strongest),
        visit,
        hook_point=model.hook_point,
    )
