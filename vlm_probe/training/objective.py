"""What is minimized: how surprised the language model is by the right answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from jinja2 import TemplateError
from torch import Tensor, nn

from vlm_probe.examples import Example
from vlm_probe.language import LanguageModel
from vlm_probe.language.chat import Chat
from vlm_probe.language.model import Visitor
from vlm_probe.saes import LayerSae, outlines
from vlm_probe.tokens import Prompt


@dataclass(frozen=True)
class Lesson:
    """A conversation as tokens, and which of them are to be learned."""

    prompt: Prompt
    said: tuple[int, ...]
    """Positions of what the assistant says, end-of-turn tokens included."""
    turn: tuple[int, ...]
    """For each of them, the number of the turn."""

    def weights(self, average: str) -> list[float]:
        """How much each token counts: all alike, or all turns alike."""
        if average == "tokens":
            return [1.0] * len(self.said)
        return [1 / self.turn.count(turn) for turn in self.turn]


def lesson(chat: Chat, example: Example, n_patches: int, max_length: int) -> Lesson:
    """Writes an example's conversation through the chat template.

    Args:
        chat: The language model's.
        example: With an answer.
        n_patches: How many positions a picture takes.
        max_length: Tokens, image positions included; what is behind is cut off.

    Raises:
        ValueError: No turn of the assistant, or none that begins within `max_length`.
    """
    if example.answer is None:
        raise ValueError(
            "the conversation has no turn of the assistant, so there is nothing to "
            "learn from it"
        )
    turns = [(example.prompt, example.answer), *example.turns]
    for number, (_, answer) in enumerate(turns):
        if not answer.strip():
            raise ValueError(f"the assistant says nothing in turn {number + 1}")
    room = n_patches if example.image is not None else 0
    try:
        prompt, spans = chat.conversation(turns, room)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from (
            error
        )
    said = [
        (position, turn)
        for turn, span in enumerate(spans)
        for position in span
        if position < max_length
    ]
    if not said or prompt.image.stop > max_length:
        first = next(position for span in spans for position in span)
        raise ValueError(
            f"the assistant's first word is token {first + 1}, beyond max_length "
            f"{max_length}; raise it, or shorten what is asked"
        )
    positions, numbers = zip(*said, strict=True)
    return Lesson(prompt.until(max_length), positions, numbers)


@dataclass(frozen=True)
class Loss:
    """Of some conversations: sums, so that parts of a batch add up to its loss."""

    cross_entropy: Float[Tensor, ""]
    """Weighted sum over the assistant's tokens, in nats, with the graph to the image
    vectors."""
    fvu: Float[Tensor, ""] | None
    """Mean FVU over the SAEs that were asked, times the number of pictures; None where
    none was asked, or there is no picture. With its graph, if that was asked for."""


def loss(
    language: LanguageModel,
    lessons: Sequence[Lesson],
    vectors: Float[Tensor, "image patch d_model"] | None,
    *,
    average: str = "tokens",
    inject_layer: int = 0,
    saes: Mapping[int, LayerSae] | None = None,
    layers: Sequence[int] = (),
    penalized: bool = False,
) -> Loss:
    """Cross-entropy of what the assistant says, and the SAEs' FVU at image positions.

    Args:
        language: The frozen model.
        lessons: Conversations, with and without a picture.
        vectors: Image vectors of those with a picture, in order; None if none has.
        average: What the loss is a mean of: "tokens" or "turns".
        inject_layer: Before which block the vectors enter.
        saes: By layer; they may be streamed.
        layers: Those whose SAE's FVU at image positions is measured.
        penalized: Whether FVU is to have a gradient.
    """
    fvus: list[Float[Tensor, ""]] = []
    asked = list(layers) if saes and vectors is not None else []

    def visit(layer: int, residual: Float[Tensor, "row pos d_model"]) -> None:
        x = torch.cat(
            [
                row[list(lesson.prompt.image)]
                for row, lesson in zip(residual, lessons, strict=True)
            ]
        )
        with torch.set_grad_enabled(penalized and torch.is_grad_enabled()):
            fvus.append(_fvu(x, saes[layer]))  # pyright: ignore -- asked of these only

    points = {outlines(saes or {})[layer].hook_point for layer in asked}
    nats, _ = surprise(
        language,
        lessons,
        vectors,
        layers=asked,
        visit=visit,
        hook_point=points.pop() if points else "resid_post",
        inject_layer=inject_layer,
    )
    weights = [weight for lesson in lessons for weight in lesson.weights(average)]
    weight = torch.tensor(weights, device=nats.device)
    fvu = torch.stack(fvus).mean() * len(vectors) if fvus else None  # pyright: ignore
    return Loss((nats * weight).sum(), fvu)


def surprise(
    language: LanguageModel,
    lessons: Sequence[Lesson],
    vectors: Float[Tensor, "image patch d_model"] | None,
    *,
    layers: Sequence[int] = (),
    visit: Visitor | None = None,
    hook_point: str = "resid_post",
    inject_layer: int = 0,
) -> tuple[Float[Tensor, " token"], Int[Tensor, " token"]]:
    """Cross-entropy of each of the assistant's tokens, in nats, and its lesson's row.

    In float32, from the model's own logits, a final soft-cap included.

    Args:
        language: The frozen model.
        lessons: Conversations, with and without a picture.
        vectors: Image vectors of those with a picture, in order; None if none has.
        layers: As all that follows, of `LanguageModel.logits`.
        visit: As there.
        hook_point: As there.
        inject_layer: As there.
    """
    logits = language.logits(
        [lesson.prompt for lesson in lessons],
        vectors,
        layers=layers,
        visit=visit,
        hook_point=hook_point,
        inject_layer=inject_layer,
    )
    rows = torch.tensor([n for n, lesson in enumerate(lessons) for _ in lesson.said])
    positions = torch.tensor([p for lesson in lessons for p in lesson.said])
    targets = torch.tensor(
        [lesson.prompt.ids[p] for lesson in lessons for p in lesson.said],
        device=logits.device,
    )
    # What is predicted at a position is the token behind it.
    predicted = logits[rows, positions - 1].float()
    nats = nn.functional.cross_entropy(predicted, targets, reduction="none")
    return nats, rows


def _fvu(x: Float[Tensor, "token d_model"], sae: LayerSae) -> Float[Tensor, ""]:
    """Fraction of variance unexplained, with its gradient to the tokens."""
    x = x.to(sae.sae.W_dec.dtype)
    # Decoded at once: some architectures keep what they scaled by in between.
    x_hat = sae.sae.decode(sae.sae.encode(x))
    return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
