"""The toy's language model: a HookedTransformer that has only ever read text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from vlm_probe.language.hooked import save_hooked
from vlm_probe.toy.fitting import fit
from vlm_probe.toy.texts import document, make_tokenizer

STEPS = 1600
BATCH = 24
LONGEST = 160
"""Longer documents are not used, in tokens."""
WEIGHTS = {None: 1.0, "caption": 2.0}
ANSWER = 5.0
"""What a token counts in the loss: an answer is one word among many that no one
could foretell."""


def build(folder: Path, *, steps: int = STEPS, seed: int = 0) -> dict[str, float]:
    """Trains the language model on text and saves it.

    Args:
        folder: Gets `hooked_transformer.json`, `model.safetensors` (float16) and
            the tokenizer.
        steps: Optimizer steps of `BATCH` documents.
        seed: Of weights and documents.

    Returns:
        Held-out figures, of `measure`.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = HookedTransformerConfig(
        n_layers=8,
        d_model=128,
        n_heads=4,
        d_head=32,
        d_mlp=384,
        n_ctx=256,
        d_vocab=len(tokenizer),
        act_fn="gelu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=32,
        seed=seed,
        device="cpu",
    )
    model = HookedTransformer(config)
    fit(
        model,
        (_loss(model, *batch) for batch in _batches(tokenizer, seed)),
        steps,
        muon_lr=6e-3,
        adamw_lr=3e-3,
        matrices=_matrices,
        label="language model",
    )
    figures = measure(model.half().float(), tokenizer, seed=seed + 1)
    save_hooked(model, tokenizer, folder, dtype=torch.float16)
    return figures


def _matrices(name: str, parameter: nn.Parameter) -> list[slice | int] | None:
    if name.startswith(("embed", "unembed")) or parameter.ndim < 2 or ".b_" in name:
        return None
    return [slice(None)] if parameter.ndim == 2 else list(range(len(parameter)))


def _batches(
    tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[Int[Tensor, "row pos"], Float[Tensor, "row pos"]]]:
    """Padded tokens, and each token's weight as a target; none for padding."""
    rng = np.random.default_rng([seed, 1])
    while True:
        # Documents of like length go together, so that little padding is computed.
        pool = sorted((_encoded(tokenizer, rng) for _ in range(BATCH * 8)), key=len)
        groups = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        for i in rng.permutation(len(groups)):
            yield _padded(groups[i], tokenizer.pad_token_id)


def _encoded(
    tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator
) -> list[tuple[int, float]]:
    while True:
        row = [(tokenizer.bos_token_id, 0.0)]
        for text, kind in document(rng):
            weight = WEIGHTS.get(kind, ANSWER)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            row += [(i, weight) for i in ids]
        if len(row) <= LONGEST:
            return row


def _padded(rows: list[list[tuple[int, float]]], pad: int) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    filled = torch.tensor([r + [(pad, 0.0)] * (length - len(r)) for r in rows])
    return filled[..., 0].long(), filled[..., 1]


def _loss(model: HookedTransformer, tokens: Tensor, weights: Tensor) -> Tensor:
    # Padding comes last, so causal attention hides it without a mask.
    logits = model(tokens)
    entropy = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    weights = weights[:, 1:].flatten()
    return (entropy * weights).sum() / weights.sum()


@torch.no_grad()
def measure(
    model: HookedTransformer, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> dict[str, float]:
    """What the model makes of documents it was not trained on.

    Returns:
        `cross_entropy` of all tokens, in nats, and `answer_accuracy`, the share of
        answer words that it puts first.
    """
    entropy = n = right = answers = 0.0
    batches = _batches(tokenizer, seed)
    for _ in range(12):
        tokens, weights = next(batches)
        logits, target, weights = model(tokens)[:, :-1], tokens[:, 1:], weights[:, 1:]
        each = nn.functional.cross_entropy(logits.mT, target, reduction="none")
        entropy += each[weights > 0].sum().item()
        n += (weights > 0).sum().item()
        said = (weights == ANSWER) & (target != tokenizer.eos_token_id)
        right += (logits.argmax(-1) == target)[said].sum().item()
        answers += said.sum().item()
    return {"cross_entropy": entropy / n, "answer_accuracy": right / answers}
