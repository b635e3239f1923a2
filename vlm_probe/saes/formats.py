"""The formats in which sparse autoencoders are published.

Each is known by its files, which lie in a folder of their own:

- SAELens: `cfg.json`, `sae_weights.safetensors`;
- Gemma Scope: `params.npz` alone, the names of folders say the rest;
- Gemma Scope 2: `params.safetensors`, most often with `config.json`;
- Llama Scope: `hyperparams.json`, `checkpoints/final.safetensors`;
- dictionary_learning: `config.json`, `ae.pt`;
- sparsify: `cfg.json`, `sae.safetensors`.

All become SAEs of sae-lens. Of its loaders only the one for its own format reads
folders and reads them right: the others download, and that of sparsify transposes the
decoder and forgets to take `b_dec` off the input. So every other format has a function
here that says what sae-lens is to compute, after the code it was published with.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sae_lens
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm_probe.saes.offers import HOOK_POINTS, Offer, place
from vlm_probe.weights import read_json, read_weights

Weights = dict[str, Tensor]


class Recipe(NamedTuple):
    """What a format says of an SAE."""

    place: tuple[int | None, str | None]
    """Layer and hook point, as far as anything but folders' names says them."""
    width: int
    l0: float | None
    """How many features are non-zero at a token, or k, if known."""
    metadata: dict
    """What is known of the language model."""
    config: dict
    """Of sae-lens, without the sizes."""
    convert: Callable[[Weights], Weights] | None
    """To sae-lens' names and shapes; None if they are so already, and so the config."""
    factor: float | None = None
    """With what activations are multiplied, where the weights do not yet do that."""


@dataclass(frozen=True)
class Found(Offer):
    """An SAE in a folder."""

    folder: Path
    file: Path
    """Its weights."""
    recipe: Recipe


def find(root: Path) -> list[Found]:
    """All SAEs in a folder and its subfolders, in the order of their paths.

    Raises:
        FileNotFoundError: One of the files that a format has is missing.
        ValueError: A config cannot be read, or does not say what it should.
    """
    files = sorted(file for file in root.rglob("*") if file.is_file())
    for config in files:
        wanted = [form.weights for form in _FORMATS if form.config == config.name]
        # A config.json beside no weights is a language model's, or a whole run's.
        if config.name == "config.json" or not wanted:
            continue
        if not any((config.parent / weights).is_file() for weights in wanted):
            raise FileNotFoundError(
                f"{config.parent} has {config.name}, but no {' or '.join(wanted)}: a "
                "part of an SAE is missing"
            )
    return [
        _found(root, file, form)
        for file in files
        for form in _FORMATS
        if f"/{file.as_posix()}".endswith(f"/{form.weights}")
    ]


def read(found: Found, *, device: str, dtype: str) -> SAE:
    """The SAE with its weights.

    Raises:
        ValueError: The weights are damaged, or not those that the config speaks of.
    """
    own = found.recipe.convert is None
    if own:
        _shapes(found.file)  # so that a damaged file is told by its name
    config, weights = ({}, {}) if own else convert(found)
    config |= {"device": "cpu", "dtype": dtype}
    try:
        if own:
            config, weights = sae_lens_disk_loader(found.folder, cfg_overrides=config)
        processing = set_aside(config)
        sae = SAE.load_from_disk(
            found.folder, dtype=dtype, converter=lambda *_, **__: (config, weights)
        )
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"sae-lens cannot run what {found.file} and its config describe: {error!r}"
        ) from error
    sae.cfg.metadata.model_from_pretrained_kwargs = processing
    if found.recipe.factor is not None:
        sae.fold_activation_norm_scaling_factor(found.recipe.factor)
    return sae.to(device=device)


def convert(found: Found) -> tuple[dict, Weights]:
    """Config and weights of sae-lens, for a format other than its own.

    Raises:
        ValueError: The weights are damaged or incomplete.
    """
    recipe, file = found.recipe, found.file
    if recipe.convert is None:
        raise ValueError(f"{found.folder} is in sae-lens' own format")
    stored = _arrays(file) if file.suffix == ".npz" else read_weights(file)[0]
    try:
        weights = {k: v.contiguous() for k, v in recipe.convert(stored).items()}
    except KeyError as error:
        raise ValueError(
            f"{file} lacks {error}; it holds {', '.join(sorted(stored))}"
        ) from error
    layer, point = recipe.place
    known = layer is not None and point in HOOK_POINTS
    metadata = {
        # Without it, sae-lens takes the config for one from before its version 6.
        "sae_lens_version": sae_lens.__version__,
        "sae_lens_training_version": None,
        "hook_name": f"blocks.{layer}.hook_{point}" if known else None,
    }
    d_in, d_sae = weights["W_enc"].shape
    sizes = {"d_in": d_in, "d_sae": d_sae, "normalize_activations": "none"}
    return recipe.config | sizes | {"metadata": metadata | recipe.metadata}, weights


