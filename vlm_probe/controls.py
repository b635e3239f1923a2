"""What a curve must beat: image vectors that know nothing of the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_probe.adapter import LinearAdapter

Map = Callable[[Tensor], Tensor]


def random_adapter(
    adapter: nn.Module, patches: Float[Tensor, "token d_vision"], seed: int
) -> Map:
    """An untrained adapter whose outputs have the trained one's mean and covariance.

    Patch tokens are whitened, rotated at random and unwhitened before they enter the
    trained map W. With patch covariance S and a random rotation R, the outputs' are
    W S½ R (W S½ R)' = W S W', unchanged; and since W S½ R is distributed like any
    other random map of that covariance, this is a fresh untrained adapter, not a
    disturbed trained one. That is exact for linear adapters; of any other, the vectors
    that come out are rotated in the same way, which keeps their mean and covariance.

    Args:
        adapter: The trained adapter.
        patches: Patch tokens of some pictures; more of them than d_vision, or of
            another adapter's d_model.
        seed: Of the rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(adapter, LinearAdapter):
        turn = _rotation(patches, generator)
        return lambda tokens: adapter(turn(tokens))
    with torch.no_grad():
        turn = _rotation(adapter(patches), generator)
    return lambda tokens: turn(adapter(tokens))


def _rotation(x: Float[Tensor, "token d"], generator: torch.Generator) -> Map:
    """Whitens, rotates at random and unwhitens: mean and covariance stay."""
    x = x.double().cpu()
    mean = x.mean(0)
    variance, axes = torch.linalg.eigh(torch.cov(x.T, correction=0))
    # Directions without variance are left out: every token has the mean there.
    kept = variance > variance.max() * 1e-9
    axes, deviation = axes[:, kept], variance[kept].sqrt()
    square = torch.randn(
        len(deviation), len(deviation), generator=generator, dtype=torch.float64
    )
    rotation, triangular = torch.linalg.qr(square)
    rotation *= triangular.diagonal().sign()  # uniform over rotations (Mezzadri 2007)
    turn = (axes / deviation) @ rotation @ (axes * deviation).T

    def turned(tokens: Tensor) -> Tensor:
        centered = tokens.double() - mean.to(tokens.device)
        return (centered @ turn.to(tokens.device) + mean.to(tokens.device)).to(tokens)

    return turned


def noise(
    vectors: Float[Tensor, "image patch d_model"], units: Sequence[int], seed: int
) -> Float[Tensor, "image patch d_model"]:
    """Gaussian noise with each vector's own norm.

    Args:
        vectors: The adapter's vectors.
        units: Each picture's index in the run, which its noise depends on, so that
            batches of any size get the same.
        seed: Of the run.
    """
    drawn = []
    for unit in units:
        rng = np.random.default_rng([seed, unit])
        drawn.append(torch.from_numpy(rng.standard_normal(tuple(vectors.shape[1:]))))
    directions = torch.nn.functional.normalize(torch.stack(drawn), dim=-1)
    return directions.to(vectors) * vectors.norm(dim=-1, keepdim=True)


def previous_image(
    vectors: Float[Tensor, "image patch d_model"],
    before: Float[Tensor, "patch d_model"],
) -> Float[Tensor, "image patch d_model"]:
    """Each picture with the vectors of the one before it.

    Args:
        vectors: Vectors of a batch.
        before: Vectors of the picture before the first.
    """
    return torch.cat([before[None], vectors[:-1]])
