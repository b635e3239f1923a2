"""Tokens from disk are those that the tower gave, whatever happens to the disk."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_vision

from vlm_probe.examples import UNREADABLE, Example
from vlm_probe.vision import TokenCache, VisionModel


class Counted(VisionModel):
    """Counts the pictures of each batch that it encodes."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.batches = []

    def encode(self, images):
        self.batches.append(len(images))
        # As on a large machine, the last digits depend on the batch.
        return super().encode(images) * (1 + 2**-10 * len(images))


@pytest.fixture
def vision():
    tiny = tiny_vision()
    return Counted(tiny.visual, tiny.preprocess, name="tiny")


def cache(folder, vision, **options):
    return TokenCache(folder / "tokens", vision, identity="abc", **options)


def noise(seed, side=40):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def given(tmp_path):
    """Two pictures in files and two in memory, one as it stands in a file."""
    noise(0).save(tmp_path / "a.png")
    noise(1).save(tmp_path / "b.png")
    return [
        Example(tmp_path / "a.png", id="a"),
        Example(str(tmp_path / "b.png"), id="b"),
        Example(noise(2), id="c"),
        Example((tmp_path / "b.png").read_bytes(), id="d"),
    ]


def files(folder):
    return sorted(p for p in (folder / "tokens").rglob("*") if p.is_file())


def test_what_is_on_disk_is_what_the_tower_gave(vision, given, tmp_path):
    expected = vision.encode([e.picture() for e in given])
    found = cache(tmp_path, vision).encode(given)
    assert torch.equal(found, expected)
    assert found.dtype == vision.dtype
    names = [p.relative_to(tmp_path / "tokens") for p in files(tmp_path)]
    assert len(names) == 4
    assert all(
        re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{62}\.safetensors", str(n)) for n in names
    )
    again = cache(tmp_path, vision)
    vision.batches.clear()
    assert torch.equal(again.encode(given), expected)
    assert torch.equal(again.encode(given[::-1]), expected.flip(0))
    assert torch.equal(again.encode(given[1:2]), expected[1:2])
    assert vision.batches == []


def test_a_batch_is_encoded_as_a_whole_and_what_is_there_stays(vision, given, tmp_path):
    kept = cache(tmp_path, vision)
    first = kept.encode(given[:1])
    (file,) = files(tmp_path)
    written = file.stat().st_mtime_ns
    found = kept.encode(given)
    assert vision.batches == [1, 4]
    whole = Counted.encode(vision, [e.picture() for e in given])
    assert not torch.equal(first, whole[:1])
    # From disk what was there, from the whole batch what was not.
    assert torch.equal(found, torch.cat([first, whole[1:]]))
    assert file.stat().st_mtime_ns == written
    assert torch.equal(kept.encode(given), found)


def test_a_picture_that_comes_twice_has_the_same_tokens(vision, given, tmp_path):
    found = cache(tmp_path, vision).encode([given[0], given[2], given[0]])
    assert torch.equal(found[0], found[2])
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
def test_half_the_disk_rounds_from_the_first_time_on(dtype, vision, given, tmp_path):
    exact = vision.encode([e.picture() for e in given])
    kind = getattr(torch, str(dtype).removeprefix("torch."))
    for _ in range(2):
        found = cache(tmp_path, vision, dtype=dtype).encode(given)
        assert found.dtype == torch.float32
        assert torch.equal(found, exact.to(kind).float())
        assert not torch.equal(found, exact)
    half = sum(f.stat().st_size for f in files(tmp_path))
    assert len(files(tmp_path)) == 4
    cache(tmp_path, vision).encode(given)  # has files of its own
    assert len(files(tmp_path)) == 8
    n_values = exact.numel()
    assert half == pytest.approx(2 * n_values, abs=4 * 300)


def test_a_value_too_large_for_its_dtype_is_told(vision, given, tmp_path):
    with torch.no_grad():
        vision.visual.transformer.resblocks[-1].mlp.c_proj.weight.mul_(1e7)
    words = "example 'a': its largest vision token value, .* is too large for torch.flo"
    with pytest.raises(ValueError, match=words):
        cache(tmp_path, vision, dtype="float16").encode(given)
    assert files(tmp_path) == []
    assert cache(tmp_path, vision, dtype="bfloat16").encode(given).isfinite().all()


def n_new(folder, given, vision, identity="abc", **options):
    before = len(files(folder))
    kept = TokenCache(folder / "tokens", vision, identity=identity, **options)
    tokens = kept.encode(given)
    expected = vision.encode([e.picture() for e in given])
    if isinstance(vision, Counted):
        assert torch.allclose(tokens, expected, rtol=1e-2)
    return len(files(folder)) - before


