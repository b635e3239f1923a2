"""What a layer's autoencoder makes of its tokens, as sums that add up exactly.

A bootstrap over images redraws images with replacement. Here each image gets, once
and for all, a Poisson(1) count for every redrawing (Hanley & MacGibbon 2006; Chamandy
et al. 2012), so every redrawing is a sum like the estimate itself: images can come in
any order and batches of any size, nothing of an image is kept, and sums of two
machines are added. Index 0 of the axis `replicate` is the estimate, weight 1 each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def bootstrap_weights(
    units: list[int], replicates: int, seed: int
) -> Float[np.ndarray, "replicate unit"]:
    """How often each redrawing of the bootstrap holds each image.

    Args:
        units: Indices of the images in the run; an image has the same weights in every
            batch, layer, group and condition, so that differences can be bounded too.
        replicates: Redrawings.
        seed: Of the redrawings.

    Returns:
        Weights with the estimate's row of ones in front.
    """
    drawn = [np.random.default_rng([seed, u]).poisson(1.0, replicates) for u in units]
    return np.concatenate([np.ones((1, len(units))), np.stack(drawn, 1)], dtype=float)


@dataclass(frozen=True)
class UnitSums:
    """Sums over the tokens of each of some images."""

    counts: Int[np.ndarray, " unit"]
    """Tokens."""
    scalars: Float[Tensor, "unit scalar"]
    """Of what is measured at each token, in float64."""
    vector: Float[Tensor, "unit d_model"]
    """Of the activations, in float64."""

    def after(self, first: UnitSums) -> UnitSums:
        """Each image's sums moved to the next image, and `first` to the first one."""
        return UnitSums(
            np.concatenate([first.counts[:1], self.counts[:-1]]),
            torch.cat([first.scalars[:1], self.scalars[:-1]]),
            torch.cat([first.vector[:1], self.vector[:-1]]),
        )


def unit_sums(
    x: Float[Tensor, "token d_model"],
    x_hat: Float[Tensor, "token d_model"],
    l0: Int[Tensor, " token"],
    unit: Int[np.ndarray, " token"],
    n_units: int,
) -> UnitSums:
    """Sums over the tokens of each image.

    Args:
        x: Activations.
        x_hat: Their reconstructions.
        l0: Non-zero features of each token.
        unit: For each token, the image that it belongs to.
        n_units: How many images there are.
    """
    # A row a unit, one where it has a token: sums over units are a product, which
    # adds in the same order on every run, as scattering on a GPU would not.
    real = {"dtype": torch.float64, "device": x.device}
    belongs = np.arange(n_units)[:, None] == unit
    to_units = torch.as_tensor(belongs, **real)
    x, x_hat = x.to(**real), x_hat.to(**real)
    off = x - x_hat
    error, square, along = (
        torch.linalg.vecdot(a, b) for a, b in ((off, off), (x, x), (x, x_hat))
    )
    norm = square.sqrt()
    lengths = norm * torch.linalg.vector_norm(x_hat, dim=-1)
    per_token = torch.stack(
        [
            torch.ones_like(norm),
            error,
            square,
            error / square,
            along / lengths.clamp(min=1e-300),
            l0.to(**real),
            norm,
        ],
        dim=1,
    )
    counts = np.bincount(unit, minlength=n_units)
    return UnitSums(counts, to_units @ per_token, to_units @ x)


