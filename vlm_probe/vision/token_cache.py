"""Patch tokens are kept on disk, so that a picture is encoded once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlm_probe.vision.model import VisionModel
from vlm_probe.weights import floating

_FORM = 1
"""Of what stands in a file; another form gets other names."""


@runtime_checkable
class Pictured(Protocol):
    """What has a picture, such as an `Example`."""

    @property
    def image(self) -> Image.Image | Path | str | bytes | None:
        """The picture, its path or what stands in its file."""

    @property
    def id(self) -> str | None:
        """Its name, for messages."""

    def picture(self) -> Image.Image:
        """The picture in RGB; raises OSError or ValueError if there is none."""


class TokenCache:
    """Patch tokens of pictures, from disk where they are there.

    Each picture has a small file of its own, which appears under its name only when it
    is whole: several processes may share the folder. A picture in a file is known by
    its path, size and time of change, one in memory by its pixels, and both together
    with the weights, the block and all else that tokens come from.
    """

    def __init__(
        self,
        folder: str | Path,
        vision: VisionModel,
        *,
        identity: str,
        dtype: str | torch.dtype = "float32",
    ) -> None:
        """Makes the folder.

        Args:
            folder: Made if it is not there. Tokens of other models may lie in it too.
            vision: Encodes what is not there.
            identity: Tells its weights from any others, such as their digest.
            dtype: Of what is kept: "float32", or "bfloat16" or "float16", which take
                half of the disk and round what `encode` gives, from the first time on.

        Raises:
            OSError: The folder cannot be made.
            ValueError: There is no such dtype.
        """
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritten(error, self.folder) from error
        self.vision = vision
        self.dtype = floating(dtype)
        about = (
            _FORM,
            identity,
            vision.block,
            vision.preprocessing,
            # The same weights give other tokens with other activations or heads.
            vision.quick_gelu,
            (vision.config or {}).get("model_cfg"),
            # Processors of other kinds round otherwise.
            vision.device.type,
            str(self.dtype),
        )
        self._about = repr(about).encode()

    def encode(
        self, examples: Sequence[Pictured]
    ) -> Float[Tensor, "image patch d_vision"]:
        """What `vision.encode` gives for the examples' pictures, rounded to the dtype.

        If one is missing, all are encoded and the missing ones written, since tokens
        may depend on their batch in the last digits: what is written is so the same,
        whatever else was on disk.

        Raises:
            OSError: A picture cannot be read, or tokens cannot be written; the words
                say which.
            ValueError: An example has no picture, or its tokens are too large for the
                dtype.
        """
        places = [self._place(example) for example in examples]
        found = {place: self._read(place) for place in set(places)}
        if not found or None in found.values():
            pictures = [_picture(example) for example in examples]
            tokens = self._rounded(self.vision.encode(pictures), examples)
            for place, of_picture in zip(places, tokens, strict=True):
                if found[place] is None:
                    self._write(place, of_picture)
                    found[place] = of_picture
        kept = torch.stack([found[place] for place in places])
        return kept.to(self.vision.device, self.vision.dtype)

    def _place(self, example: Pictured) -> Path:
        known = hashlib.sha256(self._about)
        if isinstance(example.image, str | Path):
            known.update(_known_file(example, Path(example.image)))
        else:
            picture = _picture(example)
            known.update(repr(("pixels", picture.mode, picture.size)).encode())
            known.update(picture.tobytes())
        name = known.hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def _read(self, place: Path) -> Tensor | None:
        """Tokens on disk; None if there are none, or they are not what was written."""
        try:
            stored = load(place.read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None
        tokens, checksum = stored.get("tokens"), stored.get("checksum")
        rows, columns = self.vision.grid
        if (
            tokens is None
            or checksum is None
            or tokens.dtype != self.dtype
            or tokens.shape != (rows * columns, self.vision.d_vision)
            or int(checksum) != _checksum(tokens)
        ):
            return None
        return tokens

    def _write(self, place: Path, tokens: Tensor) -> None:
        checksum = torch.tensor(_checksum(tokens))
        content = save({"tokens": tokens.contiguous(), "checksum": checksum})
        beside = place.with_suffix(f".{uuid.uuid4().hex}.partial")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            beside.replace(place)
        except OSError as error:
            with contextlib.suppress(OSError):  # it may never have come to be
                beside.unlink()
            kept = f"{len(content):,} bytes in {self.dtype}"
            raise _unwritten(error, place, kept) from error

    def _rounded(
        self, tokens: Float[Tensor, "image patch d"], examples: Sequence[Pictured]
    ) -> Float[Tensor, "image patch d"]:
        rounded = tokens.to("cpu", self.dtype)
        for example, given, kept in zip(examples, tokens.cpu(), rounded, strict=True):
            if not torch.equal(given.isfinite(), kept.isfinite()):
                raise ValueError(
                    f"example {example.id!r}: its largest vision token value, "
                    f"{float(given.abs().max()):.3g}, is too large for {self.dtype}; "
                    "keep vision tokens in bfloat16 or float32"
                )
        return rounded


def _picture(example: Pictured) -> Image.Image:
    try:
        return example.picture()
    except (OSError, ValueError) as error:
        raise _of_example(error, example) from error


def _known_file(example: Pictured, path: Path) -> bytes:
    try:
        about = path.stat()
    except (OSError, ValueError) as error:
        raise _of_example(error, example) from error
    place = str(path.absolute())
    return repr(("file", place, about.st_size, about.st_mtime_ns)).encode()


def _of_example(error: OSError | ValueError, example: Pictured) -> OSError | ValueError:
    """The error with the example's name in front, of a kind that tells as much."""
    name = f"example {example.id!r}"
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, f"{name}: {error.strerror}", error.filename)
    kind = OSError if isinstance(error, OSError) else ValueError
    return kind(f"{name}: {error}")


def _unwritten(error: OSError, place: Path, each: str = "a file") -> OSError:
    said = f"{error.strerror}; cannot keep vision tokens there"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        said += (
            f", where each picture takes {each}; free space, or give another folder or "
            "a dtype of half the size, or keep none"
        )
    else:
        said += "; give a folder that can be written to, or keep none"
    return OSError(error.errno, said, str(place))


def _checksum(tokens: Tensor) -> int:
    return zlib.crc32(tokens.contiguous().flatten().view(torch.uint8).numpy())
