"""The model and the pictures that are measured: GPT-2 small's shape, random weights.

How long a product takes does not depend on what its numbers are, but how many features
fire does: thresholds are set so that text behind pictures has the L0 of published SAEs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
from PIL import Image
from sae_lens import SAE
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from vlm_probe import Example, VisionLanguageModel
from vlm_probe.adapter import LinearAdapter
from vlm_probe.language import LanguageModel
from vlm_probe.saes import LayerSae
from vlm_probe.vision import VisionModel

GROUPS = ("image", "text_after_image")
"""Token groups that are probed, in one pass."""

_D_VISION, _PATCH = 64, 16
_END, _UNKNOWN, _WORDS = "<|endoftext|>", "<unknown>", 2
_CALIBRATION = 8
"""The first pictures, on which vectors and thresholds are set."""
_SPREAD = 0.1
"""Thresholds differ from feature to feature by up to this share."""


@dataclass(frozen=True)
class Size:
    """The shape of the workload."""

    layers: int = 12
    """Blocks of the language model, each with its SAE."""
    d_model: int = 768
    """Width of the residual stream; the MLP is four times as wide."""
    heads: int = 12
    """Attention heads."""
    vocabulary: int = 50257
    """Words of the language model."""
    features: int = 24576
    """Features of each SAE."""
    l0: float = 60.0
    """Features that fire at a text token, on average; at image tokens it comes out as
    it does."""
    side: int = 14
    """Patches along a side of the picture: 14 x 14 = 196 image tokens."""
    words: int = 32
    """Words of the prompt behind the picture, all counted as text tokens."""
    batch: int = 4
    """Pictures that go through the models together."""

    @property
    def patches(self) -> int:
        """Image tokens of a picture."""
        return self.side**2


FULL = Size()
SMALL = Size(
    layers=2,
    d_model=64,
    heads=4,
    vocabulary=1000,
    features=1024,
    l0=20.0,
    side=4,
    words=8,
)
"""A reduced size for tests: seconds, and numbers that say nothing."""


@dataclass(frozen=True)
class Batch:
    """One batch of pictures as it enters the language model, for plain hooks."""

    tokens: Tensor
    """Token ids; placeholders where the picture goes."""
    vectors: Tensor
    """The pictures' vectors, ready made."""
    image: slice
    """Positions of the image tokens."""
    text: slice
    """Positions of the text tokens."""

    @property
    def counted(self) -> slice:
        """Positions of all tokens that are coded."""
        return slice(self.image.start, self.text.stop)

    def put(self, embedded: Tensor, hook: object = None) -> Tensor:  # noqa: ARG002
        """A TransformerLens hook that puts the vectors in."""
        embedded[:, self.image] = self.vectors
        return embedded


@dataclass(frozen=True)
class Workload:
    """A model and the examples that go through it."""

    size: Size
    model: VisionLanguageModel
    examples: list[Example]

    def pictures(self) -> Iterator[list[Example]]:
        """The examples, batch by batch."""
        for at in range(0, len(self.examples), self.size.batch):
            yield self.examples[at : at + self.size.batch]

    def batch(self, examples: list[Example]) -> Batch:
        """What a user would write to bring examples to the language model."""
        return _batch(
            self.model.vision, self.model.adapter, self.model.language, examples
        )


def make_workload(size: Size, images: int, device: str = "cpu") -> Workload:
    """The model and this many examples, the same at every call."""
    return Workload(size, make_model(size, device), list(make_examples(size, images)))


def make_examples(size: Size, images: int) -> Iterator[Example]:
    """Smooth random pictures, each with a prompt of random words, one at a time."""
    for index in range(images):
        rng = np.random.default_rng([7, index])
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC)
        words = rng.integers(_WORDS, size.vocabulary, size.words)
        yield Example(picture, prompt=" ".join(f"w{word}" for word in words))


@torch.no_grad()
def make_model(
    size: Size, device: str = "cpu", *, layers: tuple[int, ...] | None = None
) -> VisionLanguageModel:
    """The four parts from fixed seeds.

    Args:
        size: Their shape.
        device: Where they go.
        layers: Layers that get an SAE; all if not given.
    """
    torch.manual_seed(0)
    vision = _vision(size, device)
    language = _language(size, device)
    first = list(make_examples(size, _CALIBRATION))
    patches = vision.encode([example.picture() for example in first])
    adapter = _adapter(patches.flatten(0, 1), language.hooked.W_E).to(device)
    calibration = _batch(vision, adapter, language, first)
    streams = _text_streams(size, calibration, language.hooked)
    saes = {
        layer: LayerSae(
            layer, _sae(size, layer, streams[layer]), f"random/layer_{layer}"
        )
        for layer in (range(size.layers) if layers is None else layers)
    }
    return VisionLanguageModel(
        vision=vision,
        adapter=adapter,
        language=language,
        saes=saes,
        name="benchmark",
    )


