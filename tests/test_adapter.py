"""The adapter: one affine map, and the file it is kept in."""

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vlm_probe.adapter import LinearAdapter


def test_a_patch_by_hand():
    adapter = LinearAdapter(2, 3)
    with torch.no_grad():
        adapter.linear.weight.copy_(torch.tensor([[1.0, 0], [0, 2], [1, 1]]))
        adapter.linear.bias.copy_(torch.tensor([0.0, 10, 0]))
        found = adapter(torch.tensor([[[3.0, 4], [0, 0]]]))
    assert found.tolist() == [[[3, 18, 7], [0, 10, 0]]]
    assert (adapter.d_vision, adapter.d_model) == (2, 3)


def test_patches_of_another_dtype_are_taken():
    adapter = LinearAdapter(2, 3)
    assert adapter(torch.ones(1, 4, 2, dtype=torch.float16)).dtype == torch.float32


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    manifest = {"stages": [{"steps": 3}], "vision": "tiny", "note": "naïve"}
    adapter = LinearAdapter(6, 9, manifest=manifest)
    file = tmp_path / "new" / "adapter.safetensors"
    adapter.save(file)
    loaded = LinearAdapter.load(file)
    assert torch.equal(loaded.linear.weight, adapter.linear.weight)
    assert torch.equal(loaded.linear.bias, adapter.linear.bias)
    assert loaded.manifest == manifest
    assert (loaded.d_vision, loaded.d_model) == (6, 9)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == {"linear.weight", "linear.bias"}


def test_a_file_without_manifest_is_taken(tmp_path):
    file = tmp_path / "a.safetensors"
    state = {"linear.weight": torch.ones(3, 2), "linear.bias": torch.ones(3)}
    save_file(state, file)
    assert LinearAdapter.load(file).manifest == {}


def test_a_wrong_file_is_refused(tmp_path):
    file = tmp_path / "other.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no adapter at .*other\.safetensors"):
        LinearAdapter.load(file)
    save_file({"b": torch.ones(2), "a": torch.ones(2)}, file)
    words = f"{file} holds {{'a': (2,), 'b': (2,)}}; a linear adapter has linear.weight"
    with pytest.raises(ValueError, match=re.escape(words)):
        LinearAdapter.load(file)
    save_file({"linear.weight": torch.ones(3, 2), "linear.bias": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=re.escape("'linear.bias': (2,)")):
        LinearAdapter.load(file)
    file.write_bytes(b"not a tensor in sight")
    with pytest.raises(ValueError, match=f"{file} is no safetensors file"):
        LinearAdapter.load(file)
