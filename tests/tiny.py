"""A random stack small enough to be made anew by any test."""

import open_clip
import torch
from sae_lens import SAE
from transformer_lens import HookedTransformer, HookedTransformerConfig

from vlm_probe.adapter import LinearAdapter
from vlm_probe.language import LanguageModel
from vlm_probe.model import VisionLanguageModel
from vlm_probe.saes import LayerSae
from vlm_probe.toy.texts import make_tokenizer
from vlm_probe.vision import VisionModel

D_MODEL, D_VISION, FEATURES, LAYERS = 16, 24, 64, 3


def tiny_language(d_model=D_MODEL, n_layers=LAYERS):
    tokenizer = make_tokenizer()
    config = HookedTransformerConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=2,
        d_head=8,
        d_mlp=32,
        n_ctx=96,
        d_vocab=len(tokenizer),
        act_fn="gelu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=8,
        seed=1,
        device="cpu",
    )
    hooked = HookedTransformer(config)
    with torch.no_grad():  # larger than at the start of training: layers must differ
        for parameter in hooked.parameters():
            parameter.mul_(8)
    return LanguageModel(hooked, tokenizer, name="tiny")


def tiny_vision(width=D_VISION):
    clip = open_clip.CLIP(
        embed_dim=8,
        vision_cfg=dict(
            image_size=32, patch_size=8, layers=2, width=width, head_width=8
        ),
        text_cfg=dict(context_length=8, vocab_size=10, width=8, heads=1, layers=1),
    )
    transform = open_clip.transform.image_transform(32, is_train=False)
    return VisionModel(clip.visual, transform, name="tiny")


def tiny_sae(layer, d_model=D_MODEL, hook=None):
    sae = SAE.from_dict(
        {
            "architecture": "jumprelu",
            "d_in": d_model,
            "d_sae": FEATURES,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "metadata": {"hook_name": hook or f"blocks.{layer}.hook_resid_post"},
        }
    )
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        decoder = torch.randn(FEATURES, d_model, generator=generator)
        decoder /= decoder.norm(dim=1, keepdim=True)
        sae.W_dec.copy_(decoder)
        sae.W_enc.copy_(decoder.T * 0.4)
        sae.b_dec.copy_(torch.randn(d_model, generator=generator) * 0.1)
        sae.threshold.fill_(0.3)
    return LayerSae(layer, sae, f"tiny/layer_{layer}")


def tiny_model():
    torch.manual_seed(0)
    vision, language = tiny_vision(), tiny_language()
    return VisionLanguageModel(
        vision=vision,
        adapter=LinearAdapter(D_VISION, D_MODEL).requires_grad_(False),
        language=language,
        saes={layer: tiny_sae(layer) for layer in range(LAYERS)},
        name="tiny",
        reference_texts=("a large red circle on grass .", "a small bar on sand ."),
    )