def set_aside(config: dict) -> dict | None:
    """Takes out of a config how the language model was processed, and gives that.

    sae-lens would warn of it; `LayerSae` makes more of it, so it is put back once the
    SAE is made. Nothing filters the warning instead, since filters are the whole
    process's, and SAEs are read in the background too.
    """
    about = config.get("metadata", config)  # before version 6 it was all one
    return about.pop("model_from_pretrained_kwargs", None)


def _saelens(folder: Path, config: dict) -> Recipe:
    about = config.get("metadata", config)  # before version 6 it was all one
    architecture = config.get("architecture", "standard")
    if architecture in ("batchtopk", "matryoshka_batchtopk"):
        raise ValueError(
            f"{folder} holds an SAE in training ({architecture}), whose codes depend "
            "on the rest of a batch; save_inference_model makes a JumpReLU of it"
        )
    # Its trainer folds the factor in at the end, and its loader for the hub from a
    # list of its own; its loader for folders would compute without.
    folded = config.get("normalize_activations") != "expected_average_only_in"
    return Recipe(
        place(about.get("hook_name", about.get("hook_point"))),
        config["d_sae"],
        _number(about.get("l0")),
        {},
        {},
        None,
        None if folded else _factor(folder, config),
    )


def _factor(folder: Path, config: dict) -> float:
    scaler = folder / "activation_scaler.json"  # as sae-lens leaves it in a checkpoint
    for said in (
        config,
        config.get("metadata", {}),
        {"norm_scaling_factor": _json(scaler).get("scaling_factor")},
    ):
        if said.get("norm_scaling_factor") is not None:
            return float(said["norm_scaling_factor"])
    raise ValueError(
        f"{folder / 'cfg.json'} asks for normalize_activations "
        "'expected_average_only_in', but nothing says the factor that activations are "
        "multiplied with, and without it every code is wrong; write it there as "
        "norm_scaling_factor (sqrt(d_in) / mean norm of the activations in training), "
        f"or put the trainer's {scaler.name} beside it; if this is a copy from a "
        "release of SAELens, load it by the release's name, where the factor is known"
    )


def _gemma_scope(folder: Path, _: dict) -> Recipe:
    path = str(folder.absolute())
    made = re.search(r"gemma-scope-(\d+b)-(pt|it)-([a-z]+)", path)
    point = model = None
    if made:
        kinds = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out"}
        point = kinds.get(made[3], made[3])
        model = f"gemma-2-{made[1]}" + ("-it" if made[2] == "it" else "")
    average = re.search(r"average_l0_(\d+)", path)
    return Recipe(
        (None, "embedding" if "embedding" in folder.parts else point),
        len(_arrays(folder / "params.npz", "b_enc")["b_enc"]),
        float(average[1]) if average else None,
        {"model_name": model, "prepend_bos": True},
        _JUMPRELU,
        _by_case,
    )


def _gemma_scope_2(folder: Path, _: dict) -> Recipe:
    path, beside = str(folder.absolute()), _json(folder / "config.json")
    layer, point = place(beside.get("hf_hook_point_in"))
    if "hf_hook_point_out" in beside:
        point = "transcoder"
    elif point is None:
        said = re.findall("resid_post|transcoder|clt|attn_out|mlp_out", path)
        point = said[-1] if said else None
    made = re.search(r"gemma-scope-2-(\d+m?b?-[pi]t)", path)
    model = beside.get("model_name", "").split("/")[-1].replace("-v3", "-3")
    model = f"gemma-3-{made[1]}" if made else model
    if model:  # the smallest is published without the -pt that the others have
        model = f"google/{model.replace('270m-pt', '270m')}"
    return Recipe(
        (layer, point),
        _shapes(folder / "params.safetensors")["b_enc"][0],
        _number(beside.get("l0")),
        {"model_name": model or None, "prepend_bos": True},
        _JUMPRELU,
        _by_case,
    )


