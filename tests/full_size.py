"""The paper's setup at its full size, with random weights, from files as published.

No test, but a script: with `--work DIR --write` it writes some 8 GB (Gemma-2-2B's shape
in bfloat16, an SAE of 16,384 features linked for each of 26 layers, a ViT-L/14, a
projector); with `--work DIR` it then loads them as a user would, examines them, probes
one picture, and prints time and peak memory by step. The tokenizer is a small one.
"""

import argparse
import os
import resource
import time
from contextlib import contextmanager
from pathlib import Path

import hub
import numpy as np
import torch
import transformers

LAYERS, D_MODEL, FEATURES = 26, 2304, 16384


@contextmanager
def timed(what):
    begun = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:<28}{time.perf_counter() - begun:8.1f} s   peak {peak:6.2f} GiB")


def write_language(folder):
    words = hub.tokenizer("gemma2")
    config = transformers.Gemma2Config()  # its defaults are the 2B model's shape
    shape = (config.num_hidden_layers, config.hidden_size, config.vocab_size)
    assert shape == (LAYERS, D_MODEL, 256_000), shape
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    words.save_pretrained(folder)


def write_vision(folder):
    import json

    import open_clip
    from safetensors.torch import save_file

    model = open_clip.create_model("ViT-L-14-quickgelu")
    folder.mkdir(parents=True)
    described = {
        "model_cfg": open_clip.get_model_config("ViT-L-14-quickgelu"),
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(model),
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described, default=str))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def write_saes(folder):
    """One file, under the name of each layer."""
    rng = np.random.default_rng(0)
    decoder = rng.standard_normal((FEATURES, D_MODEL), dtype=np.float32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    first = None
    for layer in range(LAYERS):
        file = folder / f"layer_{layer}" / "width_16k" / "average_l0_71" / "params.npz"
        file.parent.mkdir(parents=True)
        if first is not None:
            os.link(first, file)
            continue
        first = file
        np.savez(
            file,
            W_enc=np.ascontiguousarray(decoder.T),
            W_dec=decoder,
            b_enc=np.zeros(FEATURES, np.float32),
            b_dec=np.zeros(D_MODEL, np.float32),
            threshold=np.full(FEATURES, 2.0, np.float32),
        )


def write_projector(file):
    torch.manual_seed(0)
    torch.save(torch.nn.Linear(1024, D_MODEL).state_dict(), file)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--write", action="store_true", help="only write the files")
    given = parser.parse_args()
    work = given.work
    if given.write:
        work.mkdir(parents=True)
        write_language(work / "gemma-2-2b")
        write_vision(work / "ViT-L-14")
        write_saes(work / "gemma-scope-2b-pt-res")
        write_projector(work / "projector.pth")
        return

    import vlm_probe as vp

    with timed("load"):
        model = vp.load(
            language=work / "gemma-2-2b",
            vision=work / "ViT-L-14",
            adapter=work / "projector.pth",
            saes=work / "gemma-scope-2b-pt-res",
            backend=given.backend,
            dtype="bfloat16",
            device="cpu",
        )
    with timed("doctor"):
        vp.doctor(model)
    picture = hub.picture()
    with timed("probe one picture"):
        result = vp.probe_layers(model, [picture], progress=False)
    print(result.table().to_string(index=False, float_format="%.4f"))


if __name__ == "__main__":
    main()
