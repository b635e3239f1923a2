"""Which features fire at which tokens, and what is added up of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SparseCodes:
    """The non-zero features of some tokens, ordered by token, then feature."""

    token: Int[Tensor, " active"]
    """Index of the token."""
    feature: Int[Tensor, " active"]
    """Index of the feature."""
    value: Float[Tensor, " active"]
    """Activation of the feature at the token; never zero."""
    n_tokens: int
    """How many tokens were coded."""
    n_features: int
    """Width of the autoencoder."""
    n_close: int = 0
    """Of screened codes, how many pairs of token and feature lie so near to the
    threshold that rounding in float32 decides whether they are active."""

    def l0(self) -> Int[Tensor, " token"]:
        """How many features are non-zero at each token."""
        return torch.bincount(self.token, minlength=self.n_tokens)

    def part(self, first: int, stop: int) -> SparseCodes:
        """The codes of a run of tokens, counted from its first."""
        begin, end = torch.searchsorted(
            self.token, torch.tensor([first, stop], device=self.token.device)
        ).tolist()
        return SparseCodes(
            self.token[begin:end] - first,
            self.feature[begin:end],
            self.value[begin:end],
            stop - first,
            self.n_features,
        )

    def then(self, other: SparseCodes) -> SparseCodes:
        """These codes, and behind them those of other tokens."""
        return SparseCodes(
            torch.cat([self.token, other.token + self.n_tokens]),
            torch.cat([self.feature, other.feature]),
            torch.cat([self.value, other.value]),
            self.n_tokens + other.n_tokens,
            self.n_features,
        )


def peak_table(
    codes: SparseCodes, unit: Int[Tensor, " token"], n_units: int
) -> Float[Tensor, "unit feature"]:
    """The largest value of each feature in each unit; minus infinity where silent.

    Args:
        codes: Codes of the tokens of several units.
        unit: For each token, the unit it belongs to.
        n_units: How many units there are.
    """
    table = codes.value.new_full((n_units, codes.n_features), -torch.inf)
    key = unit[codes.token] * codes.n_features + codes.feature
    table.view(-1).scatter_reduce_(0, key, codes.value, "amax")
    return table


@dataclass(frozen=True)
class Peaks:
    """The strongest features of each unit, and where they are; strongest first."""

    unit: Int[np.ndarray, " peak"]
    rank: Int[np.ndarray, " peak"]
    """From 1, in each unit."""
    feature: Int[np.ndarray, " peak"]
    token: Int[np.ndarray, " peak"]
    """The first token at which the unit reaches `value`."""
    value: Float[np.ndarray, " peak"]
    score: Float[np.ndarray, " peak"]
    """What they are ordered by."""


def strongest(
    codes: SparseCodes,
    unit: Int[Tensor, " token"],
    table: Float[Tensor, "unit feature"],
    k: int,
    weight: Float[Tensor, " feature"] | None = None,
) -> Peaks:
    """The k strongest features of each unit; fewer if fewer fire.

    Equal scores are ordered by feature.

    Args:
        codes: Codes of the tokens of several units.
        unit: For each token, the unit it belongs to.
        table: Their `peak_table`.
        k: How many features.
        weight: What a feature's value is multiplied by to give its score, never below
            zero; the score is the value if None.
    """
    k = min(k, codes.n_features)
    if k == 0:
        nothing, none = np.zeros(0, np.int64), np.zeros(0, np.float32)
        return Peaks(nothing, nothing, nothing, nothing, none, none)
    active = table > -torch.inf
    # Minus infinity times a weight of zero would be no number.
    score = table if weight is None else (table * weight).where(active, -torch.inf)
    # More than k of a unit where scores tie, and no silent ones.
    least = score.topk(k, dim=1).values[:, -1:]
    chosen = (score >= least) & active
    owner = unit[codes.token]
    key = owner * codes.n_features + codes.feature
    here = chosen.view(-1)[key] & (table.view(-1)[key] == codes.value)
    u, f, t, v, s = (
        part[here].cpu().numpy()
        for part in (
            owner,
            codes.feature,
            codes.token,
            codes.value,
            score.view(-1)[key],
        )
    )
    order = np.lexsort((t, f, -s, u))
    u, f, t, v, s = u[order], f[order], t[order], v[order], s[order]
    repeated = (u[1:] == u[:-1]) & (f[1:] == f[:-1])
    first = np.concatenate([[True], ~repeated])[: len(u)]
    u, f, t, v, s = u[first], f[first], t[first], v[first], s[first]
    rank = np.arange(len(u)) - np.searchsorted(u, u) + 1
    kept = rank <= k
    return Peaks(u[kept], rank[kept], f[kept], t[kept], v[kept], s[kept])


class FeatureSums:
    """How often and how strongly each feature fires in one layer, group, condition."""

    def __init__(self, n_features: int, device: str | torch.device = "cpu") -> None:
        """Starts with no feature having fired."""
        whole = {"dtype": torch.int64, "device": device}
        real = {"dtype": torch.float64, "device": device}
        self.n_tokens = torch.zeros(n_features, **whole)
        self.n_images = torch.zeros(n_features, **whole)
        self.total = torch.zeros(n_features, **real)
        self.peak = torch.full((n_features,), -torch.inf, **real)
        self.seen = torch.zeros(1, **whole)

    def add(self, codes: SparseCodes, table: Float[Tensor, "unit feature"]) -> None:
        """Adds the codes of some whole images, and their `peak_table`."""
        width = len(self.total)
        self.n_tokens += torch.bincount(codes.feature, minlength=width)
        self.n_images += (table > -torch.inf).sum(0)
        self.total += torch.bincount(codes.feature, codes.value.double(), width)
        self.peak = torch.maximum(self.peak, table.amax(0).double())
        self.seen += codes.n_tokens

    def merge(self, other: FeatureSums) -> None:
        """Adds the sums of other images."""
        self.n_tokens += other.n_tokens
        self.n_images += other.n_images
        self.total += other.total
        self.peak = torch.maximum(self.peak, other.peak)
        self.seen += other.seen

    def state(self) -> dict[str, Tensor]:
        """Everything in it, by name."""
        return dict(vars(self))

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave."""
        for name, tensor in state.items():
            setattr(self, name, tensor.to(getattr(self, name).device))

    def columns(self) -> dict[str, np.ndarray]:
        """One entry per feature that fired.

        `feature`; `n_tokens` and `n_images` it fired in; `rate`, the share of the
        group's tokens; `mean` of its value where it fired; `max`.
        """
        tokens, images, total, peak, seen = (
            tensor.cpu().numpy() for tensor in self.state().values()
        )
        fired = np.flatnonzero(tokens)
        n = tokens[fired]
        return {
            "feature": fired,
            "n_tokens": n,
            "n_images": images[fired],
            "rate": n / seen,
            "mean": total[fired] / n,
            "max": peak[fired],
        }