def test_what_tokens_are_known_by(vision, given, tmp_path):
    assert n_new(tmp_path, given[::3], vision) == 2
    assert n_new(tmp_path, given[::3], vision) == 0
    assert n_new(tmp_path, given[::3], vision, identity="other weights") == 2
    earlier = VisionModel(vision.visual, vision.preprocess, block=0)
    assert n_new(tmp_path, given[::3], earlier) == 2
    other = tiny_vision().preprocess.transforms[:-1]
    plain = VisionModel(vision.visual, type(vision.preprocess)(other))
    assert n_new(tmp_path, given[::3], plain) == 2
    heads = VisionModel(
        vision.visual, vision.preprocess, config={"model_cfg": {"heads": 1}}
    )
    assert n_new(tmp_path, given[::3], heads) == 2
    assert n_new(tmp_path, given[::3], vision) == 0


def test_what_pictures_are_known_by(vision, given, tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    first = [given[0]]
    assert n_new(tmp_path, first, vision) == 1
    # A path is the same file, however it is written.
    monkeypatch.chdir(tmp_path)
    assert n_new(tmp_path, [Example("a.png")], vision) == 0
    os.utime(file, ns=(0, 7))
    assert n_new(tmp_path, first, vision) == 1
    noise(5, side=48).save(file)
    os.utime(file, ns=(0, 7))
    assert n_new(tmp_path, first, vision) == 1
    # Pixels are the same picture, wherever they are.
    assert n_new(tmp_path, [Example(noise(6))], vision) == 1
    assert n_new(tmp_path, [Example(noise(6), "what ?", id="z")], vision) == 0
    turned = noise(6)
    turned.getexif()[274] = 6
    assert n_new(tmp_path, [Example(turned)], vision) == 1
    long, wide = Image.new("RGB", (20, 10)), Image.new("RGB", (10, 20))
    assert n_new(tmp_path, [Example(long), Example(wide)], vision) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other", "text"])
def test_a_damaged_file_is_replaced(damage, vision, given, tmp_path):
    kept = cache(tmp_path, vision)
    expected = kept.encode(given)
    file = files(tmp_path)[0]
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    file.write_bytes(
        {
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "flipped": bytes(flipped),
            "text": b"this is no file of tensors",
            "other": other_tensors(),
        }[damage]
    )
    assert torch.equal(kept.encode(given), expected)
    assert file.read_bytes() == whole
    assert len(files(tmp_path)) == 4


def other_tensors():
    from safetensors.torch import save

    return save({"tokens": torch.zeros(2, 3), "checksum": torch.tensor(0)})


def test_which_picture_cannot_be_read(vision, given, tmp_path):
    kept = cache(tmp_path, vision)
    for example, words in [
        (Example(None, id="x"), "example 'x': the example has no picture"),
        (Example(b"no", id="x"), "example 'x': cannot identify the picture"),
        (
            Example(tmp_path / "cut.png", id="x"),
            f"example 'x': {tmp_path}/cut.png is c",
        ),
        (
            Example(tmp_path / "no.png", id="x"),
            f"[Errno 2] example 'x': No such file or directory: '{tmp_path}/no.png'",
        ),
        (Example("a\0.png", id="x"), "example 'x': "),
    ]:
        whole = (tmp_path / "a.png").read_bytes()
        (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UNREADABLE, match=re.escape(words)):
            kept.encode([*given, example])
    assert vision.batches == []
    assert files(tmp_path) == []


def test_a_full_disk_says_what_to_do(vision, given, tmp_path, monkeypatch):
    kept = cache(tmp_path, vision)
    write = Path.write_bytes

    def full(path, content):
        write(path, content[:50])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    words = (
        r"No space left on device; cannot keep vision tokens there, where each picture "
        r"takes 1,\d{3} bytes in torch.float32; free space, or give another folder or a"
    )
    with pytest.raises(OSError, match=words) as raised:
        kept.encode(given)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename.startswith(str(tmp_path / "tokens"))
    assert files(tmp_path) == []  # not even half of one
    monkeypatch.undo()
    kept.encode(given)
    assert len(files(tmp_path)) == 4


def test_a_folder_that_cannot_be_made(vision, given, tmp_path):
    (tmp_path / "tokens").write_text("a file")
    with pytest.raises(OSError, match="give a folder that can be written to"):
        cache(tmp_path, vision)


def test_no_pictures_are_as_the_tower_takes_them(vision, tmp_path):
    with pytest.raises(RuntimeError) as of_tower:
        vision.encode([])
    with pytest.raises(RuntimeError, match=re.escape(str(of_tower.value))):
        cache(tmp_path, vision).encode([])


def test_a_dtype_that_is_none(vision, tmp_path):
    with pytest.raises(ValueError, match="dtype 'int8': expected one of float32"):
        cache(tmp_path, vision, dtype="int8")
