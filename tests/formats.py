"""Tiny SAEs in the files in which they are published, and what they compute."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

D_MODEL, FEATURES, K = 8, 32, 5
VERSION = "6.54.12"  # of sae-lens: before 6, the config was one flat dictionary


def weights(seed=0, d_model=D_MODEL, features=FEATURES):
    """Random weights of every architecture, by sae-lens' names; no norm is one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "W_enc": draw(d_model, features) * 0.5,
        "b_enc": draw(features) * 0.3,
        "W_dec": draw(features, d_model) * draw(features, 1),
        "b_dec": draw(d_model),
        "threshold": 0.2 + torch.rand(features, generator=generator),
        "b_gate": draw(features) * 0.3,
        "b_mag": draw(features) * 0.3,
        "r_mag": draw(features) * 0.5,
    }


STATE = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
}


def expected(x, w, architecture, *, b_dec_first, normalize="none", factor=1.0):
    """Codes and reconstructions of an architecture, in float64.

    Args:
        x: Activations, (token, d_model).
        w: Weights by sae-lens' names.
        factor: What activations are multiplied with in expected_average_only_in.
    """
    w = {name: tensor.double() for name, tensor in w.items()}
    x = x.double()
    mean, scale = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    if normalize == "layer_norm":
        mean = x.mean(1, keepdim=True)
        scale = x.std(1, keepdim=True)
        x = (x - mean) / (scale + 1e-5)
    elif normalize == "expected_average_only_in":
        scale = torch.full((len(x), 1), 1 / factor)
        x = x * factor
    inside = x - w["b_dec"] if b_dec_first else x
    if architecture == "gated":
        gate = inside @ w["W_enc"] + w["b_gate"] > 0
        size = (inside @ w["W_enc"]) * w["r_mag"].exp() + w["b_mag"]
        codes = gate * size.relu()
    else:
        pre = inside @ w["W_enc"] + w["b_enc"]
        codes = {
            "standard": lambda: pre.relu(),
            "jumprelu": lambda: pre.relu() * (pre > w["threshold"]),
            "topk": lambda: largest(pre, pre).relu(),
            "abstopk": lambda: largest(pre, pre.abs()),
        }[architecture]()
    return codes, (codes @ w["W_dec"] + w["b_dec"]) * scale + mean


def largest(values, by):
    """All but the K largest at each token set to zero."""
    kept = torch.zeros_like(values, dtype=torch.bool)
    kept.scatter_(1, by.argsort(1, descending=True)[:, :K], True)
    return values * kept


def cached(cache, repo_id):
    """The folder of a repository in a cache of the Hugging Face hub, made if need be.

    Files written there are found by `hf_hub_download`, as if downloaded before.
    """
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    folder = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    folder.mkdir(parents=True, exist_ok=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(folder.name)
    return folder


def write_json(file, about):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about))


def write_tensors(file, tensors):
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if file.suffix == ".npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)


def write_saelens(folder, w, architecture="standard", *, hook_name=None, **config):
    """As `SAE.save_model` of sae-lens 6 writes it."""
    names = ("W_enc", "W_dec", "b_dec", *STATE[architecture])
    d_in, d_sae = w["W_enc"].shape
    about = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    about |= {"k": K} if "topk" in architecture else {}
    metadata = {"sae_lens_version": VERSION, "hook_name": hook_name}
    metadata |= config.pop("metadata", {})
    write_json(folder / "cfg.json", about | {"metadata": metadata} | config)
    write_tensors(folder / "sae_weights.safetensors", {n: w[n] for n in names})


def write_old_saelens(folder, w, hook_name):
    """As sae-lens before 6 wrote it, gpt2-small-res-jb among them."""
    d_in, d_sae = w["W_enc"].shape
    about = {
        "model_name": "gpt2-small",
        "hook_point": hook_name,
        "hook_point_layer": 0,
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "torch.float32",
        "device": "mps",
        "prepend_bos": True,
        "normalize_activations": "none",
    }
    write_json(folder / "cfg.json", about)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    write_tensors(folder / "sae_weights.safetensors", {n: w[n] for n in names})


