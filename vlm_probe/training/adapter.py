"""A linear adapter learned through the frozen language model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from vlm_probe.adapter import LinearAdapter
from vlm_probe.examples import Example, as_examples
from vlm_probe.language import LanguageModel
from vlm_probe.vision import VisionModel


@dataclass(frozen=True)
class AdapterTraining:
    """Settings of one stage of training."""

    steps: int
    """Optimizer steps."""
    batch_size: int = 24
    """Conversations a step."""
    learning_rate: float = 3e-3
    """Peak rate of AdamW; rises over 3 % of the steps, then falls along a cosine."""
    calibration: int = 256
    """Pictures whose patch tokens give the mean and covariance for whitening."""
    seed: int = 0
    """Of the untrained adapter."""


def train_adapter(
    vision: VisionModel,
    language: LanguageModel,
    stages: Sequence[tuple[Iterable[Example], AdapterTraining]],
    *,
    manifest: dict | None = None,
) -> LinearAdapter:
    """Fits an adapter so that the language model gives the right answers.

    The loss is the cross-entropy of what the assistant says, averaged over the batch's
    tokens; no weight of the vision or language model changes. The map is learned on
    whitened patch tokens, so that what varies little is learned as fast as what varies
    much, and folded back into one affine map at the end.

    Args:
        vision: Gives patch tokens.
        language: Reads the adapter's vectors.
        stages: Examples and settings of each stage in turn (the paper's: captions,
            then instructions). Endless streams are read as far as needed.
        manifest: Anything to be kept beside the weights, JSON only.

    Raises:
        ValueError: A stage's examples end before its steps are done, or an example
            has no answer.
    """
    fitted = None
    for number, (examples, settings) in enumerate(stages):
        stream = as_examples(examples)
        if fitted is None:
            first = list(itertools.islice(stream, settings.calibration))
            fitted = _Whitened(vision, language, first, settings.seed)
            stream = itertools.chain(first, stream)
        _stage(number, fitted, vision, language, stream, settings)
    if fitted is None:
        raise ValueError("no stage of training given; expected at least one")
    return fitted.folded(
        {
            "stages": [asdict(settings) for _, settings in stages],
            "vision": vision.name,
            "vision_block": vision.block,
            "language": language.name,
        }
        | (manifest or {})
    )


class _Whitened(nn.Module):
    """The adapter as it is learned: whitening, then an affine map."""

    def __init__(
        self,
        vision: VisionModel,
        language: LanguageModel,
        examples: Sequence[Example],
        seed: int,
    ) -> None:
        super().__init__()
        patches = vision.encode([e.picture() for e in examples]).flatten(0, 1).double()
        variance, axes = torch.linalg.eigh(torch.cov(patches.T))
        # Directions with next to no variance would turn into noise.
        scale = variance.clamp(min=float(variance.max()) * 1e-4).rsqrt()
        self.register_buffer("mean", patches.mean(0))
        self.register_buffer("whiten", (axes * scale).T)
        embeddings = language.hooked.W_E
        norm = float(embeddings.norm(dim=1).mean())
        generator = torch.Generator().manual_seed(seed)
        self.map = nn.Linear(vision.d_vision, language.d_model)
        with torch.no_grad():
            # Unit variance in every direction: a vector's norm is that of its map.
            weight = torch.randn(self.map.weight.shape, generator=generator)
            self.map.weight.copy_(weight * norm / weight.norm())
            self.map.bias.zero_()

    def forward(
        self, patches: Float[Tensor, "image patch d_vision"]
    ) -> Float[Tensor, "image patch d_model"]:
        white = (patches.double() - self.mean) @ self.whiten.T
        return self.map(white.to(self.map.weight.dtype))

    def folded(self, manifest: dict) -> LinearAdapter:
        """One affine map from raw patch tokens."""
        d_model, d_vision = self.map.weight.shape
        adapter = LinearAdapter(d_vision, d_model, manifest=manifest)
        with torch.no_grad():
            weight = self.map.weight.double() @ self.whiten
            adapter.linear.weight.copy_(weight)
            adapter.linear.bias.copy_(self.map.bias - weight @ self.mean)
        return adapter.eval().requires_grad_(False)


def _stage(
    number: int,
    adapter: _Whitened,
    vision: VisionModel,
    language: LanguageModel,
    stream: Iterable[Example],
    settings: AdapterTraining,
) -> None:
    optimizer = torch.optim.AdamW(
        adapter.parameters(), lr=settings.learning_rate, weight_decay=0.0
    )
    warm = max(1, round(0.03 * settings.steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.03, 1.0, warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, max(1, settings.steps - warm), 1e-8
            ),
        ],
        [warm],
    )
    stream = iter(stream)
    bar = tqdm(
        range(settings.steps), desc=f"adapter, stage {number + 1}", mininterval=5
    )
    for step in bar:
        batch = list(itertools.islice(stream, settings.batch_size))
        if len(batch) < settings.batch_size:
            raise ValueError(
                f"stage {number + 1} ran out of examples at step {step} of "
                f"{settings.steps}; give more examples or fewer steps"
            )
        loss = _loss(adapter, vision, language, batch)
        if not loss.isfinite():
            raise ValueError(
                f"the loss is not a number at step {step} of stage {number + 1}; "
                f"examples {', '.join(str(e.id) for e in batch)}"
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def _loss(
    adapter: _Whitened,
    vision: VisionModel,
    language: LanguageModel,
    batch: Sequence[Example],
) -> Float[Tensor, ""]:
    patches = vision.encode([example.picture() for example in batch])
    prompts, rows, positions = [], [], []
    for row, example in enumerate(batch):
        if example.answer is None:
            raise ValueError(
                f"example {example.id!r} has no answer; training needs one for each"
            )
        turns = [(example.prompt, example.answer), *example.turns]
        prompt, said = language.chat.conversation(turns, patches.shape[1])
        prompts.append(prompt)
        rows += [row] * len(said)
        positions += said
    logits = language.logits(prompts, adapter(patches))
    at = torch.tensor(positions)
    targets = torch.tensor(
        [prompts[r].ids[p] for r, p in zip(rows, positions, strict=True)]
    )
    predicted = logits[torch.tensor(rows), at - 1]
    return nn.functional.cross_entropy(predicted.float(), targets.to(predicted.device))