def _llama_scope(folder: Path, config: dict) -> Recipe:
    """The threshold is one number, for the raw stream and a decoder of unit norm.

    sae-lens forgets the decoder's norm, half as large again in the published weights.
    """
    usual = {"act_fn": "jumprelu", "norm_activation": "dataset-wise"}
    usual["use_glu_encoder"] = False
    other = {k: config[k] for k, v in usual.items() if config.get(k, v) != v}
    if other:
        raise ValueError(
            f"{folder / 'hyperparams.json'} has {other}; known is {usual}, as Llama "
            "Scope was published"
        )
    weighted = config["sparsity_include_decoder_norm"]
    norms = config["dataset_average_activation_norm"]
    scale = math.sqrt(config["d_model"]) / norms["in"]

    def to_saelens(stored: Weights) -> Weights:
        stored = {name: tensor.float() for name, tensor in stored.items()}
        decoder = stored["decoder.weight"].T
        norm = decoder.norm(dim=1) if weighted else torch.ones(len(decoder))
        return {
            "W_enc": stored["encoder.weight"].T * scale,
            "b_enc": stored["encoder.bias"],
            "W_dec": decoder / scale,
            "b_dec": stored["decoder.bias"] / scale,
            "threshold": config["jump_relu_threshold"] * scale / norm,
        }

    layer, point = place(config["hook_point_in"])
    if config.get("hook_point_out", config["hook_point_in"]) != config["hook_point_in"]:
        point = "transcoder"
    published = "Llama3_1-8B-Base" in str(folder.absolute())
    model = "meta-llama/Llama-3.1-8B" if published else None
    first = config.get("apply_decoder_bias_to_pre_encoder", False)
    return Recipe(
        (layer, point),
        config["d_sae"],
        _number(config.get("top_k")),
        {"model_name": model, "prepend_bos": True},
        {"architecture": "jumprelu", "apply_b_dec_to_input": first},
        to_saelens,
    )


def _dictionary_learning(folder: Path, config: dict) -> Recipe:
    trainer, buffer = config["trainer"], config.get("buffer", {})
    kind, module = trainer["dict_class"], trainer.get("submodule_name")
    if kind not in _DICTIONARIES:
        raise ValueError(
            f"{folder / 'config.json'} is of dict_class {kind!r}; known are "
            f"{', '.join(_DICTIONARIES)}"
        )
    architecture, b_dec_first = _DICTIONARIES[kind]
    point = re.sub(r"_layer_?\d+$", "", module) if module else None
    if buffer.get("io", "out") != "out":
        point = "resid_pre" if buffer["io"] == "in" else "transcoder"
    sparsity = {"k": trainer["k"]} if architecture == "topk" else {}

    def to_saelens(stored: Weights) -> Weights:
        weights = {_DICTIONARY.get(name, name): stored[name] for name in stored}
        if "encoder.weight" in stored:  # of a Linear, which has it transposed
            weights |= {name: weights[name].T for name in ("W_enc", "W_dec")}
        if architecture == "jumprelu":  # BatchTopK has one threshold for all
            every = weights["threshold"].expand(len(weights["b_enc"]))
            weights["threshold"] = every
        return {name: weights[name] for name in _STATE[architecture]}

    return Recipe(
        (trainer["layer"], point),
        trainer["dict_size"],
        _number(trainer.get("k")),
        {"model_name": trainer.get("lm_name")},
        {"architecture": architecture, "apply_b_dec_to_input": b_dec_first} | sparsity,
        to_saelens,
    )


def _sparsify(folder: Path, config: dict) -> Recipe:
    if config.get("activation", "topk") != "topk":
        raise ValueError(
            f"{folder / 'cfg.json'} has activation {config['activation']!r}; known is "
            "'topk'"
        )
    hook = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    layer, point = place(re.sub("^layer_", "layers.", hook.name))
    if config.get("transcode") or config.get("skip_connection"):
        point = "transcoder"
    return Recipe(
        (layer, point),
        config.get("num_latents") or config["d_in"] * config["expansion_factor"],
        _number(config["k"]),
        {"model_name": _json(hook.absolute().parent / "config.json").get("model")},
        {
            "architecture": "abstopk" if config.get("signed") else "topk",
            "apply_b_dec_to_input": True,
            "k": config["k"],
        },
        lambda stored: {
            "W_enc": stored["encoder.weight"].T,
            "b_enc": stored["encoder.bias"],
            "W_dec": stored["W_dec"],
            "b_dec": stored["b_dec"],
        },
    )


