"""What researchers have on disk or call by name is found, and where it comes from."""

import hashlib
import json
import re
import warnings

import open_clip
import pytest
import torch
from eye import CONFIG, PREPROCESS, model_config, pictures, write_folder
from safetensors.torch import save_file
from torch import nn

from vlm_probe.vision import VisionModel
from vlm_probe.vision.origin import of_file, of_tag, published_as
from vlm_probe.vision.sources import find_source

OPENAI = "https://openaipublic.azureedge.net/clip/models"


@pytest.fixture
def registry(monkeypatch):
    """Two tiny models among open_clip's, GELU and QuickGELU; returns their tags."""
    models, tags = open_clip.factory._MODEL_CONFIGS, open_clip.pretrained._PRETRAINED
    for name, quick_gelu in (("ViT-tiny", False), ("ViT-tiny-quickgelu", True)):
        monkeypatch.setitem(models, name, model_config(quick_gelu=quick_gelu))
        monkeypatch.setitem(tags, name, {})
    return tags


def record(registry, tag, *, url="", hf_hub="", quick_gelu=False, **preprocess):
    """A tag of both tiny models, as open_clip records it."""
    about = {"url": url, "hf_hub": hf_hub, "quick_gelu": quick_gelu, **preprocess}
    registry["ViT-tiny"][tag] = about
    if quick_gelu:
        registry["ViT-tiny-quickgelu"][tag] = about


def weights_file(file, clip=None, **wrapped):
    file.parent.mkdir(parents=True, exist_ok=True)
    state = (clip or open_clip.CLIP(**CONFIG)).state_dict()
    torch.save({"state_dict": state, **wrapped} if wrapped else state, file)
    return file


@pytest.mark.parametrize("by", ["source", "pretrained"])
@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_a_name_with_a_file_is_what_open_clip_makes_of_it(
    tmp_path, registry, by, suffix
):
    file = tmp_path / f"w.{suffix}"
    state = open_clip.CLIP(**CONFIG).state_dict()
    (save_file if suffix == "safetensors" else torch.save)(state, file)
    vision = (
        VisionModel.load(f"ViT-tiny:{file}", block=1)
        if by == "source"
        else VisionModel.load("ViT-tiny", pretrained=file, block=1)
    )
    theirs, preprocess = open_clip.create_model_from_pretrained(
        "ViT-tiny", pretrained=str(file)
    )
    expected = VisionModel(theirs.visual, preprocess, block=1)
    assert str(vision.preprocess) == str(preprocess)
    images = pictures(2)
    assert torch.equal(vision.encode(images), expected.encode(images))
    assert vision.name == f"ViT-tiny:w.{suffix}"


def test_a_training_checkpoint_is_read(tmp_path, registry):
    clip = open_clip.CLIP(**CONFIG)
    state = {f"module.{name}": value for name, value in clip.state_dict().items()}
    torch.save({"epoch": 2, "state_dict": state}, tmp_path / "epoch_2.pt")
    vision = VisionModel.load(f"ViT-tiny:{tmp_path / 'epoch_2.pt'}")
    images = pictures(1)
    expected = VisionModel(clip.visual, vision.preprocess).encode(images)
    assert torch.equal(vision.encode(images), expected)


def test_weights_of_the_vision_tower_alone_are_enough(tmp_path, registry):
    clip = open_clip.CLIP(**CONFIG)
    torch.save(clip.visual.state_dict(), tmp_path / "visual.pt")
    vision = VisionModel.load(f"ViT-tiny:{tmp_path / 'visual.pt'}")
    assert torch.equal(vision.visual.proj, clip.visual.proj)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "ViT-L-14-quikgelu:openai",
            "no vision model 'ViT-L-14-quikgelu:openai': there is no such folder, and "
            "open_clip has no model 'ViT-L-14-quikgelu'; the nearest are "
            "'ViT-L-14-quickgelu',",
        ),
        (
            "ViT-L-14:opnai",
            "no file 'opnai', and no such tag, for 'ViT-L-14': expected 'ViT-L-14:TAG' "
            "or 'ViT-L-14:FILE'; its tags are 'openai',",
        ),
        ("ViT-L/14:opnai", "for 'ViT-L-14': expected 'ViT-L-14:TAG'"),
        ("ViT-L-14", "no weights for 'ViT-L-14': expected 'ViT-L-14:TAG'"),
        ("ViT-e-14:x.pt", "for 'ViT-e-14': expected 'ViT-e-14:TAG' or 'ViT-e-14:FILE'"),
        (
            "local-dir:/no/such",
            "no vision model in /no/such: there is no such folder",
        ),
        *(
            (source, f"no vision model '{source}': there is no such folder or file; ex")
            for source in ("/no/such", "./ViT-L-14", "~/eye.pt", "laion/CLIP-ViT-L-14")
        ),
        ("ViT-L/15:openai", "open_clip has no model 'ViT-L/15'; the nearest are 'ViT"),
        (
            "ViT-L-15:/no/such/w.pt",
            "open_clip has no model 'ViT-L-15'; the nearest are 'ViT-L-1",
        ),
    ],
)
def test_what_is_not_there_is_named_with_the_nearest(source, words):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        VisionModel.load(source)


