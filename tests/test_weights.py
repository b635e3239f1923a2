"""Files of weights: what is read, and what is refused in which words."""

import json
import os
import pickle
import re
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vlm_probe.weights import floating, json_object, read_json, read_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Wanting:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("echo this must not run > ran",)


def same(found, expected):
    return list(found) == list(expected) and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
@pytest.mark.parametrize("wrapped", [None, "state_dict", "model_state_dict"])
def test_what_torch_saved_is_read(tmp_path, suffix, wrapped):
    file = tmp_path / f"w.{suffix}"
    whole = {"epoch": 3, wrapped: STATE, "optimizer": {"lr": 0.1}}
    torch.save(whole if wrapped else STATE, file)
    found, metadata = read_weights(file)
    assert same(found, STATE)
    assert metadata == {}


def test_safetensors_are_read_with_their_metadata(tmp_path):
    file = tmp_path / "w.safetensors"
    state = {name: value.bfloat16() for name, value in sorted(STATE.items())}
    save_file(state, file, metadata={"note": "naïve"})
    found, metadata = read_weights(str(file))
    assert same(found, state)
    assert metadata == {"note": "naïve"}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_code_is_refused_and_does_not_run(
    tmp_path, monkeypatch, zipped
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "w.pth"
    torch.save({**STATE, "x": Wanting()}, file, _use_new_zipfile_serialization=zipped)
    words = r"w\.pth is refused: .* wants to call \w+\.system, and so could run any"
    with pytest.raises(ValueError, match=words) as raised:
        read_weights(file)
    assert "write its tensors anew with safetensors.torch.save_file" in str(
        raised.value
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("saved", ["plain", "torch", "torch, old"])
def test_whatever_its_protocol_a_pickle_that_wants_code_is_refused(
    tmp_path, monkeypatch, protocol, saved
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "w.pt"
    state = {"x": Wanting(), **STATE, "y": Wanting()}
    if saved == "plain":
        file.write_bytes(pickle.dumps({"x": Wanting()}, protocol=protocol))
    else:
        zipped = saved == "torch"
        how = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
        torch.save(state, file, **how)
    words = r"w\.pt is refused: .* wants to call ([\w.]+, )*(posix|nt)\.system"
    with pytest.raises(ValueError, match=words):
        read_weights(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["pt", "pth"])
@pytest.mark.parametrize(
    "held", [b"abc", b"s..", b"h\x00.", b"M\x00", b"<html>", b"\n"]
)
def test_a_few_bytes_that_are_no_pickle_are_refused(tmp_path, suffix, held):
    file = tmp_path / f"w.{suffix}"
    file.write_bytes(held)
    with pytest.raises(ValueError, match=rf"w\.{suffix} is no file that torch\.save w"):
        read_weights(file)


def test_a_whole_module_is_refused(tmp_path):
    file = tmp_path / "w.pt"
    torch.save(nn.Linear(3, 2), file)
    with pytest.raises(ValueError, match=r"wants to call torch\.nn\.modules\.linear"):
        read_weights(file)


def save_script(module, file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(module).save(str(file))


def test_torchscript_is_read_only_if_the_file_is_known(tmp_path):
    file = tmp_path / "w.pt"
    module = nn.Linear(3, 2)
    save_script(module, file)
    words = "is refused: it is a TorchScript archive, which holds code. Only tensors"
    with pytest.raises(ValueError, match=words):
        read_weights(file)
    found, _ = read_weights(file, published=True)
    assert same(found, module.state_dict())
    torch.save(STATE, file)
    assert same(read_weights(file, published=True)[0], STATE)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.9, 0.5, 0])
def test_a_truncated_file_is_refused(tmp_path, zipped, share):
    file = tmp_path / "w.pt"
    torch.save(STATE, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    words = r"w\.pt is no file that torch.save wrote, or not all of it is there \("
    with pytest.raises(ValueError, match=words):
        read_weights(file)


@pytest.mark.parametrize("share", [0.9, 0.1, 0])
def test_truncated_safetensors_are_refused(tmp_path, share):
    file = tmp_path / "w.safetensors"
    save_file(STATE, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    words = (
        r"w\.safetensors is no safetensors file, or not all of it is there: .*; copy"
    )
    with pytest.raises(ValueError, match=words):
        read_weights(file)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_pointer_in_the_files_place_is_named(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(ValueError, match=r"is a Git LFS pointer, .* `git lfs pull`"):
        read_weights(tmp_path / name)


def test_what_is_no_state_dict_is_refused(tmp_path):
    file = tmp_path / "w.pt"
    for given, words in (
        (torch.ones(2), "holds Tensor; expected tensors by name"),
        ({}, "holds dict; expected tensors by name"),
        ({0: torch.ones(2), 1: torch.ones(2)}, "holds 0, 1, which are no names; exp"),
        ({"a": torch.eye(2).to_sparse()}, "holds a, which are not dense; expected den"),
        (
            {**STATE, "steps": 3, "model": STATE},
            "holds steps, model, which are no tens",
        ),
    ):
        torch.save(given, file)
        with pytest.raises(ValueError, match=words):
            read_weights(file)
    file.write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match=r"w\.pt"):
        read_weights(file)


def test_a_missing_file_is_named_with_its_neighbors(tmp_path):
    (tmp_path / "other.pth").touch()
    (tmp_path / "notes.txt").touch()
    words = f"no weights at {tmp_path / 'w.pt'}; {tmp_path} holds other.pth"
    with pytest.raises(FileNotFoundError, match=re.escape(words) + "$"):
        read_weights(tmp_path / "w.pt")
    words = f"{tmp_path / 'no' / 'w.pt'}; there is no folder {tmp_path / 'no'} either"
    with pytest.raises(FileNotFoundError, match=re.escape(words)):
        read_weights(tmp_path / "no" / "w.pt")
    with pytest.raises(FileNotFoundError, match=r"holds other\.pth"):
        read_weights(tmp_path)  # the folder instead of a file


def test_a_config_is_an_object(tmp_path):
    file = tmp_path / "config.json"
    whole = json.dumps({"name": "naïve", "sizes": [1, 2]}, ensure_ascii=False)
    file.write_text(whole, encoding="utf-8")
    assert read_json(file) == json.loads(whole)
    for text, words in (
        (whole[:-5], "is damaged, or no JSON: Expecting"),
        ("", "is damaged, or no JSON: Expecting value"),
        ("[]", "holds JSON of type list; expected an object, {...}"),
        ("3", "holds JSON of type int; expected an object, {...}"),
        ("null", "holds JSON of type NoneType; expected an object, {...}"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=re.escape(f"{file} {words}")):
            read_json(file)
        with pytest.raises(ValueError, match=re.escape(f"the manifest {words}")):
            json_object(text, "the manifest")
    file.write_bytes(b"\xff\xff{}")
    with pytest.raises(ValueError, match="is damaged, or no JSON: "):
        read_json(file)


def test_dtypes_by_name():
    assert floating("bfloat16") is floating(torch.bfloat16) is torch.bfloat16
    assert floating("torch.float32") is torch.float32
    for wrong in ("float", "int8", torch.int64):
        with pytest.raises(
            ValueError, match="expected one of float32, bfloat16, float"
        ):
            floating(wrong)
