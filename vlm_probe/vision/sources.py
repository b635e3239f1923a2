"""What a vision model is called becomes a config and a file of weights."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip

from vlm_probe.vision.origin import Origin, of_file, of_tag, published_as
from vlm_probe.vision.towers import SAVED
from vlm_probe.weights import SUFFIXES, read_json

_CONFIG = "open_clip_config.json"
_USUAL = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
"""Names of weights in a folder, the most usual first; the order is open_clip's."""


@dataclass(frozen=True)
class Source:
    """What a vision tower is made from."""

    name: str
    """Where it came from, for tables."""
    config: dict
    """`model_cfg` and `preprocess_cfg`, as in `open_clip_config.json`."""
    weights: Path
    """The file."""
    origin: Origin | None
    """What the weights were trained with, if anything tells."""
    published: bool = False
    """Whether the file is, to the byte, one that OpenAI or open_clip published."""
    block: int = -1
    """After which block tokens are taken, where that was saved."""


def find_source(source: str, pretrained: str | None = None) -> Source:
    """Finds what a vision model is made from; see `VisionModel.load` for the forms.

    Raises:
        FileNotFoundError: Files are missing, or cannot be downloaded.
        ValueError: There is no such model.
    """
    folder = Path(source.removeprefix("local-dir:")).expanduser()
    on_hub = source.startswith("hf-hub:")
    in_folder = folder.is_dir() or source.startswith("local-dir:")
    if pretrained and (on_hub or in_folder):
        raise ValueError(
            f"pretrained={pretrained!r} goes with the name of an open_clip model; "
            f"{source!r} has weights of its own"
        )
    if on_hub:
        name = source.removeprefix("hf-hub:")
        config = _download({"hf_hub": f"{name}/{_CONFIG}"}, source)
        return _described(name, config, _download({"hf_hub": f"{name}/"}, source))
    if (folder / SAVED[0]).is_file():
        return _saved(folder)
    if in_folder:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no vision model in {folder}: there is no such folder"
            )
        if not (folder / _CONFIG).is_file():
            raise FileNotFoundError(
                f"no vision model in {folder}: expected {_CONFIG} and weights, or what "
                "VisionModel.save writes"
            )
        return _described(folder.name, folder / _CONFIG, _weights_in(folder))
    name, _, weights = source.partition(":")
    return _named(name, weights or pretrained or "", source)


def _saved(folder: Path) -> Source:
    about, weights = read_json(folder / SAVED[0]), folder / SAVED[1]
    try:
        origin = Origin(*about["origin"]) if about["origin"] else None
        return Source(about["name"], about, weights, origin, block=about["block"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / SAVED[0]} does not say all that VisionModel.save writes: "
            f"{error!r}; save the vision model again"
        ) from error


def _described(name: str, config: Path, weights: Path) -> Source:
    """A model by its `open_clip_config.json`."""
    published = published_as(weights)
    origin = of_file(weights, published)
    return Source(name, read_json(config), weights, origin, published is not None)


def _named(name: str, weights: str, source: str) -> Source:
    """A model by its open_clip name, with a tag or a file of weights."""
    known = open_clip.list_models()
    if name not in known and name.replace("/", "-") in known:
        name = name.replace("/", "-")  # as OpenAI writes them: ViT-L/14
    if name not in known and _is_path(name):
        raise FileNotFoundError(
            f"no vision model {source!r}: there is no such folder or file; expected a "
            "folder with weights, 'NAME:FILE' with an open_clip name, or "
            "'hf-hub:OWNER/NAME'"
        )
    if name not in known:
        raise ValueError(
            f"no vision model {source!r}: there is no such folder, and open_clip has "
            f"no model {name!r}; the nearest are {_nearest(name, known)}"
        )
    published = None
    if open_clip.is_pretrained_cfg(name, weights):
        label, origin = f"{name}:{weights}", of_tag(name, weights)
        file = _download(open_clip.get_pretrained_cfg(name, weights), label)
    else:
        file = _file_of(weights, name)
        published = published_as(file)
        label, origin = f"{name}:{file.name}", of_file(file, published)
    config = {
        "model_cfg": open_clip.get_model_config(name),
        "preprocess_cfg": _preprocess_cfg(name, origin),
    }
    return Source(label, config, file, origin, published is not None)


def _is_path(name: str) -> bool:
    """Whether a path is meant, and not a name such as ViT-L/14 with a typo."""
    return name.startswith(("/", ".", "~")) or (
        bool({os.sep, "/"} & set(name)) and not name.startswith("ViT-")
    )


def _preprocess_cfg(name: str, origin: Origin | None) -> dict:
    """What the weights were given, else what all known weights of that model were.

    Else nothing, so that open_clip's default holds.
    """
    if origin and origin.preprocess:
        return origin.preprocess
    tags = open_clip.list_pretrained_tags_by_model(name)
    first, *others = [of_tag(name, tag).preprocess for tag in tags] or [{}]
    return first if all(other == first for other in others) else {}


def _file_of(weights: str, name: str) -> Path:
    """The file of weights that is meant by what is no tag."""
    file = Path(weights).expanduser()
    if not file.is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        what = f"no file {weights!r}, and no such tag," if weights else "no weights"
        offered = f"; its tags are {_nearest(weights, tags)}" if tags else ""
        raise FileNotFoundError(
            f"{what} for {name!r}: expected '{name}:TAG' or '{name}:FILE'{offered}"
        )
    return file


def _weights_in(folder: Path) -> Path:
    """The file that open_clip takes, unless it would have to guess."""
    found = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES)
    usual = [folder / f"{name}{suffix}" for name in _USUAL for suffix in SUFFIXES]
    chosen = [file for file in usual if file in found] or found
    if not chosen or (chosen is found and len(found) > 1):
        raise FileNotFoundError(
            f"{folder} has {', '.join(f.name for f in found) or 'no weights'} beside "
            f"its {_CONFIG}; expected one file of weights, named like {usual[0].name}"
        )
    return chosen[0]


def _download(where: Mapping, source: str) -> Path:
    try:
        return Path(open_clip.download_pretrained(where))
    except OSError as error:
        reason = str(error).split("Last error: ")[-1].splitlines()[0]
        raise FileNotFoundError(
            f"{source!r} is not in this machine's Hugging Face cache, and could not be "
            f"downloaded: {reason} Go online this once, or give a folder with "
            f"{_CONFIG} and weights, or an open_clip name with a file, 'NAME:FILE'"
        ) from error


def _nearest(name: str, known: Sequence[str]) -> str:
    return ", ".join(map(repr, difflib.get_close_matches(name, known, 4, 0.0)))