class LayerSums:
    """Sums over the tokens of one layer, group and condition, in float64."""

    def __init__(
        self,
        d_model: int,
        n_features: int,
        replicates: int,
        device: str | torch.device = "cpu",
    ) -> None:
        """Starts empty, for `replicates` redrawings beside the estimate."""
        self.d_model = d_model
        self.n_features = n_features
        self.n_tokens = 0
        self.n_images = 0
        real = {"dtype": torch.float64, "device": device}
        self._scalars = torch.zeros(replicates + 1, len(_SCALARS), **real)
        self._vector = torch.zeros(replicates + 1, d_model, **real)

    def add(
        self,
        x: Float[Tensor, "token d_model"],
        x_hat: Float[Tensor, "token d_model"],
        l0: Int[Tensor, " token"],
        unit: Int[np.ndarray, " token"],
        weights: Float[np.ndarray, "replicate unit"],
        *,
        convention: str = "pooled",
    ) -> None:
        """Adds the tokens of some whole images.

        Args:
            x: Activations.
            x_hat: Their reconstructions.
            l0: Non-zero features of each token.
            unit: For each token, the column of `weights` that it belongs to.
            weights: Of `bootstrap_weights`.
            convention: "pooled" weighs every token alike, "paper" every image.
        """
        self.add_units(
            unit_sums(x, x_hat, l0, unit, weights.shape[1]), weights, convention
        )

    def add_units(
        self,
        units: UnitSums,
        weights: Float[np.ndarray, "replicate unit"],
        convention: str = "pooled",
    ) -> None:
        """Adds some whole images by their `unit_sums`, as `add` does."""
        self.n_tokens += int(units.counts.sum())
        self.n_images += int((units.counts > 0).sum())
        scalars, vector = units.scalars, units.vector
        if convention == "paper":
            # A token weighs one over its image's tokens: means of per-image means.
            share = 1 / torch.from_numpy(units.counts).clamp(min=1).to(scalars)
            scalars, vector = scalars * share[:, None], vector * share[:, None]
        drawn = torch.from_numpy(weights).to(scalars)
        self._scalars.addmm_(drawn, scalars)
        self._vector.addmm_(drawn, vector)

    def merge(self, other: LayerSums) -> None:
        """Adds the sums of other images."""
        if (self.d_model, self.n_features, self._scalars.shape) != (
            other.d_model,
            other.n_features,
            other._scalars.shape,
        ):
            raise ValueError(
                "sums of different shape: "
                f"{self.d_model} x {self.n_features} x {len(self._scalars)} and "
                f"{other.d_model} x {other.n_features} x {len(other._scalars)} "
                "(d_model x features x replicates); merge runs of one setting only"
            )
        self.n_tokens += other.n_tokens
        self.n_images += other.n_images
        self._scalars += other._scalars
        self._vector += other._vector

    def state(self) -> dict[str, Tensor]:
        """Everything that was added, by name."""
        counts = torch.tensor([self.n_tokens, self.n_images])
        return {"counts": counts, "scalars": self._scalars, "vector": self._vector}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave."""
        self.n_tokens, self.n_images = state["counts"].tolist()
        device = self._vector.device
        self._scalars = state["scalars"].to(device)
        self._vector = state["vector"].to(device)

    def replicates(self) -> dict[str, Float[np.ndarray, " replicate"]]:
        """Every metric of `METRICS`, estimate first, then the redrawings.

        A redrawing that holds no image is NaN.
        """
        scalars, vector = (t.cpu().numpy() for t in (self._scalars, self._vector))
        s = dict(zip(_SCALARS, scalars.T, strict=True))
        with np.errstate(invalid="ignore", divide="ignore"):
            n = s["tokens"]
            spread = s["square"] - np.square(vector).sum(1) / n
            return {
                "mse": s["error"] / (n * self.d_model),
                "fvu": s["error"] / spread,
                "nmse": s["nmse"] / n,
                "cosine": s["cosine"] / n,
                "l0": s["l0"] / n,
                "l0_share": s["l0"] / (n * self.n_features),
                "norm": s["norm"] / n,
            }

    def row(self) -> dict[str, int | float]:
        """Every metric with its 95 % bounds, as `name`, `name_low`, `name_high`.

        Bounds are percentiles of the redrawings; NaN for fewer than two images.
        """
        row: dict[str, int | float] = {
            "n_tokens": self.n_tokens,
            "n_images": self.n_images,
        }
        for name, values in self.replicates().items():
            drawn = values[1:][np.isfinite(values[1:])]
            bounded = self.n_images > 1 and len(drawn) > 0
            low, high = np.percentile(drawn, [2.5, 97.5]) if bounded else [np.nan] * 2
            row |= {name: values[0], f"{name}_low": low, f"{name}_high": high}
        return row


_SCALARS = ("tokens", "error", "square", "nmse", "cosine", "l0", "norm")