def test_a_folder_has_weights_of_its_own(tmp_path):
    folder = write_folder(tmp_path / "eye", open_clip.CLIP(**CONFIG), CONFIG)
    words = r"pretrained='openai' goes with the name of an open_clip model; .* has weig"
    for source in (folder, f"local-dir:{folder}", "hf-hub:laion/CLIP"):
        with pytest.raises(ValueError, match=words):
            VisionModel.load(source, pretrained="openai")


@pytest.mark.parametrize(
    "source", ["hf-hub:laion/CLIP-ViT-B-32-laion2B", "ViT-B-32:laion2b_s34b_b79k"]
)
def test_offline_a_name_says_what_to_do(source):
    words = (
        f"'{source}' is not in this machine's Hugging Face cache, and could not be "
        "downloaded: "
    )
    with pytest.raises(FileNotFoundError, match=re.escape(words)) as raised:
        VisionModel.load(source)
    assert "or an open_clip name with a file, 'NAME:FILE'" in str(raised.value)


def cached(cache, repository, config):
    """A repository as the hub's client keeps it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    return write_folder(folder / "snapshots" / "abc", open_clip.CLIP(**CONFIG), config)


def test_what_is_in_the_hubs_cache_is_loaded(tmp_path, monkeypatch, registry):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = cached(tmp_path, "org/eye", CONFIG)
    record(registry, "good", hf_hub="org/eye/", mean=(0.1,) * 3)
    expected = VisionModel.load(folder)
    images = pictures(1)
    for source, name in (("hf-hub:org/eye", "org/eye"), ("ViT-tiny:good",) * 2):
        vision = VisionModel.load(source)
        assert vision.name == name
        assert torch.equal(vision.visual.proj, expected.visual.proj)
    # A hub folder has a config of its own; a tag is what open_clip records.
    hub = VisionModel.load("hf-hub:org/eye")
    assert torch.equal(hub.encode(images), expected.encode(images))
    assert "mean=(0.1, 0.1, 0.1)" in str(vision.preprocess)


def test_a_tag_with_the_wrong_activation_is_named(tmp_path, monkeypatch, registry):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "org/eye", model_config(quick_gelu=True))
    record(registry, "quick", hf_hub="org/eye/", quick_gelu=True)
    words = (
        "the vision model 'ViT-tiny:quick' computes GELU, but its weights were trained "
        "with QuickGELU: they are open_clip's 'ViT-tiny:quick'; load "
        "'ViT-tiny-quickgelu' instead of 'ViT-tiny'"
    )
    with pytest.warns(UserWarning, match=words):
        VisionModel.load("ViT-tiny:quick")
    assert VisionModel.load("ViT-tiny-quickgelu:quick").activation_mismatch() is None
    assert VisionModel.load("hf-hub:org/eye").activation_mismatch() is None


def loads_with_warning(file, words, name="ViT-tiny"):
    with pytest.warns(UserWarning, match=re.escape(words)):
        found = VisionModel.load(f"{name}:{file}").activation_mismatch()
    other = "ViT-tiny-quickgelu" if name == "ViT-tiny" else "ViT-tiny"
    assert VisionModel.load(f"{other}:{file}").activation_mismatch() is None
    return found


class Holder(nn.Module):
    def __init__(self, clip):
        super().__init__()
        self.visual = clip.visual

    def forward(self, x):
        return x


def test_openais_own_file_is_known_by_its_hash(tmp_path, registry):
    clip = open_clip.CLIP(**CONFIG)
    file = tmp_path / "renamed.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.trace(Holder(clip), torch.ones(1)).save(str(file))
    with pytest.raises(ValueError, match="it is a TorchScript archive, which holds"):
        VisionModel.load(f"ViT-tiny:{file}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    url = f"{OPENAI}/{digest}/ViT-tiny.pt"
    record(registry, "openai", url=url, quick_gelu=True)
    words = (
        "'ViT-tiny:renamed.pt' computes GELU, but its weights were trained with "
        "QuickGELU: by the file's SHA-256 they are open_clip's 'ViT-tiny:openai'; load "
        "'ViT-tiny-quickgelu' instead of 'ViT-tiny'"
    )
    assert words in loads_with_warning(file, words)
    vision = VisionModel.load(f"ViT-tiny-quickgelu:{file}")
    assert torch.equal(vision.visual.proj, clip.visual.proj)


def test_open_clips_files_are_known_by_eight_digits(tmp_path, registry):
    file = weights_file(tmp_path / "renamed.pt")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    url = f"https://github.com/mlfoundations/v0.2-weights/vit-e31-{digest[:8]}.pt"
    record(registry, "e31", url=url, quick_gelu=True)
    words = "by the file's SHA-256 they are open_clip's 'ViT-tiny:e31'"
    loads_with_warning(file, words)


@pytest.mark.parametrize(
    ("digest", "expected"),
    [
        ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "openai"),
        ("46683a32" + "0" * 56, "laion400m_e32"),
        ("0" * 64, None),
    ],
)
def test_the_real_registry_is_understood(tmp_path, monkeypatch, digest, expected):
    class Digest:
        def hexdigest(self):
            return digest

    monkeypatch.setattr(hashlib, "file_digest", lambda *given: Digest())
    file = weights_file(tmp_path / "w.pt")
    found = published_as(file)
    assert (found and found[1]) == expected
    if expected:
        assert of_file(file, found).quick_gelu is True
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    assert published_as(tmp_path / "w.safetensors") is None  # none was published so


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ViT-L-14.pt", "by the name 'ViT-L-14.pt' they are open_clip's 'ViT-L-14:op"),
        ("l14_400m.pt", "by the name 'l14_400m.pt' they are open_clip's 'ViT-L-14:met"),
        ("vit_large_patch14_clip_224.openai/open_clip_model.bin", "by the folder of "),
        (
            "models--timm--vit_large_patch14_clip_224.openai/snapshots/a/w.bin",
            "by the ",
        ),
        ("logs/model_ViT-B-32-quickgelu-lr_1/checkpoints/epoch_3.pt", "'quickgelu' st"),
    ],
)
def test_names_that_tell_of_quick_gelu(tmp_path, registry, name, words):
    loads_with_warning(weights_file(tmp_path / name), words)


@pytest.mark.parametrize(
    ("about", "quick_gelu"),
    [
        ({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}, False),
        ({"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu"}}, True),
        ({"model_type": "clip", "vision_config": {}}, True),  # CLIPVisionConfig's own
        ({"model_type": "clip_vision_model", "hidden_act": "gelu"}, False),
        ({"architecture": "vit_large_patch14_clip_224"}, None),  # timm's
    ],
)
def test_hugging_faces_config_beside_the_weights_tells(
    tmp_path, registry, about, quick_gelu
):
    file = weights_file(tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(about))
    if quick_gelu is None:
        assert of_file(file, None) is None
    else:
        name = "ViT-tiny" if quick_gelu else "ViT-tiny-quickgelu"
        loads_with_warning(file, f"hidden_act in {tmp_path / 'config.json'}", name)


def test_open_clips_config_beside_the_weights_tells(tmp_path, registry):
    config = model_config(quick_gelu=True)
    folder = write_folder(tmp_path / "eye", open_clip.CLIP(**config), config)
    file = folder / "open_clip_model.safetensors"
    loads_with_warning(file, f"quick_gelu in {folder / 'open_clip_config.json'}")
    vision = VisionModel.load(f"ViT-tiny-quickgelu:{file}")
    assert "mean=[0.5, 0.5, 0.5]" in str(vision.preprocess)


def test_where_nothing_tells_nothing_is_said(tmp_path, registry):
    file = weights_file(tmp_path / "mine.pt")
    assert of_file(file, published_as(file)) is None
    assert VisionModel.load(f"ViT-tiny-quickgelu:{file}").activation_mismatch() is None


def test_a_file_is_preprocessed_as_all_weights_of_its_model_are(tmp_path):
    file = weights_file(tmp_path / "mine.pt")
    siglip = find_source(f"ViT-B-16-SigLIP:{file}").config["preprocess_cfg"]
    assert siglip == of_tag("ViT-B-16-SigLIP", "webli").preprocess
    assert (siglip["resize_mode"], siglip["mean"]) == ("squash", (0.5, 0.5, 0.5))
    # ViT-L-14 has weights of two kinds: open_clip's default, unless the file is known.
    assert find_source(f"ViT-L-14:{file}").config["preprocess_cfg"] == {}


def test_weights_that_do_not_fit_are_refused_with_what_they_fit(tmp_path, registry):
    file = weights_file(tmp_path / "w.pt", open_clip.CLIP(**model_config(layers=2)))
    words = (
        f"{file} and the model 'ViT-tiny:w.pt' do not fit: 12 weights are missing, "
        "transformer.resblocks.2.attn.in_proj_bias first; expected a state"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        VisionModel.load(f"ViT-tiny:{file}")
    # open_clip would stretch the position embeddings of a larger picture to fit.
    larger = model_config(image_size=40)
    open_clip.factory._MODEL_CONFIGS["ViT-tiny-40"] = larger
    weights_file(file, open_clip.CLIP(**larger))
    words = (
        "do not fit: positional_embedding has shape (26, 16), expected (17, 16); they "
        "are weights of ViT-tiny-40"
    )
    try:
        with pytest.raises(ValueError, match=re.escape(words)):
            VisionModel.load(f"ViT-tiny:{file}")
    finally:
        del open_clip.factory._MODEL_CONFIGS["ViT-tiny-40"]


def test_hugging_faces_own_weights_are_named(tmp_path, registry):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"vision_model.embeddings.class_embedding": torch.ones(16)}, file)
    with pytest.raises(
        ValueError, match="these are Hugging Face's names; open_clip ha"
    ):
        VisionModel.load(f"ViT-tiny:{file}")


def test_a_folder_with_nothing_or_too_much_is_refused(tmp_path):
    folder = write_folder(tmp_path / "eye", open_clip.CLIP(**CONFIG), CONFIG)
    usual = folder / "open_clip_model.safetensors"
    usual.rename(folder / "a.safetensors")
    assert VisionModel.load(folder).name == "eye"
    (folder / "b.bin").touch()
    words = (
        r"has a\.safetensors, b\.bin beside its open_clip_config\.json; expected one"
    )
    with pytest.raises(FileNotFoundError, match=words):
        VisionModel.load(folder)
    (folder / "a.safetensors").rename(usual)
    assert VisionModel.load(folder).name == "eye"
    usual.unlink()
    (folder / "b.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match="eye has no weights beside its open_cli"
    ):
        VisionModel.load(folder)
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no vision model in .*eye: expected op"
    ):
        VisionModel.load(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{not json", r"open_clip_config\.json is damaged, or no JSON: Expecting pr"),
        ("[]", r"open_clip_config\.json holds JSON of type list; expected an object"),
        ("{}", "the config of eye has no model_cfg with embed_dim and vision_cfg"),
        (
            json.dumps({"model_cfg": model_config(no_such_entry=1)}),
            "cannot build the vision model of eye: .* argument 'no_such_entry'",
        ),
        (
            json.dumps({"model_cfg": model_config(timm_model_name="no_such_vit")}),
            r"cannot build the vision model of eye: Unknown model \(no_such_vit\)",
        ),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(tmp_path, text, words):
    folder = write_folder(
        tmp_path / "eye", open_clip.CLIP(**CONFIG), CONFIG, PREPROCESS
    )
    (folder / "open_clip_config.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        VisionModel.load(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", r"vision\.json does not say all that VisionModel\.save writes: KeyErr"),
        ("[]", r"vision\.json holds JSON of type list; expected an object"),
        (
            json.dumps({"name": "eye", "block": 1, "origin": [True]}),
            r"vision\.json does not say all that VisionModel\.save writes: TypeError",
        ),
    ],
)
def test_a_saved_model_that_says_too_little_is_refused(tmp_path, text, words):
    (tmp_path / "vision.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        VisionModel.load(tmp_path)


def test_a_config_beside_the_weights_that_is_no_object_is_named(tmp_path):
    file = weights_file(tmp_path / "w.bin")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds JSON of type list"):
        of_file(file, None)


def test_truncated_weights_are_refused(tmp_path):
    folder = write_folder(tmp_path / "eye", open_clip.CLIP(**CONFIG), CONFIG)
    file = folder / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no safetensors file, or not all of it is"):
        VisionModel.load(folder)
