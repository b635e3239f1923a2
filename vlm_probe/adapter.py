"""Patch tokens become input vectors of the language model."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm_probe.weights import beside, floating, json_object, read_json, read_weights


class Adapter(nn.Module):
    """A map of each patch token by itself, by one linear layer or more.

    Its `manifest` says what it is and how it came to be, in JSON: `kind`, `d_vision`
    and `d_model` always; `vision` and `vision_block`, the vision model and the block
    whose tokens it takes; `language`, the language model it speaks to;
    `inject_layer`, if its vectors do not enter before the first block; and how it was
    trained, from `train_adapter` its `stages`. What is not known is left out.
    """

    kind = "adapter"

    def __init__(self, layers: list[nn.Linear], manifest: Mapping | None) -> None:
        super().__init__()
        self.d_vision = layers[0].in_features
        self.d_model = layers[-1].out_features
        widths = {"d_vision": self.d_vision, "d_model": self.d_model}
        self.manifest = {**(manifest or {}), "kind": self.kind, **widths}

    @property
    def inject_layer(self) -> int:
        """Before which block of the language model its vectors enter, from 0."""
        return self.manifest.get("inject_layer", 0)

    def forward(
        self, patches: Float[Tensor, "*image patch d_vision"]
    ) -> Float[Tensor, "*image patch d_model"]:
        """Maps each patch token, on the adapter's device and in its dtype."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Writes weights and manifest to one safetensors file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
        save_file(tensors, path, metadata={"manifest": json.dumps(self.manifest)})


class LinearAdapter(Adapter):
    """One affine map from patch tokens to the language model's input space."""

    kind = "linear"

    def __init__(
        self, d_vision: int, d_model: int, *, manifest: Mapping | None = None
    ) -> None:
        """Makes an untrained adapter.

        Args:
            d_vision: Width of patch tokens.
            d_model: Width of the language model.
            manifest: How it came to be, JSON only; saved beside the weights.
        """
        linear = nn.Linear(d_vision, d_model)
        super().__init__([linear], manifest)
        self.linear = linear

    def forward(
        self, patches: Float[Tensor, "*image patch d_vision"]
    ) -> Float[Tensor, "*image patch d_model"]:
        """Maps each patch token, on the adapter's device and in its dtype."""
        return self.linear(patches.to(self.linear.weight))

    @classmethod
    def load(cls, path: str | Path) -> LinearAdapter:
        """Reads a linear adapter of any format that `load_adapter` knows.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file holds no linear adapter; says what it holds.
        """
        adapter = load_adapter(path)
        if not isinstance(adapter, cls):
            raise ValueError(
                f"{path} holds an adapter of kind {adapter.kind!r}, expected 'linear'; "
                "load_adapter reads it"
            )
        return adapter


class MlpAdapter(Adapter):
    """Two affine maps with a GELU between them, as LLaVA's `mlp2x_gelu`."""

    kind = "mlp2x_gelu"

    def __init__(
        self,
        d_vision: int,
        d_model: int,
        *,
        d_hidden: int | None = None,
        manifest: Mapping | None = None,
    ) -> None:
        """Makes an untrained adapter.

        Args:
            d_vision: Width of patch tokens.
            d_model: Width of the language model.
            d_hidden: Width between the maps; `d_model` if not given, as LLaVA's.
            manifest: How it came to be, JSON only; saved beside the weights.
        """
        first = nn.Linear(d_vision, d_hidden or d_model)
        second = nn.Linear(d_hidden or d_model, d_model)
        super().__init__([first, second], manifest)
        self.layers = nn.Sequential(first, nn.GELU(), second)

    def forward(
        self, patches: Float[Tensor, "*image patch d_vision"]
    ) -> Float[Tensor, "*image patch d_model"]:
        """Maps each patch token, on the adapter's device and in its dtype."""
        return self.layers(patches.to(self.layers[0].weight))