def write_qwen_scope(file, w):
    """Of Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50: layer3.sae.pt."""
    tensors = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T}
    write_tensors(file, tensors | {name: w[name] for name in ("b_enc", "b_dec")})


JUMPRELU = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def write_gemma_scope(folder, w):
    """Of google/gemma-scope-2b-pt-res: layer_3/width_16k/average_l0_71."""
    write_tensors(folder / "params.npz", {name: w[name] for name in JUMPRELU})


def write_gemma_scope_2(folder, w, config=None):
    """Of google/gemma-scope-2-1b-pt: resid_post_all/layer_3_width_16k_l0_small."""
    tensors = {name.lower(): w[name] for name in JUMPRELU}
    write_tensors(folder / "params.safetensors", tensors)
    if config is not None:
        write_json(folder / "config.json", config)


def write_llama_scope(folder, w, hook_name, **changed):
    """Of fnlp/Llama3_1-8B-Base-LXR-8x: Llama3_1-8B-Base-L3R-8x."""
    d_in, d_sae = w["W_enc"].shape
    about = {
        "dtype": "torch.bfloat16",
        "hook_point_in": hook_name,
        "hook_point_out": hook_name,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "d_model": d_in,
        "d_sae": d_sae,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.53,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 7.5, "out": 7.5},
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "top_k": 50,
    }
    write_json(folder / "hyperparams.json", about | changed)
    tensors = {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "decoder.bias": w["b_dec"],
    }
    write_tensors(folder / "checkpoints" / "final.safetensors", tensors)


def write_dictionary(folder, w, kind, *, layer=3, trainer=None, buffer=None):
    """As `trainSAE` of dictionary_learning writes a class of its own."""
    d_in, d_sae = w["W_enc"].shape
    linear = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    raw = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    b_enc, k = {"encoder.bias": w["b_enc"]}, {"k": torch.tensor(K, dtype=torch.int32)}
    one = {"threshold": w["threshold"][0]}
    gated = {"gate_bias": w["b_gate"], "mag_bias": w["b_mag"], "r_mag": w["r_mag"]}
    tensors = {
        "AutoEncoder": linear | b_enc | {"bias": w["b_dec"]},
        "AutoEncoderNew": linear | b_enc | {"decoder.bias": w["b_dec"]},
        "AutoEncoderTopK": linear | b_enc | k | one | {"b_dec": w["b_dec"]},
        "BatchTopKSAE": linear | b_enc | k | one | {"b_dec": w["b_dec"]},
        "MatryoshkaBatchTopKSAE": raw | k | one | {"group_sizes": torch.tensor([32])},
        "GatedAutoEncoder": linear | gated | {"decoder_bias": w["b_dec"]},
        "JumpReluAutoEncoder": raw | {"threshold": w["threshold"]},
    }.get(kind, raw)
    about = {
        "dict_class": kind,
        "activation_dim": d_in,
        "dict_size": d_sae,
        "layer": layer,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": f"resid_post_layer_{layer}",
    }
    about |= {"k": K} if "k" in tensors else {}
    about |= trainer or {}
    context = {"d_submodule": d_in, "io": "out", "ctx_len": 128} | (buffer or {})
    write_json(folder / "config.json", {"trainer": about, "buffer": context})
    write_tensors(folder / "ae.pt", tensors)


def write_sparsify(folder, w, **changed):
    """As `SparseCoder.save_to_disk` of sparsify writes it; layers.3 in a run."""
    d_in, d_sae = w["W_enc"].shape
    about = {
        "activation": "topk",
        "expansion_factor": d_sae // d_in,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d_in,
    }
    write_json(folder / "cfg.json", about | changed)
    tensors = {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }
    write_tensors(folder / "sae.safetensors", tensors)
