"""How an autoencoder for each layer is found, and read."""

from __future__ import annotations

import contextlib
import difflib
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import (
    NAMED_PRETRAINED_SAE_LOADERS,
    get_conversion_loader_name,
)
from sae_lens.loading.pretrained_saes_directory import (
    get_norm_scaling_factor,
    get_pretrained_saes_directory,
    get_releases_for_repo_id,
)
from safetensors import SafetensorError
from torch import Tensor

from vlm_probe.saes.formats import convert, find, read, set_aside
from vlm_probe.saes.layer import LayerSae
from vlm_probe.saes.offers import Offer, choose, features, release_offers
from vlm_probe.saes.residency import outlines, reside
from vlm_probe.tokens import RESIDENCIES, check_names
from vlm_probe.weights import floating


def load_saes(
    source: str | Path,
    *,
    layers: Sequence[int] | None = None,
    width: int | str | None = None,
    l0: float | None = None,
    hook_point: str | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
    residency: str = "auto",
) -> Mapping[int, LayerSae]:
    """Loads the SAEs of some layers, one a layer, all at one hook point.

    Args:
        source: A folder, in which SAEs are looked for in the formats of
            `vlm_probe.saes.formats`, or a release in the list of SAELens, such as
            `gemma-scope-2b-pt-res-canonical`.
        layers: Which are wanted; all that there are if not given.
        width: Number of features, such as 16384 or "16k", where there are several.
        l0: Where there are several, the SAE with the nearest L0 is taken.
        hook_point: resid_pre, resid_mid or resid_post; if not given, the only one there
            is, else resid_post if it has all the layers.
        device: Where they are computed.
        dtype: In what they are computed, whatever they are stored in.
        residency: "memory" holds all; "streamed" holds the one in use and reads the
            next ahead; "auto" holds all that leave room for the rest (see
            `vlm_probe.saes.residency`).

    Returns:
        The SAEs by layer, in order: a dictionary, or a `StreamedSaes`.

    Raises:
        FileNotFoundError: There is no such folder, a file of an SAE is missing, or the
            hub cannot be reached.
        ValueError: There is no such release, layer, width, hook point or residency, or
            the choice is not clear; a file is damaged; or an SAE is not of a residual
            stream.
    """
    check_names("residency", [residency], RESIDENCIES)
    asked = None if width is None else features(width)
    dtype = str(floating(dtype)).removeprefix("torch.")
    wanted = {"layers": layers, "width": asked, "l0": l0, "hook_point": hook_point}
    offers, reader = (
        _from_folder(Path(source), wanted)
        if Path(source).is_dir() or isinstance(source, Path)
        else _from_release(source, wanted)
    )
    found = reside(
        {o.layer: partial(reader, o, device=device, dtype=dtype) for o in offers},
        {o.layer: o.width for o in offers},
        residency=residency,
        device=device,
    )
    for sae in outlines(found).values():
        if asked not in (None, sae.n_features):
            raise ValueError(
                f"SAE {sae.name!r} has {sae.n_features} features, asked for were "
                f"{asked}"
            )
    return found


Chosen = tuple[list[Offer], Callable[..., LayerSae]]
"""What was chosen, and what reads one of it: to be given a device and a dtype."""


def _from_folder(folder: Path, wanted: dict) -> Chosen:
    if not folder.is_dir():
        raise FileNotFoundError(f"no SAEs in {folder}: there is no such folder")
    offers = {offer.name: offer for offer in find(folder)}
    if not offers:
        raise FileNotFoundError(
            f"no SAEs in {folder}: expected folders layer_0, layer_1, ... each with "
            "cfg.json and sae_weights.safetensors, or with the files of Gemma Scope, "
            "Llama Scope, dictionary_learning or sparsify"
        )
    chosen = choose(list(offers.values()), str(folder), **wanted)

    def reader(offer: Offer, *, device: str, dtype: str) -> LayerSae:
        sae = read(offers[offer.name], device=device, dtype=dtype)
        name = f"{folder.absolute().name}/{offer.name}"
        return LayerSae(offer.layer, sae, name, str(offer.hook_point))

    return chosen, reader


