"""A pretrained autoencoder with its layer, and how one for each layer is loaded."""

from __future__ import annotations

import contextlib
import difflib
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import (
    get_pretrained_saes_directory,
    get_releases_for_repo_id,
)
from safetensors import SafetensorError
from torch import Tensor

from vlm_probe.codes import SparseCodes, code
from vlm_probe.saes.formats import convert, find, quietly, read
from vlm_probe.saes.offers import choose, features, place, release_offers
from vlm_probe.tokens import ENCODINGS, HOOK_POINTS, check_names
from vlm_probe.weights import floating

_ARCHITECTURES = (
    "standard",
    "jumprelu",
    "topk",
    "gated",
    "abstopk",
    "matching_pursuit",
)
"""Those that code each token by itself, and reconstruct what they were given."""


@dataclass(frozen=True)
class LayerSae:
    """A pretrained SAE and the layer whose residual stream it was trained on."""

    layer: int
    """Number of the block, from 0."""
    sae: SAE
    """The sae_lens object."""
    name: str
    """Where it came from, for tables."""
    hook_point: str = "resid_post"
    """Where in its block: resid_pre, resid_mid or resid_post."""

    def __post_init__(self) -> None:
        if self.hook_point not in HOOK_POINTS:
            raise ValueError(
                f"SAE {self.name!r} is for {self.hook_point!r}; valid: "
                f"{', '.join(HOOK_POINTS)}"
            )
        hook = self.sae.cfg.metadata.hook_name
        if hook is not None and place(hook) != (self.layer, self.hook_point):
            raise ValueError(
                f"SAE {self.name!r} was trained on {hook!r}, expected "
                f"{self._hook_name!r} for layer {self.layer}"
            )
        architecture = self.sae.cfg.architecture()
        if architecture not in _ARCHITECTURES:
            raise ValueError(
                f"SAE {self.name!r} is of architecture {architecture!r}; known are "
                f"{', '.join(_ARCHITECTURES)}, which code each token by itself and "
                "reconstruct what they code"
            )
        # sae-lens runs these two as if there were nothing to normalize.
        scaling = self.sae.cfg.normalize_activations
        if scaling in ("expected_average_only_in", "covariance_whitening"):
            raise ValueError(
                f"SAE {self.name!r} was trained on activations normalized by "
                f"{scaling!r}, and its weights do not do that yet, so every code would "
                "be wrong; call its fold_activation_norm_scaling_factor or "
                "fold_activation_whitening with what was measured in training"
            )
        self.sae.eval().requires_grad_(False)

    @property
    def d_model(self) -> int:
        """Width of the activations that it codes."""
        return self.sae.cfg.d_in

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.sae.cfg.d_sae

    @property
    def model_name(self) -> str | None:
        """The language model that it was trained on, if known."""
        return self.sae.cfg.metadata.model_name

    @property
    def processing(self) -> dict:
        """How that model's weights were processed, as arguments of TransformerLens."""
        return dict(self.sae.cfg.metadata.model_from_pretrained_kwargs or {})

    @property
    def prepend_bos(self) -> bool | None:
        """Whether the texts it was trained on began with BOS, if known."""
        return self.sae.cfg.metadata.prepend_bos

    @property
    def neuronpedia_id(self) -> str | None:
        """Under which name Neuronpedia shows its features, if it does."""
        return self.sae.cfg.metadata.neuronpedia_id

    def code(
        self, x: Float[Tensor, "token d_model"], *, encoding: str = "auto"
    ) -> tuple[SparseCodes, Float[Tensor, "token d_model"]]:
        """Sparse codes of activations, and their reconstructions.

        Args:
            x: Activations of its hook point.
            encoding: "auto", "dense" or "screened"; see `vlm_probe.codes.code`.
        """
        check_names("encoding", [encoding], ENCODINGS)
        return code(self.sae, x, encoding=encoding)

    def save(self, folder: str | Path) -> None:
        """Writes it as sae-lens does, with its place, for `load_saes`."""
        self.sae.cfg.metadata.hook_name = self._hook_name
        self.sae.save_model(folder)

    @property
    def _hook_name(self) -> str:
        return f"blocks.{self.layer}.hook_{self.hook_point}"


def load_saes(
    source: str | Path,
    *,
    layers: Sequence[int] | None = None,
    width: int | str | None = None,
    l0: float | None = None,
    hook_point: str | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
) -> dict[int, LayerSae]:
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

    Returns:
        The SAEs by layer, in order.

    Raises:
        FileNotFoundError: There is no such folder, a file of an SAE is missing, or the
            hub cannot be reached.
        ValueError: There is no such release, layer, width or hook point, or the choice
            is not clear; a file is damaged; or an SAE is not of a residual stream.
    """
    asked = None if width is None else features(width)
    dtype = str(floating(dtype)).removeprefix("torch.")
    wanted = {"layers": layers, "width": asked, "l0": l0, "hook_point": hook_point}
    found = (
        _from_folder(Path(source), wanted, device, dtype)
        if Path(source).is_dir() or isinstance(source, Path)
        else _from_release(source, wanted, device, dtype)
    )
    for sae in found.values():
        if asked not in (None, sae.n_features):
            raise ValueError(
                f"SAE {sae.name!r} has {sae.n_features} features, asked for were "
                f"{asked}"
            )
    return found


def _from_folder(
    folder: Path, wanted: dict, device: str, dtype: str
) -> dict[int, LayerSae]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no SAEs in {folder}: there is no such folder")
    offers = {offer.name: offer for offer in find(folder)}
    if not offers:
        raise FileNotFoundError(
            f"no SAEs in {folder}: expected folders layer_0, layer_1, ... each with "
            "cfg.json and sae_weights.safetensors, or with the files of Gemma Scope, "
            "Llama Scope, dictionary_learning or sparsify"
        )
    return {
        offer.layer: LayerSae(
            offer.layer,
            read(offers[offer.name], device=device, dtype=dtype),
            f"{folder.absolute().name}/{offer.name}",
            offer.hook_point,
        )
        for offer in choose(list(offers.values()), str(folder), **wanted)
    }


def _from_release(
    release: str, wanted: dict, device: str, dtype: str
) -> dict[int, LayerSae]:
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
    found = {}
    offers = release_offers(about)
    for offer in choose(offers, f"release {release!r}", **wanted):
        sae = _fetch(release, offer.name, device, dtype)
        metadata = sae.cfg.metadata
        # sae-lens loses them where the config is newer than its version 6.
        metadata.model_name = metadata.model_name or about.model
        metadata.neuronpedia_id = about.neuronpedia_id[offer.name]
        processing = (about.config_overrides or {}).get("model_from_pretrained_kwargs")
        metadata.model_from_pretrained_kwargs = (
            processing or metadata.model_from_pretrained_kwargs
        )
        found[offer.layer] = LayerSae(
            offer.layer, sae, f"{release}/{offer.name}", offer.hook_point
        )
    return found


def _fetch(release: str, sae_id: str, device: str, dtype: str) -> SAE:
    about = get_pretrained_saes_directory()[release]
    where = f"{about.repo_id}, {about.saes_map[sae_id]}"
    files = _FILES.get(about.conversion_func or "")
    try:
        with quietly():
            return SAE.from_pretrained(
                release,
                sae_id,
                device=device,
                dtype=dtype,
                converter=partial(_from_hub, files) if files else None,
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
