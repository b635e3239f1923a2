"""Adapters: what they compute, and the files that people keep them in."""

import json
import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from vlm_probe.adapter import LinearAdapter, MlpAdapter, load_adapter


def test_a_patch_by_hand():
    adapter = LinearAdapter(2, 3)
    with torch.no_grad():
        adapter.linear.weight.copy_(torch.tensor([[1.0, 0], [0, 2], [1, 1]]))
        adapter.linear.bias.copy_(torch.tensor([0.0, 10, 0]))
        found = adapter(torch.tensor([[[3.0, 4], [0, 0]]]))
    assert found.tolist() == [[[3, 18, 7], [0, 10, 0]]]
    assert (adapter.d_vision, adapter.d_model) == (2, 3)


def test_a_patch_through_two_layers_by_hand():
    adapter = MlpAdapter(1, 1, d_hidden=2)
    with torch.no_grad():
        adapter.layers[0].weight.copy_(torch.tensor([[1.0], [-1]]))
        adapter.layers[0].bias.zero_()
        adapter.layers[2].weight.copy_(torch.tensor([[1.0, 10]]))
        adapter.layers[2].bias.fill_(5)
        found = adapter(torch.tensor([[[1.0], [0.0]]]))
    # GELU(1) = 0.84134, GELU(-1) = -0.15866: 0.84134 - 1.58655 + 5.
    torch.testing.assert_close(found, torch.tensor([[[4.25479], [5.0]]]))
    assert (adapter.d_vision, adapter.d_model) == (1, 1)
    assert MlpAdapter(4, 6).layers[0].out_features == 6


@pytest.mark.parametrize("kind", [LinearAdapter, MlpAdapter])
def test_patches_of_another_dtype_are_taken(kind):
    adapter = kind(2, 3)
    assert adapter(torch.ones(1, 4, 2, dtype=torch.float16)).dtype == torch.float32


@pytest.mark.parametrize(
    "adapter",
    [
        LinearAdapter(6, 9, manifest={"stages": [{"steps": 3}], "vision": "naïve"}),
        MlpAdapter(6, 9, d_hidden=4, manifest={"vision_block": -2}),
        MlpAdapter(6, 9),
    ],
)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, adapter):
    file = tmp_path / "new" / "adapter.safetensors"
    adapter.save(file)
    loaded = load_adapter(file)
    assert type(loaded) is type(adapter)
    patches = torch.randn(2, 5, 6)
    assert torch.equal(loaded(patches), adapter(patches))
    assert loaded.manifest == adapter.manifest
    assert (loaded.d_vision, loaded.d_model) == (6, 9)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training


def test_the_file_and_its_manifest(tmp_path):
    file = tmp_path / "a.safetensors"
    LinearAdapter(6, 9, manifest={"language": "gemma", "kind": "?"}).save(file)
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == {"linear.weight", "linear.bias"}
        manifest = json.loads(opened.metadata()["manifest"])
    widths = {"d_vision": 6, "d_model": 9}
    assert manifest == {"language": "gemma", "kind": "linear", **widths}


WEIGHT, BIAS = torch.randn(5, 3), torch.randn(5)
AGAIN, LAST = torch.randn(7, 5), torch.randn(7)


def named(prefix, mlp=("0.", "2.")):
    """A linear and a two-layer adapter in the words of one format."""
    linear = {f"{prefix}weight": WEIGHT, f"{prefix}bias": BIAS}
    first, second = (f"{prefix}{name}" for name in mlp)
    two = {f"{first}weight": WEIGHT, f"{first}bias": BIAS}
    return linear, two | {f"{second}weight": AGAIN, f"{second}bias": LAST}


