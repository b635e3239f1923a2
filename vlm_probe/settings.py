"""What a probe is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_probe.tokens import CONTROLS, GROUPS, check_names

CONVENTIONS = ("pooled", "paper")


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
    batch_size: int = 8
    """Pictures that go through the models together, in pictures."""
    replicates: int = 400
    """Redrawings of the bootstrap over images behind the 95 % bounds. Memory grows by
    replicates x d_model x 8 bytes for each layer, group and condition."""
    calibration: int = 64
    """Pictures, from the first, whose patch tokens give random_adapter its mean and
    covariance, in pictures."""
    seed: int = 0
    """Of the bootstrap and the control arms."""

    def __post_init__(self) -> None:
        for name in ("layers", "groups", "controls"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"{name} takes a list of names, given {value!r}")
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))
        check_names("group", self.groups, GROUPS)
        check_names("control", self.controls, CONTROLS)
        check_names("convention", [self.convention], CONVENTIONS)
        if not self.groups:
            raise ValueError(f"no group given; valid: {', '.join(GROUPS)}")
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
        if "shuffled_images" in self.controls and self.batch_size < 2:
            raise ValueError(
                "shuffled_images gives each picture the vectors of the one before it "
                "and needs batch_size of at least 2, given 1"
            )
