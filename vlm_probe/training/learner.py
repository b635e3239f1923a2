"""The adapter while it is learned, and the plain one that comes of it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_probe.adapter import Adapter, LinearAdapter, MlpAdapter
from vlm_probe.training.settings import AdapterTraining

_FLOOR = 1e-4
"""Least variance of a direction, as a share of the largest: what has next to none
would be blown up to noise."""


class Learner(nn.Module):
    """An adapter behind a fixed map of patch tokens, which is folded in at the end."""

    def __init__(self, d_vision: int, d_model: int, settings: AdapterTraining) -> None:
        """Makes an untrained one, the same for the same seed.

        Args:
            d_vision: Width of patch tokens.
            d_model: Width of the language model.
            settings: Kind, width between maps, and seed.
        """
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.adapter: Adapter = (
                LinearAdapter(d_vision, d_model)
                if settings.kind == "linear"
                else MlpAdapter(d_vision, d_model, d_hidden=settings.d_hidden)
            )
        self.mean = nn.Buffer(torch.zeros(d_vision))
        self.whiten = nn.Buffer(torch.eye(d_vision))

    def calibrate(
        self, patches: Float[Tensor, "token d_vision"], norm: float, *, whiten: bool
    ) -> None:
        """Fits the fixed map, and scales what comes out to a mean norm.

        Args:
            patches: Patch tokens of some pictures.
            norm: Mean norm that image vectors are to have before training, that of
                words at the place where they enter.
            whiten: Whether directions are brought to unit variance.
        """
        with torch.no_grad():
            if whiten:
                exact = patches.double().cpu()
                variance, axes = torch.linalg.eigh(torch.cov(exact.T))
                scale = variance.clamp(min=float(variance.max()) * _FLOOR).rsqrt()
                self.mean.copy_(exact.mean(0))
                self.whiten.copy_((axes * scale).T)
            last = [m for m in self.adapter.modules() if isinstance(m, nn.Linear)][-1]
            last.bias.zero_()
            last.weight.mul_(norm / self(patches).norm(dim=-1).mean())

    def forward(
        self, patches: Float[Tensor, "*image patch d_vision"]
    ) -> Float[Tensor, "*image patch d_model"]:
        """Image vectors."""
        return self.adapter((patches.to(self.mean) - self.mean) @ self.whiten.T)

    def folded(self, manifest: dict) -> Adapter:
        """The adapter of plain patch tokens that does the same, frozen."""
        state = {k: v.detach().clone() for k, v in self.adapter.state_dict().items()}
        weight, bias, *_ = state  # of the first map
        folded = state[weight].double() @ self.whiten.double()
        state[bias] = state[bias].double() - folded @ self.mean.double()
        state[weight] = folded
        d_vision, d_model = self.adapter.d_vision, self.adapter.d_model
        adapter = (
            MlpAdapter(d_vision, d_model, d_hidden=len(folded), manifest=manifest)
            if isinstance(self.adapter, MlpAdapter)
            else LinearAdapter(d_vision, d_model, manifest=manifest)
        )
        adapter.load_state_dict(state)
        return adapter.to(self.mean.device).eval().requires_grad_(False)