def _from_release(release: str, wanted: dict) -> Chosen:
    directory = get_pretrained_saes_directory()
    if release not in directory:
        near = get_releases_for_repo_id(release) or difflib.get_close_matches(
            release, directory, 4, 0.5
        )
        raise (FileNotFoundError if "/" in release and not near else ValueError)(
            f"there is no folder {release!r}, nor has SAELens a release of that name"
            + (f"; near it are {', '.join(near)}" if near else "")
        )
    about = directory[release]

    def reader(offer: Offer, *, device: str, dtype: str) -> LayerSae:
        sae = _fetch(release, offer.name, device, dtype)
        metadata = sae.cfg.metadata
        # sae-lens loses them where the config is newer than its version 6.
        metadata.model_name = metadata.model_name or about.model
        metadata.neuronpedia_id = about.neuronpedia_id[offer.name]
        processing = (about.config_overrides or {}).get("model_from_pretrained_kwargs")
        metadata.model_from_pretrained_kwargs = (
            processing or metadata.model_from_pretrained_kwargs
        )
        name = f"{release}/{offer.name}"
        return LayerSae(offer.layer, sae, name, str(offer.hook_point))

    return choose(release_offers(about), f"release {release!r}", **wanted), reader


def _fetch(release: str, sae_id: str, device: str, dtype: str) -> SAE:
    about = get_pretrained_saes_directory()[release]
    where = f"{about.repo_id}, {about.saes_map[sae_id]}"
    files = _FILES.get(about.conversion_func or "")
    load = (
        partial(_from_hub, files)
        if files
        else NAMED_PRETRAINED_SAE_LOADERS[get_conversion_loader_name(release)]
    )
    processing = None

    def converter(**given: object) -> tuple[dict, dict[str, Tensor], Tensor | None]:
        nonlocal processing
        config, weights, sparsity = load(**given)
        processing = set_aside(config)
        scaling = config.get("normalize_activations")
        if (
            scaling == "expected_average_only_in"
            and get_norm_scaling_factor(release, sae_id) is None
        ):
            raise ValueError(
                f"SAE {sae_id!r} of release {release!r} was trained on activations "
                f"normalized by {scaling!r}, and SAELens does not know the factor, so "
                "every code would be wrong; take another release, or a folder of "
                "these files with norm_scaling_factor in cfg.json"
            )
        return config, weights, sparsity

    try:
        sae = SAE.from_pretrained(
            release, sae_id, device=device, dtype=dtype, converter=converter
        )
    except (OSError, EntryNotFoundError) as error:
        raise FileNotFoundError(
            f"SAE {sae_id!r} of release {release!r} is neither in the cache nor to be "
            f"had from the Hugging Face hub ({_first_line(error)}); load it once with "
            f"network, which keeps it, or give a folder with the files ({where})"
        ) from error
    except (SafetensorError, zipfile.BadZipFile, EOFError, pickle.PickleError) as error:
        raise ValueError(
            f"SAE {sae_id!r} of release {release!r} is damaged in the cache "
            f"({_first_line(error)}); delete it there ({where}) and load it again"
        ) from error
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"sae-lens cannot run SAE {sae_id!r} of release {release!r} ({where}): "
            f"{error!r}"
        ) from error
    sae.cfg.metadata.model_from_pretrained_kwargs = processing
    return sae


# What `formats.py` reads here too: for Llama Scope, sae-lens takes a threshold that is
# too high; for Gemma Scope 2, it asks the hub even for what is in the cache.
_FILES = {
    "llama_scope": ("hyperparams.json", "checkpoints/final.safetensors"),
    "gemma_3": ("config.json", "params.safetensors"),
}


def _from_hub(
    files: Sequence[str],
    repo_id: str,
    folder_name: str,
    device: str,  # noqa: ARG001 - sae-lens moves the weights itself
    force_download: bool,
    cfg_overrides: dict,
) -> tuple[dict, dict[str, Tensor], None]:
    """A loader for sae-lens: a folder of the cache is read as any other."""
    fetch = partial(hf_hub_download, repo_id, force_download=force_download)
    config, weights = (f"{folder_name}/{name}" for name in files)
    with contextlib.suppress(EntryNotFoundError):  # not all of Gemma Scope 2 have one
        fetch(config)
    folder = Path(fetch(weights)).parents[files[-1].count("/")]
    about, tensors = convert(find(folder)[0])
    return about | cfg_overrides, tensors, None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
