"""Tiny random models in the files that are published: what a hub would hold."""

import json

import numpy as np
import open_clip
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

FAMILIES = ("gemma2", "llama", "qwen2", "gpt2", "gpt_neox")

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a large red circle on grass, what color is it?",
    "describe the picture. consider the following information",
] * 4

GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
    "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What each family's tokenizer calls its special tokens, and its chat template.
TOKENIZERS = {
    "gemma2": (
        dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"),
        ["<start_of_turn>", "<end_of_turn>"],
        GEMMA_CHAT,
    ),
    "llama": (
        dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
        ["<|start_header_id|>", "<|end_header_id|>"],
        LLAMA_CHAT,
    ),
    "qwen2": (
        dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        ["<|im_start|>"],
        QWEN_CHAT,
    ),
    "gpt2": (dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>"), [], None),
    "gpt_neox": (dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>"), [], None),
}
SHAPE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
)
GROUPED = SHAPE | dict(num_key_value_heads=2)


def tokenizer(family):
    """A byte-level tokenizer with the family's special tokens and template."""
    named, others, template = TOKENIZERS[family]
    specials = list(dict.fromkeys([*named.values(), *others]))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    if family in ("gemma2", "llama"):
        bos = named["bos_token"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=others, **named
    )
    fast.chat_template = template
    return fast


def plain_rope(theta):
    """Not the family's own base, so that one read from elsewhere would show."""
    return dict(rope_type="default", rope_theta=theta)


def config(family, vocab, **changed):
    made = _config(family, vocab)
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def _config(family, vocab):
    if family == "gemma2":
        # The window is shorter than the prompts of the tests, and so does something.
        return transformers.Gemma2Config(
            vocab_size=vocab,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=8,
            rope_parameters=plain_rope(2e4),
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
            **GROUPED,
        )
    if family == "llama":
        scaling = dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
        return transformers.LlamaConfig(
            vocab_size=vocab, rope_parameters=scaling, **GROUPED
        )
    if family == "qwen2":
        return transformers.Qwen2Config(
            vocab_size=vocab,
            tie_word_embeddings=True,
            rope_parameters=plain_rope(1e6),
            **GROUPED,
        )
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab, n_embd=32, n_layer=3, n_head=4, n_positions=128
        )
    rope = plain_rope(3e4) | dict(partial_rotary_factor=0.25)
    return transformers.GPTNeoXConfig(vocab_size=vocab, rope_parameters=rope, **SHAPE)


def write_language(folder, family, *, seed=0, **changed):
    """Saves a tiny random model of the family and gives back the Hugging Face model."""
    words = tokenizer(family)
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(
        config(family, len(words), **changed)
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            # Larger than at the start of training, and no norm or bias trivial, so
            # that a wrong scale, window or cap changes every layer.
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" not in name and "wte" not in name:
                parameter.mul_(6)
    made = made.eval()
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return made


def picture(size=(320, 240), seed=0):
    """A picture of noise, for what needs any picture at all."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels)


CLIP = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "layers": 2,
        "width": 24,
        "head_width": 8,
    },
    "text_cfg": {
        "context_length": 8,
        "vocab_size": 10,
        "width": 8,
        "heads": 1,
        "layers": 1,
    },
}


def write_vision(folder, config=CLIP):
    """Saves a tiny CLIP as open_clip's `local-dir:` reads it."""
    folder.mkdir(parents=True)
    described = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    weights = open_clip.CLIP(**config).state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
