"""Patch tokens become input vectors of the language model."""

from __future__ import annotations

import json
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
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
            ValueError: The file holds no linear adapter; says what it holds.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no adapter at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                manifest = json.loads((file.metadata() or {}).get("manifest", "{}"))
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        weight = shapes.get("linear.weight", ())
        if shapes != {"linear.weight": weight, "linear.bias": weight[:1]} or (
            len(weight) != 2
        ):
            raise ValueError(
                f"{path} holds {shapes}; a linear adapter has linear.weight of shape "
                "(d_model, d_vision) and linear.bias of shape (d_model,)"
            )
        d_model, d_vision = weight
        adapter = cls(d_vision, d_model, manifest=manifest)
        adapter.load_state_dict(state)
        return adapter.eval().requires_grad_(False)
