"""How an untrained adapter is scaled, by the first pictures and by words."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlm_probe.language import LanguageModel
from vlm_probe.training.batches import Batches, Item
from vlm_probe.training.learner import Learner
from vlm_probe.training.settings import AdapterTraining


def calibrate(
    learner: Learner,
    language: LanguageModel,
    stages: Sequence[Batches],
    settings: AdapterTraining,
    *,
    encode: Callable[[Sequence[Item]], Tensor],
    texts: list[str],
) -> None:
    """Scales an untrained adapter, and whitens what it takes if that is asked.

    Args:
        learner: With the adapter.
        language: Whose words give the length of image vectors.
        stages: Whose first pictures that can be used are taken; the same by every
            process.
        settings: How many, and how.
        encode: Gives the patch tokens of pictures that were read.
        texts: Words, for image vectors that enter later.

    Raises:
        ValueError: No picture can be used, or too few to whiten.
    """
    patches, n = [], 0
    usable = itertools.chain.from_iterable(batches.first() for batches in stages)
    pictured = (item for item in usable if item.picture is not None)
    chosen = itertools.islice(pictured, settings.calibration)
    while batch := list(itertools.islice(chosen, 32)):
        patches.append(encode(batch).flatten(0, 1))
        n += len(batch)
    if not patches:
        raise ValueError(
            "no example has a picture that can be read and something said about it; "
            + _first_failure(stages)
        )
    tokens = torch.cat(patches)
    if settings.whiten and len(tokens) <= tokens.shape[1]:
        raise ValueError(
            f"{n} pictures have {len(tokens)} patch tokens, too few to whiten "
            f"{tokens.shape[1]} dimensions; give more pictures, or whiten=False"
        )
    norm = word_norm(language, texts, settings.inject_layer)
    learner.calibrate(tokens, norm, whiten=settings.whiten)


@torch.no_grad()
def word_norm(language: LanguageModel, texts: list[str], inject_layer: int) -> float:
    """Mean norm of words where image vectors enter.

    Before the first block that of all embeddings; later that of the residual stream at
    the words of some texts.
    """
    if not inject_layer:
        words = range(language.n_words)
        chunks = [words[at : at + 4096] for at in range(0, len(words), 4096)]
        norms = [language.embed(chunk).float().norm(dim=-1) for chunk in chunks]
        return float(torch.cat(norms).mean())
    prompts = [language.chat.text_prompt(None, text) for text in texts]
    norms = []

    def visit(_: int, residual: Tensor) -> None:
        for row, prompt in zip(residual, prompts, strict=True):
            norms.append(row[prompt.positions("text_only")].float().norm(dim=-1))

    language.read(prompts, None, [inject_layer], visit, hook_point="resid_pre")
    return float(torch.cat(norms).mean())


def _first_failure(stages: Sequence[Batches]) -> str:
    failures = (f for b in stages for n in range(len(b)) for f in b[n].failures)
    first = next(failures, None)
    if first is None:
        return "all of them are without picture"
    return f"the first, {first.id!r}: {first.error}"
