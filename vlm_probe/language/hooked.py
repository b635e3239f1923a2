"""A Hugging Face checkpoint becomes a hooked model with the same residual stream.

Two kinds, one contract (`hook_embed`, `blocks.i.hook_resid_post`, `stop_at_layer`):
`HookedTransformer`, TransformerLens' own model with converted weights, and
`TransformerBridge`, hooks around Hugging Face's model. Weights are converted without
processing, unless the SAEs were trained on processed weights.
"""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens import loading_from_pretrained as lens
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlm_probe.tokens import BACKENDS, check_names
from vlm_probe.weights import read_json, read_weights

Hooked = HookedTransformer | TransformerBridge

PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
"""TransformerLens' weight processing, by the names of `from_pretrained`."""

_CONTEXT = 2048
"""Positions kept for rotary models: HookedTransformer holds a mask of n_ctx x n_ctx
for each layer, which at the 131,072 of a Llama 3 would be 17 GB."""

_MADE_ANEW = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
"""Buffers that a HookedTransformer computes from its config."""

_CONFIG, _WEIGHTS = "hooked_transformer.json", "model.safetensors"


def load_checkpoint(
    source: str | Path | PreTrainedModel,
    *,
    backend: str = "auto",
    processing: Mapping[str, bool] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Hooked, PreTrainedTokenizerBase]:
    """Loads a hub name, a local folder of Hugging Face's, or a model in memory.

    Args:
        source: For instance "google/gemma-2-2b-it", TransformerLens' "gemma-2-2b-it",
            a folder written by `save_pretrained`, or a `PreTrainedModel`, around whose
            own parts a bridge puts its hooks.
        backend: "hooked", a HookedTransformer; "bridge", a TransformerBridge; "auto",
            the first where it gives the checkpoint's own answers, else the second.
        processing: Which of `PROCESSING` is done to the weights; nothing if None.
        device: Where the model goes.
        dtype: Of its weights.
        tokenizer: The source's own if None.

    Raises:
        FileNotFoundError: Nothing there, or the hub cannot be reached.
        ValueError: An architecture, processing or tokenizer that cannot be had.
    """
    check_names("backend", [backend], BACKENDS)
    wanted = {name for name, on in (processing or {}).items() if on}
    check_names("weight processing", sorted(wanted), PROCESSING)
    if isinstance(source, PreTrainedModel):
        config, name = source.config, source.config.name_or_path
    else:
        source = name = _hub_name(str(source))
        config = _from_pretrained(AutoConfig, name)
    tokenizer = tokenizer or _tokenizer(name)
    if backend != "bridge":
        try:
            hooked = _convert(source, config, dtype, wanted)
            return hooked.to(device, print_details=False), tokenizer
        except _NotConverted as reason:
            if backend == "hooked":
                raise ValueError(
                    f"TransformerLens has no HookedTransformer that is {name}: "
                    f'{reason}; load it with backend="bridge"'
                ) from reason
    if wanted:
        raise ValueError(
            f"the SAEs were trained on weights with {', '.join(sorted(wanted))}, which "
            f"a bridge does not do, and a HookedTransformer is not to be had of {name}"
            if backend == "auto"
            else f"the SAEs were trained on weights with {', '.join(sorted(wanted))}, "
            f'which a bridge does not do; load {name} with backend="hooked"'
        )
    # A copy, for the bridge gives a tokenizer without BOS token another one as such.
    words = copy.deepcopy(tokenizer)
    words.init_kwargs.setdefault("name_or_path", name)
    bridge = TransformerBridge.boot_transformers(
        name or type(source).__name__,
        hf_model=_model(source, dtype).to(device, dtype),
        tokenizer=words,
        device=device,
        dtype=dtype,
    )
    return bridge, tokenizer


