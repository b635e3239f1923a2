"""Where the weights of a vision tower come from, and so what they were trained with.

The same weights fit GELU and QuickGELU, and any preprocessing; with the wrong one every
token is off by about a percent, and nothing stops. Weights themselves do not tell, so
every trace of where they come from is followed.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import open_clip
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

from vlm_probe.weights import read_json


class Origin(NamedTuple):
    """What weights were trained with."""

    quick_gelu: bool
    """QuickGELU, else GELU."""
    evidence: str
    """How that is known."""
    preprocess: dict = {}  # noqa: RUF012 - a field of a tuple, never written to
    """open_clip's `preprocess_cfg`, as far as that is known too."""


def of_tag(name: str, tag: str, evidence: str = "they are") -> Origin:
    """The origin of open_clip's pretrained weights, as it records them."""
    about = open_clip.get_pretrained_cfg(name, tag)
    preprocess = {
        key: about[key]
        for key in ("mean", "std", "interpolation", "resize_mode")
        if key in about
    }
    quick_gelu = bool(about.get("quick_gelu"))
    return Origin(quick_gelu, f"{evidence} open_clip's '{name}:{tag}'", preprocess)


def of_file(file: Path, published: tuple[str, str] | None) -> Origin | None:
    """The origin of the weights in a file, if anything tells.

    From the surest trace to the weakest: what the file is, the repository that it was
    downloaded from, the configs beside it, its name.

    Args:
        file: Weights, where they lie.
        published: Of `published_as`.
    """
    if published:
        return of_tag(*published, evidence="by the file's SHA-256 they are")
    for name, tag in open_clip.list_pretrained():
        found = open_clip.get_pretrained_cfg(name, tag)["hf_hub"].split("/")
        cached = "models--" + "--".join(found[:2])
        if found[0] and (cached in file.parts or file.parent.name == found[1]):
            return of_tag(name, tag, f"by the folder of {file} they are")
    if beside := _beside(file):
        return beside
    for name, tag in open_clip.list_pretrained():
        if Path(open_clip.get_pretrained_url(name, tag)).name == file.name:
            return of_tag(name, tag, f"by the name {file.name!r} they are")
    if "quickgelu" in str(file).lower():
        return Origin(True, f"'quickgelu' stands in {file}")
    return None


def published_as(file: Path) -> tuple[str, str] | None:
    """Name and tag of the weights that a file is, by its SHA-256.

    Known are the files that OpenAI and open_clip published under their hash.
    """
    if file.suffix not in (".pt", ".pth"):
        return None
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    for name, tag in open_clip.list_pretrained():
        # OpenAI's is the name of a folder; open_clip's ends the file's, eight digits.
        url = open_clip.get_pretrained_url(name, tag)
        known = re.search(r"[/-]([0-9a-f]{64}|[0-9a-f]{8})[/.]", url)
        if known and digest.startswith(known[1]):
            return name, tag
    return None


def computes_quick_gelu(visual: nn.Module) -> bool | None:
    """Whether a tower computes QuickGELU; None for timm's, which have no choice.

    Args:
        visual: `model.visual` of an open_clip model.
    """
    if not isinstance(visual, VisionTransformer):
        return None
    return any(isinstance(module, QuickGELU) for module in visual.modules())


def activation_mismatch(
    name: str, computed: bool | None, origin: Origin | None
) -> str | None:
    """What is wrong with a tower's activation, and what to do; None if nothing is.

    Args:
        name: Of the tower: an open_clip name and its weights, or a folder.
        computed: Of `computes_quick_gelu`.
        origin: Of its weights; None if nothing tells.
    """
    if computed is None or origin is None or computed == origin.quick_gelu:
        return None
    words = {True: "QuickGELU", False: "GELU"}
    stem = name.partition(":")[0]
    base = stem.removesuffix("-quickgelu")
    right = f"{base}-quickgelu" if origin.quick_gelu else base
    remedy = (
        f"load {right!r} instead of {stem!r}"
        if {stem, right} <= set(open_clip.list_models())
        else f'set "quick_gelu": {json.dumps(origin.quick_gelu)} in its model_cfg'
    )
    return (
        f"the vision model {name!r} computes {words[computed]}, but its weights were "
        f"trained with {words[origin.quick_gelu]}: {origin.evidence}; {remedy}"
    )


def _beside(file: Path) -> Origin | None:
    """What the configs of Hugging Face and open_clip beside a file say."""
    config = file.parent / "config.json"
    if config.is_file():
        about = read_json(config)
        # Where it is left out, CLIP's own holds.
        usual = "quick_gelu" if about.get("model_type", "").startswith("clip") else None
        activation = about.get("vision_config", about).get("hidden_act", usual)
        if activation:
            return Origin(activation == "quick_gelu", f"hidden_act in {config}")
    config = file.parent / "open_clip_config.json"
    if config.is_file():
        about = read_json(config)
        return Origin(
            bool(about.get("model_cfg", {}).get("quick_gelu")),
            f"quick_gelu in {config}",
            about.get("preprocess_cfg", {}),
        )
    return None
