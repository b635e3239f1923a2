"""Patch tokens become input vectors of the language model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class LinearAdapter(nn.Module):
    """One affine map from patch tokens to the language model's input space."""

    def __init__(
        self, d_vision: int, d_model: int, *, manifest: dict | None = None
    ) -> None:
        """Makes an untrained adapter.

        Args:
            d_vision: Width of patch tokens.
            d_model: Width of the language model.
            manifest: How it came to be, JSON only; saved beside the weights.
        """
        super().__init__()
        self.linear = nn.Linear(d_vision, d_model)
        self.manifest = dict(manifest or {})

    @property
    def d_vision(self) -> int:
        """Width of the patch tokens that go in."""
        return self.linear.in_features

    @property
    def d_model(self) -> int:
        """Width of the vectors that come out."""
        return self.linear.out_features

    def forward(
        self, patches: Float[Tensor, "*image patch d_vision"]
    ) -> Float[Tensor, "*image patch d_model"]:
        """Maps each patch token."""
        return self.linear(patches.to(self.linear.weight))

    @classmethod
    def standardized(
        cls,
        patches: Float[Tensor, "token d_vision"],
        d_model: int,
        *,
        norm: float,
        seed: int,
    ) -> LinearAdapter:
        """An untrained adapter whose outputs have zero mean and a given norm.

        Args:
            patches: Patch tokens of some pictures; each of their dimensions is brought
                to mean 0 and variance 1 before the random map, within its weights.
            d_model: Width of the language model.
            norm: Root mean square norm of the output vectors.
            seed: Of the random map.
        """
        mean, std = patches.mean(0), patches.std(0).clamp(min=1e-6)
        d_vision = patches.shape[1]
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(d_model, d_vision, generator=generator) / std
        outputs = (patches - mean) @ weight.T
        weight *= norm / outputs.square().sum(-1).mean().sqrt()
        adapter = cls(d_vision, d_model)
        with torch.no_grad():
            adapter.linear.weight.copy_(weight)
            adapter.linear.bias.copy_(-weight @ mean)
        return adapter

    def save(self, path: str | Path) -> None:
        """Writes weights and manifest to one safetensors file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().contiguous() for k, v in self.state_dict().items()}
        save_file(tensors, path, metadata={"manifest": json.dumps(self.manifest)})

    @classmethod
    def load(cls, path: str | Path) -> LinearAdapter:
        """Reads what `save` wrote, frozen.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file holds no linear adapter.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no adapter at {path}")
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != {"linear.weight", "linear.bias"}:
                raise ValueError(
                    f"{path} holds {', '.join(sorted(names))}; a linear adapter has "
                    "linear.weight and linear.bias"
                )
            state = {name: file.get_tensor(name) for name in names}
            manifest = json.loads((file.metadata() or {}).get("manifest", "{}"))
        d_model, d_vision = state["linear.weight"].shape
        adapter = cls(d_vision, d_model, manifest=manifest)
        adapter.load_state_dict(state)
        return adapter.eval().requires_grad_(False)
