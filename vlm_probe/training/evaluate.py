"""Whether an adapter shows the language model anything of the picture."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from vlm_probe.adapter import LinearAdapter
from vlm_probe.controls import previous_image
from vlm_probe.examples import Example
from vlm_probe.language import LanguageModel
from vlm_probe.vision import VisionModel


def evaluate_adapter(
    vision: VisionModel,
    adapter: LinearAdapter,
    language: LanguageModel,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Answers with the true picture and with another one.

    An answer is right if the greedy answer equals it, spaces and case aside. The other
    picture is the example before; the first gets the last's.

    Args:
        vision: Gives patch tokens.
        adapter: What is evaluated.
        language: Answers.
        examples: At least two, with prompt and answer.
        batch_size: Pictures at a time.

    Returns:
        One row per example: `id`, `kind` (of the toy's examples, else empty),
        `answer`, `true_image`, `shuffled_image` (what was said), and whether each was
        right, as `true_right` and `shuffled_right`.
    """
    with torch.no_grad():
        chunks = [
            adapter(
                vision.encode([e.picture() for e in examples[at : at + batch_size]])
            )
            for at in range(0, len(examples), batch_size)
        ]
    vectors = torch.cat(chunks)
    shuffled = previous_image(vectors, vectors[-1])
    rows = []
    for at in range(0, len(examples), batch_size):
        batch = examples[at : at + batch_size]
        prompts = [
            language.chat.image_prompt(e.prompt, vectors.shape[1]) for e in batch
        ]
        said = [
            language.generate(prompts, v[at : at + batch_size], max_new_tokens=6)
            for v in (vectors, shuffled)
        ]
        for example, true, other in zip(batch, *said, strict=True):
            answer = _plain(example.answer or "")
            rows.append(
                {
                    "id": example.id,
                    "kind": getattr(example, "kind", ""),
                    "answer": answer,
                    "true_image": _plain(true),
                    "shuffled_image": _plain(other),
                    "true_right": _plain(true) == answer,
                    "shuffled_right": _plain(other) == answer,
                }
            )
    return pd.DataFrame(rows)


def _plain(words: str) -> str:
    return " ".join(words.lower().split())
