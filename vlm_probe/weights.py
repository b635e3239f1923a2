"""Tensors are read from files that run no code."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import pickletools
import re
import struct
import threading
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
"""How files of weights are named."""
_DAMAGED = (
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What `torch.load` stumbles into where a file is not what it takes it for."""
_INSIDE = ("state_dict", "model_state_dict")
"""Under which name a training checkpoint keeps the weights."""


def read_weights(
    file: str | Path, *, published: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file, or what `torch.save` made of a state dict.

    Args:
        file: The file; of a training checkpoint, its `state_dict` is read.
        published: Whether it is known to the byte, so that it may be a TorchScript
            archive, as OpenAI's are.

    Returns:
        The tensors by name, on the CPU and in their own dtypes, and the metadata that
        stands in a safetensors file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, wants to run code, or holds other things than
            tensors; says which.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no weights at {file}{beside(file)}")
    with file.open("rb") as opened:
        if opened.read(19) == b"version https://git":
            raise ValueError(
                f"{file} is a Git LFS pointer, not the file itself; get it with "
                "`git lfs pull`"
            )
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if published and _is_script(file):
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # TorchScript is on its way out
            return torch.jit.load(file, map_location="cpu").state_dict(), {}
    return _tensors(file, _unpickle(file)), {}


def read_json(file: Path) -> dict:
    """Reads a config.

    Raises:
        ValueError: It is damaged, no JSON, or JSON of another kind than an object.
    """
    return json_object(file.read_bytes(), str(file))


def json_object(text: str | bytes, where: str) -> dict:
    """What JSON says, which stands at a place that messages name.

    Raises:
        ValueError: It is damaged, no JSON, or JSON of another kind than an object.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is damaged, or no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{where} holds JSON of type {type(found).__name__}; expected an object, "
            "{...}"
        )
    return found


def beside(file: Path) -> str:
    """What else there is, for the message on a file that is missing."""
    folder = file if file.is_dir() else file.parent
    if not folder.is_dir():
        return f"; there is no folder {folder} either"
    found = sorted(f.name for f in folder.iterdir() if f.suffix in SUFFIXES)
    return f"; {folder} holds {', '.join(found) or 'no file of weights'}"


def floating(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of this name.

    Raises:
        ValueError: It is no dtype to compute in.
    """
    known = ("float32", "bfloat16", "float16", "float64")
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ValueError(f"dtype {name!r}: expected one of {', '.join(known)}")
    return getattr(torch, name)


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return state, dict(opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no safetensors file, or not all of it is there: {error}; copy "
            "or download it again"
        ) from error


def _is_script(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as opened:
        return any(name.endswith("/constants.pkl") for name in opened.namelist())


def _unpickle(file: Path) -> object:
    # Of pickle protocols and TorchScript: said below if it comes to nothing. Filters
    # are the whole process's, so what reads in the background leaves them alone.
    front = threading.current_thread() is threading.main_thread()
    quiet = warnings.catch_warnings(action="ignore", category=UserWarning)
    try:
        with quiet if front else contextlib.nullcontext():
            return torch.load(file, map_location="cpu", weights_only=True)
    except (*_DAMAGED, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} {_why_not(file, str(error))}") from error


def _why_not(file: Path, error: str) -> str:
    """Why `torch.load` would not read a file, and what can be done."""
    wanted = re.findall(r"GLOBAL ([\w.]+)", error)
    # No zip, a broken one, or a pickle newer than torch reads.
    with contextlib.suppress(ValueError, RuntimeError, pickle.UnpicklingError):
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    wanted = wanted or _called(file)
    if wanted:
        return (
            "is refused: it is a pickle that on being read wants to call "
            f"{', '.join(sorted(wanted))}, and so could run any code. Only tensors "
            "are read. If you trust where it comes from, load it yourself and write "
            "its tensors anew with safetensors.torch.save_file"
        )
    if "TorchScript" in error:
        return (
            "is refused: it is a TorchScript archive, which holds code. Only tensors "
            "are read. If you trust where it comes from, write its tensors anew: "
            "safetensors.torch.save_file(torch.jit.load(file).state_dict(), ...)"
        )
    reason = error.split(". ")[0].splitlines()
    return (
        "is no file that torch.save wrote, or not all of it is there "
        f"({reason[0] if reason else 'it ends too early'}); copy or download it again"
    )


def _called(file: Path) -> set[str]:
    """What a pickle of protocol 4 or later calls, of which torch reads none.

    There a name is put together from two strings, which may stand further up.
    """
    found = set()
    # Of what is no pickle, or ends too early.
    with contextlib.suppress(ValueError, zipfile.BadZipFile), file.open("rb") as plain:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as zipped:
                for name in zipped.namelist():
                    if name.endswith("/data.pkl"):
                        found |= _globals(io.BytesIO(zipped.read(name)))
            return found
        # Before what it saves, torch's old format has three pickles of its own.
        for _ in range(4):
            found |= _globals(plain)
    return found


def _globals(opened: io.BufferedIOBase) -> set[str]:
    """Of one pickle, read without running it."""
    strings: list[str] = ["?", "?"]
    memo: dict[object, str] = {}
    found = set()
    for code, said, _ in pickletools.genops(opened):
        if code.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]))
        elif code.name == "MEMOIZE":
            memo[len(memo)] = strings[-1]
        elif code.name in ("BINGET", "LONG_BINGET"):
            strings.append(memo.get(said, "?"))
        elif isinstance(said, str):
            strings.append(said)
    return found


def _tensors(file: Path, loaded: object) -> dict[str, Tensor]:
    if isinstance(loaded, dict):
        for name in _INSIDE:
            loaded = loaded.get(name, loaded)
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(
            f"{file} holds {type(loaded).__name__}; expected tensors by name, as "
            "torch.save(module.state_dict(), file) writes them"
        )
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
    for what, other in (
        ("no tensors", [k for k in loaded if k not in tensors]),
        ("no names", [k for k in loaded if not isinstance(k, str)]),
        ("not dense", [k for k, v in tensors.items() if v.layout != torch.strided]),
    ):
        if other:
            raise ValueError(
                f"{file} holds {', '.join(map(str, other[:5]))}, which are {what}; "
                "expected dense tensors by name, as torch.save(module.state_dict(), "
                "file) writes them"
            )
    return loaded