def _vision(size: Size, device: str) -> VisionModel:
    """One block, since the vision model is not what is measured."""
    pixels = size.side * _PATCH
    clip = open_clip.CLIP(
        embed_dim=8,
        vision_cfg=dict(
            image_size=pixels,
            patch_size=_PATCH,
            layers=1,
            width=_D_VISION,
            head_width=32,
        ),
        text_cfg=dict(context_length=8, vocab_size=10, width=8, heads=1, layers=1),
    )
    transform = open_clip.transform.image_transform(pixels, is_train=False)
    return VisionModel(clip.visual.to(device), transform, name="one block")


def _language(size: Size, device: str) -> LanguageModel:
    config = HookedTransformerConfig(
        n_layers=size.layers,
        d_model=size.d_model,
        n_heads=size.heads,
        d_head=size.d_model // size.heads,
        d_mlp=4 * size.d_model,
        n_ctx=1024,
        d_vocab=size.vocabulary,
        act_fn="gelu_new",
        normalization_type="LN",
        seed=1,
        device=device,
    )
    with warnings.catch_warnings():
        # sae-lens keeps us below the transformer-lens that has the replacement.
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated")
        hooked = HookedTransformer(config)
    return LanguageModel(hooked, _tokenizer(size), name="random GPT-2")


def _tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """One id a word; begins and ends with the same special token, as GPT-2's."""
    words = {f"w{i}": i for i in range(_WORDS, size.vocabulary)}
    backend = Tokenizer(models.WordLevel({_END: 0, _UNKNOWN: 1, **words}, _UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=_END, eos_token=_END, unk_token=_UNKNOWN
    )


def _adapter(patches: Tensor, words: Tensor) -> LinearAdapter:
    """A random map whose vectors have mean zero and the mean norm of the words."""
    adapter = LinearAdapter(patches.shape[1], words.shape[1]).requires_grad_(False)
    linear, center = adapter.linear, patches.mean(0).cpu()
    vectors = (patches.cpu() - center) @ linear.weight.T
    linear.weight *= words.norm(dim=1).mean().cpu() / vectors.norm(dim=1).mean()
    linear.bias.copy_(-linear.weight @ center)
    return adapter


def _batch(
    vision: VisionModel,
    adapter: LinearAdapter,
    language: LanguageModel,
    examples: list[Example],
) -> Batch:
    words = language.tokenizer
    patches = vision.encode([example.picture() for example in examples])
    n = patches.shape[1]
    ids = [
        [words.bos_token_id]
        + [words.unk_token_id] * n
        + words(example.prompt, add_special_tokens=False).input_ids
        for example in examples
    ]
    return Batch(
        torch.tensor(ids, device=language.device),
        adapter(patches),
        slice(1, 1 + n),
        slice(1 + n, len(ids[0])),
    )


def _text_streams(size: Size, batch: Batch, hooked: HookedTransformer) -> list[Tensor]:
    """What each block leaves at the text behind some pictures."""
    with hooked.hooks([("hook_embed", batch.put)]):
        _, cache = hooked.run_with_cache(
            batch.tokens,
            names_filter=lambda name: name.endswith("hook_resid_post"),
            return_type=None,
            stop_at_layer=size.layers,
        )
    return [
        cache["resid_post", layer][:, batch.text].flatten(0, 1)
        for layer in range(size.layers)
    ]


def _sae(size: Size, layer: int, stream: Tensor) -> SAE:
    """A JumpReLU SAE with random unit directions, centered on text."""
    device = stream.device
    generator = torch.Generator(device).manual_seed(layer)
    # In place, and on no other tensors: an SAE of a million features has to fit.
    decoder = torch.empty(size.features, size.d_model, device=device)
    decoder.normal_(generator=generator)
    decoder /= decoder.norm(dim=1, keepdim=True)
    encoder = torch.empty(size.d_model, size.features, device=device)
    encoder.copy_(decoder.T)
    center = stream.mean(0)
    spread = torch.rand(size.features, generator=generator, device=device)
    spread = 1 + _SPREAD * (2 * spread - 1)
    # All directions are drawn alike, so that some of them speak for all.
    some = slice(min(size.features, 65536))
    before = (stream - center) @ encoder[:, some] / spread[some]
    kept = math.ceil(before.numel() * size.l0 / size.features)
    threshold = spread * before.flatten().topk(kept).values[-1]
    sae = SAE.from_dict(
        {
            "architecture": "jumprelu",
            "d_in": size.d_model,
            "d_sae": size.features,
            "dtype": "float32",
            "device": "meta",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"},
        }
    )
    state = {
        "W_enc": encoder,
        "W_dec": decoder,
        "b_enc": -center @ encoder,
        "b_dec": center,
        "threshold": threshold,
    }
    sae.load_state_dict(state, assign=True)
    return sae.to(device=str(device)).requires_grad_(False)
