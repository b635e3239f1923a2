"""What a probe is asked to do, and with which model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_probe.tokens import (
    BACKENDS,
    CONTROLS,
    ENCODINGS,
    GROUPS,
    HOOK_POINTS,
    RANKINGS,
    RESIDENCIES,
    check_names,
)

CONVENTIONS = ("pooled", "paper")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of `probe_layers`; the command line has the same."""

    layers: Sequence[int] | None = None
    """Layers to probe, from 0; all that have an SAE if not given."""
    groups: Sequence[str] = GROUPS
    """Token groups: image, text_after_image, text_only."""
    controls: Sequence[str] = ()
    """Control arms beside the model: random_adapter, noise, shuffled_images."""
    convention: str = "pooled"
    """How tokens are pooled: "pooled" counts every token alike; "paper" takes the mean
    over images of each image's own mean, as arXiv 2506.11976 does."""
    include_special: bool = False
    """Whether chat markers and the like count among the text tokens; the
    beginning-of-text token never does."""
    top_k: int = 8
    """Strongest features kept for each layer, group and image, in features."""
    rank_by: Sequence[str] = ("activation",)
    """What they are the strongest by, each with a ranking of its own: activation, their
    value; selectivity, their value times the logarithm of how seldom they fire on a
    reference, which is measured before the run (`vlm_probe.probe.reference`)."""
    batch_size: int = 8
    """Pictures that go through the models together, in pictures."""
    replicates: int = 400
    """Redrawings of the bootstrap over images behind the 95 % bounds. Memory grows by
    replicates x d_model x 8 bytes for each layer, group and condition."""
    calibration: int = 64
    """Pictures, from the first, whose patch tokens give random_adapter its mean and
    covariance, and selectivity the half of its reference that is of pictures; in
    pictures."""
    encoding: str = "auto"
    """How codes are computed: "dense", from all pre-activations; "screened", from those
    that a bfloat16 product with a proven margin does not rule out; "auto", screened
    where the hardware gains by it. The codes are the same."""
    seed: int = 0
    """Of the bootstrap and the control arms."""

    def __post_init__(self) -> None:
        for name in ("layers", "groups", "controls", "rank_by"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"{name} takes a list of names, given {value!r}")
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))
        check_names("group", self.groups, GROUPS)
        check_names("control", self.controls, CONTROLS)
        check_names("ranking", self.rank_by, RANKINGS)
        check_names("convention", [self.convention], CONVENTIONS)
        check_names("encoding", [self.encoding], ENCODINGS)
        if not self.groups:
            raise ValueError(f"no group given; valid: {', '.join(GROUPS)}")
        if not self.rank_by:
            raise ValueError(f"no ranking given; valid: {', '.join(RANKINGS)}")
        for name, least in (
            ("top_k", 0),
            ("batch_size", 1),
            ("replicates", 0),
            ("calibration", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least}, given {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Parts:
    """Where the parts of a model come from; the command line has the same."""

    language: str | Path | None = None
    """Language model: a hub name such as google/gemma-2-2b-it, or a folder."""
    vision: str | Path | None = None
    """Vision model: an open_clip name with its tag or weight file, such as
    ViT-L-14-quickgelu:openai, an hf-hub: name, or a folder."""
    adapter: str | Path | None = None
    """Adapter: a file of ours, a projector.pth, or LLaVA's mm_projector.bin."""
    saes: str | Path | None = None
    """SAEs: a release of SAELens' list, such as gemma-scope-2b-pt-res-canonical, or a
    folder of SAEs."""
    sae_layers: Sequence[int] | None = None
    """Layers whose SAE is loaded, from 0; all there are if not given."""
    sae_width: str | None = None
    """Which SAEs where there are several widths, in features: 16k, or 16384."""
    sae_l0: float | None = None
    """Which SAEs where there are several sparsities: the nearest to this L0."""
    hook_point: str | None = None
    """Which SAEs where there are several: resid_pre, resid_mid or resid_post."""
    sae_residency: str | None = None
    """Where SAEs are: memory (all of them), streamed (the one in use, and the next read
    ahead), auto (the first if it leaves half of the memory free); auto if not given."""
    vision_block: int | None = None
    """After which block patch tokens are taken: -1 the last, -2 the one before, as
    LLaVA does; what the adapter's file says if not given, else the last."""
    default_prompt: str | None = None
    """What is asked of a picture that comes without a prompt; "Describe the picture."
    if not given."""
    backend: str | None = None
    """How the language model is run: hooked (HookedTransformer), bridge
    (TransformerBridge), auto (the first where that computes the same); auto if not
    given."""
    device: str | None = None
    """Where everything is computed; a GPU if there is one."""
    dtype: str | None = None
    """Of the language model: float32, bfloat16 or float16; float32 if not given.
    Everything else is float32."""
    name: str | None = None
    """For tables; the language model's if not given."""

    def __post_init__(self) -> None:
        for name, valid in (
            ("backend", BACKENDS),
            ("dtype", DTYPES),
            ("hook_point", HOOK_POINTS),
            ("sae_residency", RESIDENCIES),
        ):
            if (given := getattr(self, name)) is not None:
                check_names(name, [given], valid)
        if self.sae_layers is not None:
            layers = tuple(int(layer) for layer in self.sae_layers)
            object.__setattr__(self, "sae_layers", layers)


PRESETS = {
    "paper": Parts(
        language="google/gemma-2-2b-it",
        vision="ViT-L-14-quickgelu:openai",
        saes="gemma-scope-2b-pt-res-canonical",
        sae_width="16k",
        vision_block=-1,
        name="paper",
    ),
}
"""Setups by name. "paper" is that of arXiv 2506.11976: bring its projector as
`adapter`."""