@pytest.mark.parametrize("suffix", ["pth", "bin", "safetensors"])
@pytest.mark.parametrize(
    "prefix",
    [
        "",  # the paper's code
        "module.",  # the same, trained in parallel
        "linear.",
        "module.projector.",
        "model.mm_projector.",  # LLaVA
        "mm_projector.",
        "base_model.model.model.mm_projector.",  # LLaVA with LoRA
    ],
)
def test_published_formats_are_read(tmp_path, prefix, suffix):
    file = tmp_path / f"projector.{suffix}"
    write = save_file if suffix == "safetensors" else torch.save
    linear, two = named(prefix)
    patches = torch.randn(2, 4, 3)
    hidden = nn.functional.linear(patches, WEIGHT, BIAS)
    write(linear, file)
    adapter = load_adapter(file)
    assert type(adapter) is LinearAdapter
    assert adapter.manifest == {"kind": "linear", "d_vision": 3, "d_model": 5}
    assert torch.equal(adapter(patches), hidden)
    write(two, file)
    adapter = load_adapter(file)
    assert type(adapter) is MlpAdapter
    assert adapter.manifest == {"kind": "mlp2x_gelu", "d_vision": 3, "d_model": 7}
    expected = nn.functional.linear(nn.functional.gelu(hidden), AGAIN, LAST)
    assert torch.equal(adapter(patches), expected)


def test_the_order_in_the_file_does_not_matter(tmp_path):
    file = tmp_path / "mm_projector.bin"
    _, two = named("model.mm_projector.")
    torch.save(dict(reversed(two.items())), file)
    assert torch.equal(load_adapter(file).layers[2].weight, AGAIN)


def test_llava_as_hugging_face_names_it(tmp_path):
    file = tmp_path / "a.safetensors"
    _, two = named("multi_modal_projector.", ("linear_1.", "linear_2."))
    save_file(two, file)
    assert torch.equal(load_adapter(file).layers[2].bias, LAST)


def test_a_training_checkpoint_is_read(tmp_path):
    linear, _ = named("module.")
    torch.save({"epoch": 1, "state_dict": linear}, tmp_path / "p.pth")
    assert torch.equal(load_adapter(tmp_path / "p.pth").linear.weight, WEIGHT)


def test_half_precision_is_read_in_the_dtype_asked_for(tmp_path):
    file = tmp_path / "mm_projector.bin"
    linear, _ = named("model.mm_projector.")
    torch.save({name: value.bfloat16() for name, value in linear.items()}, file)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        adapter = load_adapter(file, dtype=dtype)
        assert torch.equal(adapter.linear.weight, WEIGHT.bfloat16().to(dtype))
        assert adapter(torch.ones(1, 2, 3)).dtype == dtype
    assert load_adapter(file, dtype="float16").linear.bias.dtype == torch.float16
    with pytest.raises(
        ValueError, match="dtype 'half': expected one of float32, bfloa"
    ):
        load_adapter(file, dtype="half")