def load_hooked(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[HookedTransformer, PreTrainedTokenizerBase]:
    """Loads what `save_hooked` wrote: config, weights and tokenizer in one folder."""
    folder = Path(folder)
    config = read_json(folder / _CONFIG)
    config |= {"dtype": dtype, "device": str(device)}
    hooked = HookedTransformer(HookedTransformerConfig.from_dict(config))
    weights, _ = read_weights(folder / _WEIGHTS)
    missing, unexpected = hooked.load_state_dict(weights, strict=False)
    missing = [m for m in missing if m.rsplit(".", 1)[-1] not in _MADE_ANEW]
    if missing or unexpected:
        raise ValueError(
            f"{folder / _WEIGHTS} does not fit {_CONFIG} beside it: missing "
            f"{missing or 'nothing'}, unexpected {unexpected or 'nothing'}"
        )
    return hooked, _from_pretrained(AutoTokenizer, str(folder))


def is_hooked_folder(folder: str | Path) -> bool:
    """Whether `load_hooked` is what loads a folder."""
    return (Path(folder) / _CONFIG).is_file()


def save_hooked(
    hooked: Hooked,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a model and its tokenizer; a bridge as Hugging Face does.

    Args:
        hooked: The model.
        tokenizer: Goes into the same folder.
        folder: Made if it is not there.
        dtype: What a HookedTransformer's weights are stored in; their own if None.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(hooked, TransformerBridge):
        _unwrapped(hooked.original_model).save_pretrained(folder)
    else:
        # Another dictionary: to_dict gives the config's own.
        config = hooked.cfg.to_dict() | {
            "dtype": str(hooked.cfg.dtype),
            "device": "cpu",
        }
        # Not config.json: beside a tokenizer that would mislead AutoTokenizer.
        (folder / _CONFIG).write_text(json.dumps(config, indent=1, default=str))
        weights = {
            name: tensor.to(dtype).contiguous()
            for name, tensor in hooked.state_dict().items()
            if name.rsplit(".", 1)[-1] not in _MADE_ANEW
        }
        save_file(weights, folder / _WEIGHTS)
    tokenizer.save_pretrained(folder)


def _unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model without the components that a bridge put around each of its parts."""
    bare = {
        name.replace("._original_component", ""): tensor
        for name, tensor in model.state_dict().items()
    }
    with torch.device("meta"):
        plain = type(model)(model.config)
    # Parts are found under Hugging Face's names and under the bridge's.
    own = {name: bare[name] for name in plain.state_dict()}
    plain.load_state_dict(own, assign=True)
    plain.tie_weights()
    return plain


def _hub_name(source: str) -> str:
    """A folder as it is; a name of TransformerLens' as the hub's."""
    if Path(source).exists():
        return source
    return lens.make_model_alias_map().get(source.lower(), source)


class _NotConverted(Exception):  # noqa: N818 -- no error if there is a bridge
    """Why there is no HookedTransformer that computes what a checkpoint does."""


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = _from_pretrained(AutoTokenizer, name)
    # Without its files, transformers makes one of a handful of special tokens.
    ids = tokenizer("The picture", add_special_tokens=False).input_ids
    if not set(ids) - set(tokenizer.all_special_ids):
        raise ValueError(
            f"no tokenizer in {name}: what was made of its files knows no words. "
            "Expected tokenizer.json or tokenizer.model beside the config; save it "
            "there with tokenizer.save_pretrained, or give a LanguageModel with its own"
        )
    return tokenizer


def _model(source: str | PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Hugging Face's model, whole and frozen."""
    model = source
    if isinstance(source, str):
        model, loading = _from_pretrained(
            AutoModelForCausalLM,
            source,
            dtype=dtype,
            attn_implementation="eager",  # as the bridge computes it
            output_loading_info=True,
        )
        # Hugging Face fills in what is not there at random, with a warning.
        for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if names := sorted(map(str, loading[what])):
                raise ValueError(
                    f"the weights of {source} are not those of its config.json, "
                    f"{what.replace('_', ' ')}: {', '.join(names[:4])} "
                    f"({len(names)} in all); copy or download it again"
                )
    return model.eval().requires_grad_(False)


def _from_pretrained(kind: type, name: str, **options: object) -> Any:  # noqa: ANN401
    """Hugging Face's loader, its many ways to fail told as one."""
    try:
        return kind.from_pretrained(name, **options)
    except (
        OSError,
        ValueError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        what = {
            AutoConfig: "config",
            AutoTokenizer: "tokenizer",
            AutoModelForCausalLM: "weights",
        }[kind]
        first = str(error).strip().split("\n", 1)[0]
        if Path(name).exists():
            raise ValueError(
                f"no {what} of a language model could be read from {name}: {first} "
                "Expected a folder written by save_pretrained: config.json, "
                "model.safetensors (or its shards) and the tokenizer's files"
            ) from error
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise FileNotFoundError(
                f"there is no folder {name}; give one written by save_pretrained, or a "
                "name of the Hugging Face hub"
            ) from error
        raise FileNotFoundError(
            f"no {what} for {name!r}: it is no folder here, and the Hugging Face hub "
            f"gave nothing ({first}) Give a local folder, or download it where there "
            f"is a network: `hf download {name}`"
        ) from error


def _convert(
    source: str | PreTrainedModel,
    config: PretrainedConfig,
    dtype: torch.dtype,
    wanted: set[str],
) -> HookedTransformer:
    """A HookedTransformer, after it has given the checkpoint's own answers."""
    held = isinstance(source, PreTrainedModel)
    cfg = _hooked_config(config, type(source).__name__ if held else None, dtype)
    model = _model(source, dtype)
    ids = torch.arange(24)[None] * 7 % config.get_text_config().vocab_size
    with torch.no_grad():
        answers = model(ids.to(model.device)).logits.float().log_softmax(-1).cpu()
    try:
        weights = _weights(model, cfg)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _NotConverted(f"its weights are not converted ({error})") from error
    del model  # so that its memory is free as soon as its weights are converted
    if "fold_ln" in wanted and cfg.normalization_type in ("LN", "RMS"):
        cfg.normalization_type += "Pre"
    hooked = _filled(HookedTransformer(cfg, move_to_device=False), weights, wanted)
    with torch.no_grad():
        found = hooked(ids).float().log_softmax(-1)
    off = float((found - answers).norm() / (answers - answers.mean()).norm())
    # Weight processing leaves log-probabilities as they are.
    if not off < (1e-4 if dtype in (torch.float32, torch.float64) else 0.1):
        raise _NotConverted(f"its log-probabilities would be off by {off:.1g}")
    return hooked


def _hooked_config(
    config: PretrainedConfig, architecture: str | None, dtype: torch.dtype
) -> HookedTransformerConfig:
    """TransformerLens' config for a checkpoint's."""
    architecture = architecture or (config.architectures or ["?"])[0]
    if architecture == "Gemma2ForCausalLM":
        made = _gemma2(config)
    else:
        # TransformerLens reads a folder's config.json, but goes by the folder's name
        # as soon as that says llama or gemma. So it gets a folder without a name.
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
            if any(name in folder.lower() for name in ("llama", "gemma")):
                raise ValueError(
                    f"the folder for temporary files is {folder}, and TransformerLens "
                    "takes a path with llama or gemma in it for that model; set TMPDIR "
                    "to another place"
                )
            config.save_pretrained(folder)
            described = Path(folder, "config.json")
            fields = json.loads(described.read_text())
            fields["architectures"] = [architecture]
            # TransformerLens asks for the name that GPT-2 configs had before.
            if "n_positions" in fields:
                fields.setdefault("n_ctx", fields["n_positions"])
            described.write_text(json.dumps(fields))
            try:
                made = lens.convert_hf_model_config(folder)
            except (AttributeError, KeyError, NotImplementedError) as error:
                raise _NotConverted(f"it does not know {architecture}") from error
    if made.get("positional_embedding_type") == "rotary":
        made["n_ctx"] = min(made["n_ctx"], _CONTEXT)
    made |= {
        "model_name": Path(config.name_or_path or architecture).name,
        "init_weights": False,
        "dtype": dtype,
        "device": "cpu",
        "tokenizer_name": None,  # ours is given with every pass
    }
    return HookedTransformerConfig.from_dict(made)


def _gemma2(c: PretrainedConfig) -> dict[str, object]:
    """Gemma-2 of any size; TransformerLens knows three by name and none by config."""
    kinds = {"sliding_attention": "local", "full_attention": "global"}
    return {
        "n_layers": c.num_hidden_layers,
        "d_model": c.hidden_size,
        "d_head": c.head_dim,
        "n_heads": c.num_attention_heads,
        "n_key_value_heads": c.num_key_value_heads,
        "d_mlp": c.intermediate_size,
        "d_vocab": c.vocab_size,
        "n_ctx": c.max_position_embeddings,
        "eps": c.rms_norm_eps,
        "act_fn": "gelu_pytorch_tanh",
        "normalization_type": "RMS",
        "final_rms": True,
        "use_normalization_before_and_after": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": c.head_dim,
        "rotary_base": c.rope_parameters["rope_theta"],
        "rotary_adjacent_pairs": False,
        "use_attn_scale": True,
        "attn_scale": c.query_pre_attn_scalar**0.5,
        "use_local_attn": True,
        "window_size": c.sliding_window,
        "attn_types": [kinds[kind] for kind in c.layer_types],
        "attn_scores_soft_cap": c.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": c.final_logit_softcapping or -1.0,
        "original_architecture": "Gemma2ForCausalLM",
    }


def _weights(
    model: PreTrainedModel, cfg: HookedTransformerConfig
) -> dict[str, torch.Tensor]:
    # Any path will do where the model is given, but TransformerLens asks for one.
    return lens.get_pretrained_state_dict(
        tempfile.gettempdir(), cfg, hf_model=model, dtype=cfg.dtype
    )


def _filled(
    hooked: HookedTransformer, weights: dict[str, torch.Tensor], wanted: set[str]
) -> HookedTransformer:
    if wanted:
        flags = {name: name in wanted for name in PROCESSING}
        hooked.load_and_process_state_dict(weights, **flags)
        return hooked
    # One weight after the other, each let go of at once: two whole copies of a model
    # beside its SAEs are what memory runs out at.
    places = hooked.state_dict()
    # A bias that a family has not is zero, as TransformerLens makes it.
    made = {n for n in places if n.rsplit(".", 1)[-1].startswith(("b_", *_MADE_ANEW))}
    missing = sorted(set(places) - set(weights) - made)
    if missing:
        raise _NotConverted(f"no weights came out for {', '.join(missing[:5])}")
    for name in list(weights):
        tensor = weights.pop(name)
        if name in places and places[name].shape != tensor.shape:
            raise _NotConverted(f"{name} came out as {tuple(tensor.shape)}")
        if name in places:
            places[name].copy_(tensor)
    return hooked