_STATE = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
}
_JUMPRELU = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
# Architecture, and whether b_dec is first taken off the input.
_DICTIONARIES = {
    "AutoEncoder": ("standard", True),
    "AutoEncoderNew": ("standard", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
}
_DICTIONARY = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
    "decoder_bias": "b_dec",
    "bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}


class _Format(NamedTuple):
    name: str
    weights: str
    config: str | None
    recipe: Callable[[Path, dict], Recipe]


_FORMATS = (
    _Format("SAELens", "sae_weights.safetensors", "cfg.json", _saelens),
    _Format("Gemma Scope", "params.npz", None, _gemma_scope),
    _Format("Gemma Scope 2", "params.safetensors", None, _gemma_scope_2),
    _Format(
        "Llama Scope", "checkpoints/final.safetensors", "hyperparams.json", _llama_scope
    ),
    _Format("dictionary_learning", "ae.pt", "config.json", _dictionary_learning),
    _Format("sparsify", "sae.safetensors", "cfg.json", _sparsify),
)


_EMBEDDING = r"(^|[._])(embedding|embed|pos_embed|embed_tokens|embed_in|wte|wpe)$"
"""What comes before the first block, as published SAEs and models name it."""


def _found(root: Path, file: Path, form: _Format) -> Found:
    folder = file.parents[form.weights.count("/")]
    config = folder / form.config if form.config else None
    if config and not config.is_file():
        raise FileNotFoundError(
            f"{config} is missing: {file} is of an SAE of {form.name}, which has both"
        )
    try:
        recipe = form.recipe(folder, _json(config) if config else {})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{config or file} does not say all that an SAE of {form.name} needs: "
            f"{error!r}"
        ) from error
    layer, point = recipe.place
    named = _named_layer(folder.relative_to(root).parts or (root.absolute().name,))
    if layer is None and re.search(_EMBEDDING, point or ""):
        named = 0  # of no layer, and so left out as what is of another place
    if layer is None and named is None:
        named = _named_layer((root.absolute().name,))
    if layer is None and named is None:
        raise ValueError(
            f"nothing says of which layer the SAE in {folder} is; name its folder "
            "layer_0, or whichever it is"
        )
    if None not in (layer, named) and layer != named:
        raise ValueError(
            f"{folder} is named after layer {named}, but what it holds is of layer "
            f"{layer}; rename it"
        )
    layer = named if layer is None else layer
    name = folder.relative_to(root).as_posix()
    recipe = recipe._replace(place=(layer, point))
    return Found(name, layer, point, recipe.width, recipe.l0, folder, file, recipe)


def _named_layer(names: tuple[str, ...]) -> int | None:
    """The layer in the nearest folder's name that has one."""
    for name in reversed(names):
        if found := re.search(r"(?<![a-z])(?:(?:layers?|blocks)[._]?|h\.)(\d+)", name):
            return int(found[1])
    return None


def _by_case(stored: Weights) -> Weights:
    """Of Gemma Scope's names, which are sae-lens' but for capitals in some files."""
    found = {name.lower(): stored[name] for name in stored}
    return {name: found[name.lower()] for name in _STATE["jumprelu"]}


def _number(said: object) -> float | None:
    return float(said) if isinstance(said, int | float) else None


def _json(file: Path) -> dict:
    """What a file says; nothing if it is not there."""
    return read_json(file) if file.is_file() else {}


def _shapes(file: Path) -> dict[str, list[int]]:
    """Shapes of what a safetensors file holds, without reading it."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return {name: opened.get_slice(name).get_shape() for name in names}
    except SafetensorError:
        read_weights(file)  # which says what is wrong with it
        raise


def _arrays(file: Path, *names: str) -> Weights:
    """The arrays of an npz file, all or some."""
    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as opened:
            wanted = names or opened.files
            return {name: torch.from_numpy(opened[name]) for name in wanted}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{file} is damaged, or no npz file of arrays ({error}); copy or download "
            "it again (`git lfs pull`, if it is a Git LFS pointer)"
        ) from error