def load_adapter(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Adapter:
    """Reads an adapter from a file, frozen.

    Three formats are known by the names of their tensors, whatever prefix these share,
    as safetensors or as `torch.save` writes them: our own; the projector of the
    paper's code (`weight`, `bias`); LLaVA's `mm_projector.bin`, linear or
    `mlp2x_gelu`. Of LLaVA's, the `config.json` beside it goes into the manifest.

    Args:
        path: The file.
        device: Where it computes.
        dtype: What it computes in: "float32", "bfloat16", "float16" or "float64".

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds another kind of adapter, or none; is damaged; or is
            a pickle that wants to run code.

    Warns:
        UserWarning: There are other tensors beside the adapter's in the file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no adapter at {file}{beside(file)}")
    state, metadata = read_weights(file)
    manifest = json_object(
        metadata.get("manifest", "{}"), f"the manifest in {file}"
    ) or _llava_manifest(file)
    state = _bare(_projector(state, file))
    for layers in _LAYOUTS:
        if set(state) == {f"{layer}{end}" for layer in layers for end in _ENDS}:
            maps = [[state[f"{layer}{end}"] for end in _ENDS] for layer in layers]
            break
    else:
        raise ValueError(_refusal(file, state))
    shapes = [(tuple(weight.shape), tuple(bias.shape)) for weight, bias in maps]
    widths = [shape[::-1] for shape, _ in shapes]
    if any(len(shape) != 2 or shape[:1] != bias for shape, bias in shapes) or (
        len(shapes) == 2 and widths[0][1] != widths[1][0]
    ):
        raise ValueError(_refusal(file, state))
    (d_vision, d_hidden), d_model = widths[0], widths[-1][1]
    adapter = (
        LinearAdapter(d_vision, d_model, manifest=manifest)
        if len(maps) == 1
        else MlpAdapter(d_vision, d_model, d_hidden=d_hidden, manifest=manifest)
    )
    adapter.to(device, floating(dtype)).eval().requires_grad_(False)
    tensors = [tensor for pair in maps for tensor in pair]
    # Modules keep their tensors in this order: weight and bias of each map.
    adapter.load_state_dict(dict(zip(adapter.state_dict(), tensors, strict=True)))
    return adapter


_ENDS = ("weight", "bias")
_LAYOUTS = (("",), ("0.", "2."), ("linear_1.", "linear_2."))
"""Names of the maps: one; two as LLaVA's; two as Hugging Face writes LLaVA's."""
_PROJECTORS = ("mm_projector", "multi_modal_projector")


def _projector(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors of LLaVA's projector, where there are others beside them."""
    chosen = {k: v for k, v in state.items() if set(k.split(".")) & set(_PROJECTORS)}
    left = sorted(state.keys() - chosen.keys())
    if chosen and left:
        warnings.warn(
            f"{file} holds more than the adapter; left out: {', '.join(left[:5])}"
            f"{' and others' if len(left) > 5 else ''}. A model that was trained with "
            "them needs them",
            stacklevel=3,
        )
    return chosen or state


def _bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names without the prefix that all of them share."""
    while len({name.partition(".")[0] for name in state}) == 1 and all(
        "." in name for name in state
    ):
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return state


def _llava_manifest(file: Path) -> dict:
    """What LLaVA's config beside a projector says of it."""
    config = file.parent / "config.json"
    about = read_json(config) if config.is_file() else {}
    if "mm_vision_tower" not in about:
        return {}
    found = {"vision": about["mm_vision_tower"], "language": about.get("_name_or_path")}
    index = about.get("mm_vision_select_layer")
    if index:
        # Hugging Face counts the embedding as hidden state 0.
        found["vision_block"] = index - 1 if index > 0 else index
    return {key: value for key, value in found.items() if value is not None}


def _refusal(file: Path, state: dict[str, Tensor]) -> str:
    shapes = {name: tuple(state[name].shape) for name in sorted(state)}
    shown = dict(list(shapes.items())[:8])
    more = f" and {len(shapes) - len(shown)} more" if len(shapes) > len(shown) else ""
    return (
        f"{file} holds {_kind(shapes)}, {shown}{more}; a linear adapter has weight of "
        "shape (d_model, d_vision) and bias of shape (d_model,), LLaVA's mlp2x_gelu "
        "has 0.weight, 0.bias, 2.weight and 2.bias, and no other kind can be read"
    )


def _kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What an adapter that cannot be read looks like."""
    maps = [name for name in shapes if re.fullmatch(r"\d+\.weight", name)]
    if len(maps) > 2 and all(len(shapes[name]) == 2 for name in maps):
        return f"a perceptron of {len(maps)} layers (mlp{len(maps)}x_gelu)"
    if any(re.search("quer|attn|attention|latent", name) for name in shapes):
        return "a resampler, which attends from learned queries"
    if any(len(shape) == 4 for shape in shapes.values()):
        return "a convolutional projector"
    return "tensors of no kind that is known"