@pytest.mark.parametrize(("index", "block"), [(-2, -2), (-1, -1), (23, 22)])
def test_llavas_config_says_which_tokens_it_takes(tmp_path, index, block):
    linear, _ = named("model.mm_projector.")
    torch.save(linear, tmp_path / "mm_projector.bin")
    about = {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_vision_select_layer": index,
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    manifest = load_adapter(tmp_path / "mm_projector.bin").manifest
    assert manifest == {
        "vision": "openai/clip-vit-large-patch14-336",
        "vision_block": block,
        "language": "lmsys/vicuna-7b-v1.5",
        "kind": "linear",
        "d_vision": 3,
        "d_model": 5,
    }


def test_tensors_that_are_left_out_are_named(tmp_path):
    linear, _ = named("model.mm_projector.")
    file = tmp_path / "mm_projector.bin"
    torch.save({**linear, "model.embed_tokens.weight": torch.ones(4, 2)}, file)
    words = r"holds more than the adapter; left out: model\.embed_tokens\.weight\. A mo"
    with pytest.warns(UserWarning, match=words):
        assert torch.equal(load_adapter(file).linear.weight, WEIGHT)


def linears(*names):
    return {
        f"model.mm_projector.{name}.{end}": torch.ones(shape)
        for name in names
        for end, shape in (("weight", (2, 2)), ("bias", (2,)))
    }


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (linears("0", "2", "4"), "a perceptron of 3 layers (mlp3x_gelu), {'0.bias'"),
        (
            linears("0", "1"),
            "tensors of no kind that is known, {'0.bias': (2,), '0.wei",
        ),
        (
            {"mm_projector.query": torch.ones(4, 2), **linears("attn.out_proj")},
            "a resampler, which attends from learned queries, {",
        ),
        (
            {"model.mm_projector.conv.weight": torch.ones(2, 2, 3, 3), **linears("0")},
            "a convolutional projector, {",
        ),
        (
            {"b": torch.ones(2), "a": torch.ones(2)},
            "known, {'a': (2,), 'b': (2,)}; a l",
        ),
        ({"weight": torch.ones(3, 2)}, "no kind that is known, {'weight': (3, 2)}"),
        (
            {"weight": torch.ones(3, 2), "bias": torch.ones(2)},
            "{'bias': (2,), 'weight':",
        ),
        ({"weight": torch.ones(3), "bias": torch.ones(3)}, "'weight': (3,)}"),
        (
            {**linears("0"), "model.mm_projector.2.weight": torch.ones(4, 3)}
            | {"model.mm_projector.2.bias": torch.ones(4)},
            "'2.weight': (4, 3)}",
        ),
        ({str(i): torch.ones(1) for i in range(20)}, "and 12 more; a linear adapter"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path, state, words):
    file = tmp_path / "mm_projector.bin"
    torch.save(state, file)
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        load_adapter(file)
    assert str(raised.value).startswith(f"{file} holds ")
    assert "a linear adapter has weight of shape (d_model, d_vision)" in str(
        raised.value
    )
    assert "LLaVA's mlp2x_gelu has 0.weight, 0.bias, 2.weight and" in str(raised.value)


class Wanting:
    def __reduce__(self):
        return os.system, ("echo this must not run",)


def test_a_pickle_that_wants_code_is_refused(tmp_path):
    file = tmp_path / "mm_projector.bin"
    torch.save({"weight": WEIGHT, "bias": Wanting()}, file)
    words = r"mm_projector\.bin is refused: it is a pickle that on being read wants to"
    with pytest.raises(ValueError, match=words):
        load_adapter(file)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    file = tmp_path / "other.safetensors"
    (tmp_path / "mm_projector.bin").touch()
    words = f"no adapter at {file}; {tmp_path} holds mm_projector.bin"
    with pytest.raises(FileNotFoundError, match=re.escape(words)):
        load_adapter(file)
    words = f"no adapter at {tmp_path}; {tmp_path} holds mm_projector.bin"
    with pytest.raises(FileNotFoundError, match=re.escape(words)):
        load_adapter(tmp_path)  # the folder in the file's place
    file.write_bytes(b"not a tensor in sight")
    with pytest.raises(ValueError, match=f"{file} is no safetensors file"):
        load_adapter(file)
    with pytest.raises(
        ValueError, match=r"mm_projector\.bin is no file that torch\.sa"
    ):
        load_adapter(tmp_path / "mm_projector.bin")


def test_a_manifest_or_config_that_is_no_object_is_named(tmp_path):
    file = tmp_path / "a.safetensors"
    linear, _ = named("")
    for text, words in (("[1]", "holds JSON of type list"), ("{", "is damaged, or no")):
        save_file(linear, file, metadata={"manifest": text})
        words = re.escape(f"the manifest in {file} {words}")
        with pytest.raises(ValueError, match=words):
            load_adapter(file)
    torch.save(linear, tmp_path / "mm_projector.bin")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds JSON of type list; exp"):
        load_adapter(tmp_path / "mm_projector.bin")


def test_tensors_without_names_or_not_dense_are_refused(tmp_path):
    file = tmp_path / "mm_projector.bin"
    torch.save({0: WEIGHT, 1: BIAS}, file)
    with pytest.raises(ValueError, match=r"mm_projector\.bin holds 0, 1, which are no"):
        load_adapter(file)
    torch.save({"weight": WEIGHT.to_sparse(), "bias": BIAS}, file)
    with pytest.raises(ValueError, match=r"holds weight, which are not dense; expecte"):
        load_adapter(file)


def test_a_linear_adapter_is_asked_for_by_its_class(tmp_path):
    LinearAdapter(2, 3).save(tmp_path / "a.safetensors")
    assert LinearAdapter.load(tmp_path / "a.safetensors").d_model == 3
    MlpAdapter(2, 3).save(tmp_path / "b.safetensors")
    words = r"b\.safetensors holds an adapter of kind 'mlp2x_gelu', expected 'linear'"
    with pytest.raises(ValueError, match=words):
        LinearAdapter.load(tmp_path / "b.safetensors")
