"""The exact sparse codes of one autoencoder, and what they decode to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor


@dataclass(frozen=True)
class SparseCodes:
    """The non-zero features of some tokens, ordered by token, then feature."""

    token: Int[np.ndarray, " active"]
    """Index of the token."""
    feature: Int[np.ndarray, " active"]
    """Index of the feature."""
    value: Float[np.ndarray, " active"]
    """Activation of the feature at the token; never zero."""
    n_tokens: int
    """How many tokens were coded."""
    n_features: int
    """Width of the autoencoder."""

    def l0(self) -> Int[np.ndarray, " token"]:
        """How many features are non-zero at each token."""
        return np.bincount(self.token, minlength=self.n_tokens)


@dataclass(frozen=True)
class Peaks:
    """Where in each unit each of its features is strongest."""

    unit: Int[np.ndarray, " peak"]
    feature: Int[np.ndarray, " peak"]
    token: Int[np.ndarray, " peak"]
    """The first token at which the unit reaches `value`."""
    value: Float[np.ndarray, " peak"]

    def strongest(self, k: int) -> Peaks:
        """The k strongest features of each unit, strongest first; fewer if fewer fire.

        Equal values are ordered by feature.
        """
        order = np.lexsort((self.feature, -self.value, self.unit))
        unit = self.unit[order]
        rank = np.arange(len(unit)) - np.searchsorted(unit, unit)
        kept = order[rank < k]
        return Peaks(
            self.unit[kept], self.feature[kept], self.token[kept], self.value[kept]
        )


def code(
    sae: SAE, x: Float[Tensor, "token d_model"]
) -> tuple[SparseCodes, Float[Tensor, "token d_model"]]:
    """Codes tokens and decodes them again, with sae-lens' own `encode` and `decode`.

    The two are called back to back, since sae-lens keeps the statistics of stateful
    normalizations from one to the other.

    Args:
        sae: The autoencoder.
        x: Activations of the hook point that the autoencoder was trained on.

    Returns:
        The codes, and the reconstruction in the autoencoder's dtype.
    """
    with torch.no_grad():
        dense = sae.encode(x)
        decoded = sae.decode(dense)
    token, feature = dense.nonzero(as_tuple=True)
    value = dense[token, feature].float()
    codes = SparseCodes(
        token.cpu().numpy(),
        feature.cpu().numpy(),
        value.cpu().numpy(),
        len(x),
        dense.shape[1],
    )
    return codes, decoded


def peaks(codes: SparseCodes, unit: Int[np.ndarray, " token"]) -> Peaks:
    """The largest value of each feature in each unit, and where it is.

    Args:
        codes: Codes of the tokens of several units.
        unit: For each token, the unit it belongs to.
    """
    owner = unit[codes.token]
    key = owner.astype(np.int64) * codes.n_features + codes.feature
    # Largest value first; unique then keeps the first of each (unit, feature).
    order = np.lexsort((codes.token, -codes.value))
    _, first = np.unique(key[order], return_index=True)
    best = order[first]
    return Peaks(owner[best], codes.feature[best], codes.token[best], codes.value[best])


class FeatureSums:
    """How often and how strongly each feature fires in one layer, group, condition."""

    def __init__(self, n_features: int) -> None:
        """Starts with no feature having fired."""
        self.n_tokens = np.zeros(n_features, np.int64)
        self.n_images = np.zeros(n_features, np.int64)
        self.total = np.zeros(n_features)
        self.peak = np.zeros(n_features)
        self.seen = 0

    def add(self, codes: SparseCodes, peaks: Peaks) -> None:
        """Adds the codes of some whole images, and their `peaks`."""
        width = len(self.total)
        self.n_tokens += np.bincount(codes.feature, minlength=width)
        self.n_images += np.bincount(peaks.feature, minlength=width)
        self.total += np.bincount(codes.feature, codes.value, minlength=width)
        np.maximum.at(self.peak, peaks.feature, peaks.value)
        self.seen += codes.n_tokens

    def columns(self) -> dict[str, np.ndarray]:
        """One entry per feature that fired.

        `feature`; `n_tokens` and `n_images` it fired in; `rate`, the share of the
        group's tokens; `mean` of its value where it fired; `max`.
        """
        fired = np.flatnonzero(self.n_tokens)
        n = self.n_tokens[fired]
        return {
            "feature": fired,
            "n_tokens": n,
            "n_images": self.n_images[fired],
            "rate": n / self.seen,
            "mean": self.total[fired] / n,
            "max": self.peak[fired],
        }
