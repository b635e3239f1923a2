"""The toy's SAEs: one a layer, trained by sae-lens on text alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_probe.language import LanguageModel
from vlm_probe.tokens import Prompt
from vlm_probe.toy.texts import document

FEATURES = 1024
ACTIVE = 20
STEPS = 450
BATCH = 2048
DOCUMENTS = 6000


def build(
    folder: Path, language: LanguageModel, *, steps: int = STEPS, seed: int = 0
) -> dict[int, dict[str, float]]:
    """Trains BatchTopK SAEs on `resid_post` of every layer and saves them as JumpReLU.

    Args:
        folder: Gets `layer_0`, `layer_1`, ... as sae-lens saves them, in float16.
        language: The frozen language model, as it is shipped.
        steps: Optimizer steps a layer, of `BATCH` tokens.
        seed: Of weights and documents.

    Returns:
        For each layer the held-out `fvu` and `l0` on text, of the saved weights.
    """
    figures = {}
    texts = text_activations(language, DOCUMENTS, [seed, 4])
    held_out = text_activations(language, 200, [seed, 5])
    for layer in range(language.n_layers):
        torch.manual_seed(seed + layer)
        path = folder / f"layer_{layer}"
        _train(texts[layer], f"blocks.{layer}.hook_resid_post", steps, path)
        sae = SAE.load_from_disk(path, device="cpu", dtype="float32")
        x = held_out[layer].float()
        with torch.no_grad():
            codes = sae.encode(x)
            error = (x - sae.decode(codes)).square().sum()
        spread = (x - x.mean(0)).square().sum()
        figures[layer] = {
            "fvu": float(error / spread),
            "l0": float((codes != 0).sum(-1).float().mean()),
        }
    return figures


def text_activations(
    language: LanguageModel, documents: int, seed: list[int]
) -> list[Float[Tensor, "token d_model"]]:
    """Each layer's `resid_post` at the words of random documents, in float16.

    Special tokens are left out, as they are in a probe.
    """
    rng = np.random.default_rng(seed)
    found: list[list[Tensor]] = [[] for _ in range(language.n_layers)]
    for _ in range(0, documents, 50):
        prompts = [_prompt(language, rng) for _ in range(50)]
        length = max(len(p.ids) for p in prompts)
        words = torch.zeros(len(prompts), length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            words[row, prompt.positions("text_only")] = True
        language.read(
            prompts,
            None,
            range(language.n_layers),
            lambda layer, x, words=words: found[layer].append(x[words].half()),
        )
    return [torch.cat(layer) for layer in found]


def _prompt(language: LanguageModel, rng: np.random.Generator) -> Prompt:
    text = " ".join(piece for piece, _ in document(rng))
    ids = language.tokenizer(text, add_special_tokens=False).input_ids
    # A few documents are longer than the context; their end is left out.
    ids = [language.tokenizer.bos_token_id, *ids][: language.hooked.cfg.n_ctx]
    return Prompt(tuple(ids), range(0), language.chat.special)


def _train(
    tokens: Float[Tensor, "token d_model"], hook: str, steps: int, path: Path
) -> None:
    config = BatchTopKTrainingSAEConfig(
        d_in=tokens.shape[1],
        d_sae=FEATURES,
        k=ACTIVE,
        normalize_activations="expected_average_only_in",
    )
    config.metadata.hook_name = hook
    config.metadata.model_name = "toy"
    sae = BatchTopKTrainingSAE.from_dict(config.to_dict())
    settings = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=1.5e-3,
        lr_end=1.5e-4,
        lr_decay_steps=steps // 3,
        device="cpu",
        n_batches_for_norm_estimate=20,
    )
    draws = (
        tokens[torch.randint(len(tokens), (BATCH,))].float() for _ in itertools.count()
    )
    SAETrainer(settings, sae, draws).fit().save_inference_model(path)
    weights = path / "sae_weights.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights)
