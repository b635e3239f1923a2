"""What training is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_probe.tokens import check_names

AVERAGES = ("tokens", "turns")
TRACKERS = ("wandb", "tensorboard")
CACHE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Stage:
    """One stage of training: how long, in what portions, at what rate."""

    epochs: float = 1.0
    """How often each example is seen."""
    steps: int | None = None
    """Optimizer steps; if given, in place of epochs."""
    batch_size: int = 8
    """Conversations that a process takes through the models together."""
    accumulate: int = 1
    """Such batches whose gradients are added up to one step."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW, from which it falls along a cosine."""
    final_rate: float = 1e-8
    """Rate at the end."""
    warm_up: float = 0.03
    """Share of the steps over which the rate rises from zero."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip: float | None = 1.0
    """Largest norm of a step's gradient; longer ones are shortened to it."""
    max_length: int | None = None
    """Tokens of a conversation, image positions included; what is behind is cut off.
    As many as the language model takes if not given."""
    average: str = "tokens"
    """What cross-entropy is averaged over: "tokens" of the assistant, all alike, or
    "turns", each by its own mean first, as in arXiv 2506.11976."""

    def __post_init__(self) -> None:
        check_names("average", [self.average], AVERAGES)
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulate", 1)):
            if (given := getattr(self, name)) is not None and given < least:
                raise ValueError(f"{name} must be at least {least}, given {given}")
        for name in ("epochs", "learning_rate", "clip", "max_length"):
            if (given := getattr(self, name)) is not None and given <= 0:
                raise ValueError(f"{name} must be above 0, given {given}")
        if not 0 <= self.final_rate <= self.learning_rate:
            raise ValueError(
                f"final_rate must be from 0 to learning_rate {self.learning_rate}, "
                f"given {self.final_rate}"
            )
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up is a share of steps, given {self.warm_up}")


@dataclass(frozen=True)
class AdapterTraining:
    """Settings of `train_adapter`; the command line has the same."""

    kind: str = "linear"
    """The adapter: "linear", one affine map, or "mlp2x_gelu", two with a GELU between
    them, as LLaVA-1.5's."""
    d_hidden: int | None = None
    """Width between the two maps; that of the language model if not given."""
    inject_layer: int = 0
    """Before which block of the language model image vectors enter, from 0."""
    whiten: bool = True
    """Whether the adapter is learned on whitened patch tokens, so that what varies
    little is learned as fast as what varies much. Folded into the weights at the end:
    the adapter is of the same kind, and takes plain patch tokens."""
    sae_penalty: float = 0.0
    """Weight of a second term of the loss: the FVU of SAEs at image positions, meaned
    over penalty_layers (the idea of arXiv 2605.24946). It is taken by batch, against
    that batch's own variance: accumulated batches and several processes give the mean
    of theirs, not that of one large batch."""
    penalty_layers: Sequence[int] | None = None
    """Layers whose SAE the penalty asks, from 0; all that have one if not given. Where
    there is no penalty, their FVU is measured beside the loss."""
    calibration: int = 256
    """Pictures, from the first, whose patch tokens give the mean and covariance for
    whitening, and the scale of the untrained adapter, in pictures."""
    vision_cache_dtype: str = "float32"
    """In what patch tokens are kept on disk, if they are: float16 and bfloat16 halve
    their size, and round them also where they come from the vision model."""
    workers: int = 0
    """Processes that read pictures ahead; 0 reads them in this one."""
    seed: int = 0
    """Of the untrained adapter, and of the order of examples."""

    def __post_init__(self) -> None:
        check_names("kind of adapter", [self.kind], ("linear", "mlp2x_gelu"))
        check_names("dtype", [self.vision_cache_dtype], CACHE_DTYPES)
        if self.penalty_layers is not None:
            layers = tuple(int(layer) for layer in self.penalty_layers)
            object.__setattr__(self, "penalty_layers", layers)
        if self.sae_penalty < 0:
            raise ValueError(
                f"sae_penalty must be at least 0, given {self.sae_penalty}"
            )
        for name, least in (("inject_layer", 0), ("calibration", 1), ("workers", 0)):
            if (given := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, given {given}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, given {self.seed}")
        if self.d_hidden is not None and self.kind == "linear":
            raise ValueError(
                f"d_hidden {self.d_hidden} given, but a linear adapter has no width "
                'between maps; ask for kind="mlp2x_gelu"'
            )


PAPER = {
    "captions": Stage(
        epochs=1.0, batch_size=8, learning_rate=1e-3, max_length=512, average="turns"
    ),
    "instructions": Stage(
        epochs=3.0, batch_size=4, learning_rate=2e-5, max_length=1024, average="turns"
    ),
}
"""The two stages of arXiv 2506.11976: LLaVA-Pretrain's 558,000 captions, then
LLaVA-Instruct's mix of 665,000 conversations, through a language model in bfloat16.
What it does not say (weight decay, clipping) is as everywhere here."""
