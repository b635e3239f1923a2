"""SAEs in memory and streamed are the same, and of the streamed two are held."""

import gc
import re
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import formats
import hub
import huggingface_hub
import pytest
import torch
from tiny import tiny_model, tiny_sae

import vlm_probe
from vlm_probe import checkup
from vlm_probe.cli import main
from vlm_probe.codes import encoding
from vlm_probe.model import cheap_findings, identity
from vlm_probe.saes import (
    StreamedSaes,
    encoding_of,
    load_saes,
    loading,
    memory,
    residency,
)
from vlm_probe.saes.memory import allowed, memory_at_hand
from vlm_probe.weights import read_weights

LAYERS, WIDTH, FEATURES = 3, 32, 96


class Shelf:
    """Readers of tiny SAEs, and what they were asked for."""

    def __init__(self, layers=4, make=tiny_sae):
        self.make = make
        self.readers = {n: lambda n=n: self.read(n) for n in range(layers)}
        self.read_ahead = []
        self.read_now = []
        self.made = []
        self.alive_before = []
        self.fails = {}

    def read(self, layer):
        front = threading.current_thread() is threading.main_thread()
        (self.read_now if front else self.read_ahead).append(layer)
        self.alive_before.append(self.alive())
        if layer in self.fails:
            raise self.fails[layer]
        sae = self.make(layer)
        self.made.append(weakref.ref(sae.sae))
        return sae

    def alive(self):
        """How many SAEs have weights, and so are no outlines."""
        held = [ref() for ref in self.made]
        return sum(sae is not None and not sae.W_enc.is_meta for sae in held)

    def streamed(self):
        saes = StreamedSaes(self.readers)
        for said in (self.read_now, self.alive_before):
            said.clear()
        return saes


def finish():
    """Waits for what is read in the background; it ends by itself."""
    for thread in threading.enumerate():
        if thread.name.startswith("vlm_probe-sae"):
            thread.join(timeout=10)
            assert not thread.is_alive()


def test_a_mapping_like_any_other():
    shelf = Shelf()
    saes = shelf.streamed()
    assert (list(saes), len(saes)) == ([0, 1, 2, 3], 4)
    assert 3 in saes
    assert 4 not in saes
    assert shelf.read_now == []
    for layer, sae in saes.items():
        assert sae.layer == layer
        assert torch.equal(sae.sae.W_enc, tiny_sae(layer).sae.W_enc)
    with pytest.raises(KeyError, match="4"):
        saes[4]
    assert saes.get(4) is None


def test_the_next_is_read_before_it_is_asked_for():
    shelf = Shelf()
    saes = shelf.streamed()
    for _ in range(3):
        for layer in range(4):
            sae = saes[layer]
            finish()
            assert shelf.read_ahead[-1] == (layer + 1) % 4
            assert saes[layer] is sae
            del sae
    # The very first alone was not foreseen.
    assert shelf.read_now == [0]
    assert shelf.read_ahead == [1, 2, 3, 0] * 3


def test_what_is_given_was_read_in_the_background():
    shelf = Shelf()
    saes = shelf.streamed()
    saes[0]
    finish()
    ahead = shelf.made[-1]()
    assert saes[1].sae is ahead


def test_two_are_held_at_most():
    shelf = Shelf()
    saes = shelf.streamed()
    gc.disable()
    try:
        for _ in range(2):
            for layer in saes:
                saes[layer]
                finish()
                assert shelf.alive() == 2
        # One was there whenever another was begun to be read.
        assert max(shelf.alive_before) == 1
        for _layer, _sae in saes.items():
            assert shelf.alive() <= 2
        del _sae
        del saes
        finish()
        assert shelf.alive() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_what_sae_lens_ties_in_a_circle_is_freed_too(tmp_path, normalize):
    for layer in range(LAYERS):
        formats.write_saelens(
            tmp_path / f"layer_{layer}",
            formats.weights(layer),
            hook_name=None,
            normalize_activations=normalize,
        )
    saes = load_saes(tmp_path, residency="streamed")
    held = load_saes(tmp_path, residency="memory")
    x = torch.randn(5, formats.D_MODEL)
    gc.disable()
    try:
        for layer in saes:
            codes, x_hat = saes[layer].code(x)
            expected, expected_hat = held[layer].code(x)
            assert (codes.value == expected.value).all()
            assert torch.equal(x_hat, expected_hat)
            first = weakref.ref(saes[layer].sae.W_enc)
            finish()
            saes[(layer + 1) % LAYERS]
            assert first() is None
    finally:
        gc.enable()


def test_leaps_are_learned():
    shelf = Shelf(6)
    saes = shelf.streamed()
    for layer in (1, 4, 1, 4, 1):
        saes[layer]
        finish()
    assert shelf.read_ahead == [2, 5, 4, 1, 4]
    assert shelf.read_now == [1, 4, 1]
    assert shelf.alive() == 2


def test_a_wrong_guess_is_waited_for_and_forgotten():
    reading, most = set(), []

    def slow(layer):
        reading.add(layer)
        most.append(len(reading))
        time.sleep(0.1)
        reading.remove(layer)
        return tiny_sae(layer)

    shelf = Shelf(6, slow)
    saes = shelf.streamed()
    for layer in (0, 3, 5):
        assert saes[layer].layer == layer
    assert (shelf.read_now, shelf.read_ahead[:2]) == ([0, 3, 5], [1, 4])
    assert max(most) == 1
    finish()
    assert shelf.alive() == 2


def test_one_alone_stays():
    shelf = Shelf(1)
    saes = shelf.streamed()
    assert saes[0] is saes[0]
    assert (shelf.read_now, shelf.read_ahead) == ([0], [])


def test_an_error_in_the_background_reaches_who_asks():
    shelf = Shelf()
    saes = shelf.streamed()
    shelf.fails[1] = OSError("layer_1 has gone from the disk")
    saes[0]
    finish()
    with pytest.raises(OSError, match=r"^layer_1 has gone from the disk$"):
        saes[1]
    del shelf.fails[1]
    assert saes[1].layer == 1
    finish()
    assert saes[2].layer == 2


def test_what_cannot_be_read_is_said_at_once(tmp_path):
    shelf = Shelf()
    shelf.fails[3] = ValueError("layer_3 is damaged")
    with pytest.raises(ValueError, match="layer_3 is damaged"):
        StreamedSaes(shelf.readers)
    write_gemma_scope(tmp_path)
    file = tmp_path / "layer_2" / "params.npz"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"layer_2/params\.npz is damaged"):
        load_saes(tmp_path, residency="streamed")


def test_no_thread_outlives_its_reading():
    def slow(layer):
        time.sleep(0.1)
        return tiny_sae(layer)

    saes = Shelf(2, slow).streamed()
    saes[0]
    assert any(t.name.startswith("vlm_probe-sae") for t in threading.enumerate())
    del saes
    finish()
    assert not any(t.name.startswith("vlm_probe-sae") for t in threading.enumerate())


# From files


def write_gemma_scope(folder):
    for layer in range(LAYERS):
        made = formats.weights(layer, WIDTH, FEATURES)
        formats.write_gemma_scope(folder / f"layer_{layer}", made)


def write_saelens(folder):
    for layer in range(LAYERS):
        formats.write_saelens(
            folder / f"layer_{layer}",
            formats.weights(layer, WIDTH, FEATURES),
            "jumprelu",
            hook_name=f"blocks.{layer}.hook_resid_post",
            metadata={"model_from_pretrained_kwargs": {"fold_ln": True}},
        )


def write_dictionaries(folder):
    for layer in range(LAYERS):
        made = formats.weights(layer, WIDTH, FEATURES)
        where, trainer = folder / f"layer_{layer}", {"lm_name": None}
        formats.write_dictionary(
            where, made, "BatchTopKSAE", layer=layer, trainer=trainer
        )


WRITERS = {
    "Gemma Scope": write_gemma_scope,
    "SAELens": write_saelens,
    "dictionary_learning": write_dictionaries,
}


@pytest.fixture(scope="module", params=WRITERS)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("saes")
    WRITERS[request.param](made)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_and_held_are_the_same(folder, dtype):
    held = load_saes(folder, residency="memory", dtype=dtype)
    saes = load_saes(folder, residency="streamed", dtype=dtype)
    assert isinstance(held, dict)
    assert isinstance(saes, StreamedSaes)
    for _ in range(2):
        for layer in saes:
            for name, tensor in held[layer].sae.state_dict().items():
                assert torch.equal(tensor, saes[layer].sae.state_dict()[name])
    for layer, outline in saes.outlines.items():
        assert outline.sae.W_enc.is_meta
        for known in ("name", "hook_point", "d_model", "n_features", "n_bytes"):
            assert getattr(outline, known) == getattr(held[layer], known)
        assert outline.processing == held[layer].processing == saes[layer].processing
        assert outline.model_name == held[layer].model_name


def test_processing_is_told_and_not_warned_of(tmp_path):
    write_saelens(tmp_path)
    for how in ("memory", "streamed"):
        for sae in load_saes(tmp_path, residency=how).values():
            assert sae.processing == {"fold_ln": True}


def test_reading_in_the_background_leaves_the_filters_of_warnings_alone(
    folder, monkeypatch
):
    """They are the whole process's, and what one thread puts back another has set."""
    entered = []
    enter = warnings.catch_warnings.__enter__

    def record(self):
        entered.append(threading.current_thread())
        return enter(self)

    saes = load_saes(folder, residency="streamed")
    monkeypatch.setattr(warnings.catch_warnings, "__enter__", record)
    for _ in range(2):
        for layer in saes:
            saes[layer]
    finish()
    assert set(entered) <= {threading.main_thread()}


def test_reading_draws_no_random_numbers(folder):
    """Or what is drawn meanwhile would depend on when it is read."""
    saes = load_saes(folder, residency="streamed")
    before = torch.get_rng_state()
    for layer in saes:
        saes[layer]
    finish()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_thread_of_its_own_reads_pickles_without_filters(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "odd.pt", pickle_protocol=3)
    words = "Detected pickle protocol 3"
    assert read_weights(tmp_path / "odd.pt")[0]["x"].sum() == 2
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.warns(UserWarning, match=words),
    ):
        pool.submit(read_weights, tmp_path / "odd.pt").result()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub")
    )
    return tmp_path / "hub"


def test_a_release_is_streamed_too(cache):
    repo = formats.cached(cache, "jbloom/GPT2-Small-SAEs-Reformatted")
    for layer in (4, 5, 6):
        hook = f"blocks.{layer}.hook_resid_pre"
        formats.write_old_saelens(repo / hook, formats.weights(layer), hook)
    saes = load_saes("gpt2-small-res-jb", layers=[4, 5, 6], residency="streamed")
    assert isinstance(saes, StreamedSaes)
    for layer in (4, 5, 6, 4):
        sae = saes[layer]
        assert torch.equal(sae.sae.W_dec, formats.weights(layer)["W_dec"])
        assert sae.processing == {"center_writing_weights": True}
        assert sae.neuronpedia_id == f"gpt2-small/{layer}-res-jb"


def test_processing_that_only_a_releases_file_tells_is_kept(cache):
    release = "gemma-2-2b-res-matryoshka-dc"
    repo_id = "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40"
    hook, told = "blocks.4.hook_resid_post", {"fold_ln": True}
    formats.write_saelens(
        formats.cached(cache, repo_id) / "standard" / hook,
        formats.weights(),
        hook_name=hook,
        metadata={"model_from_pretrained_kwargs": told},
    )
    assert load_saes(release, layers=[4])[4].processing == told


# Mapped files

needs_maps = pytest.mark.skipif(
    not Path("/proc/self/smaps").is_file(), reason="only Linux tells what is mapped"
)


def mapped(tensor):
    """The file in which a tensor lies, and how many of its bytes are in memory."""
    area = r"^([0-9a-f]+)-([0-9a-f]+) (?:\S+ +){4}(.*)\n(?:\w+:.*\n)*?Rss: +(\d+) kB"
    for low, high, file, kilobytes in re.findall(
        area, Path("/proc/self/smaps").read_text(), re.MULTILINE
    ):
        if int(low, 16) <= tensor.data_ptr() < int(high, 16):
            return file, int(kilobytes) * 1024
    raise AssertionError("it lies nowhere")


@needs_maps
def test_files_of_sae_lens_are_mapped_and_their_pages_read_ahead(tmp_path):
    for layer in range(2):
        made = formats.weights(layer, 64, 8192)
        hook = f"blocks.{layer}.hook_resid_post"
        formats.write_saelens(tmp_path / f"layer_{layer}", made, hook_name=hook)
    held = load_saes(tmp_path, residency="memory")
    weights = held[0].sae.W_enc
    file, present = mapped(weights)
    assert file == str(tmp_path / "layer_0" / "sae_weights.safetensors")
    assert present < weights.nbytes / 2
    del held, weights
    saes = load_saes(tmp_path, residency="streamed")
    saes[0]
    finish()
    weights = saes[1].sae.W_enc
    file, present = mapped(weights)
    assert file == str(tmp_path / "layer_1" / "sae_weights.safetensors")
    assert present > 2 * weights.nbytes  # W_dec is as large, and there are biases


@needs_maps
@pytest.mark.parametrize("write", ["Gemma Scope", "SAELens"])
def test_what_has_to_be_converted_is_copied(tmp_path, write):
    WRITERS[write](tmp_path)
    dtype = "float32" if write == "Gemma Scope" else "bfloat16"
    file, _ = mapped(load_saes(tmp_path, dtype=dtype)[0].sae.W_enc)
    assert not file.startswith("/")


# The memory at hand

ONE = 4 * (2 * WIDTH * FEATURES + 2 * FEATURES + WIDTH)
"""Bytes of one of our JumpReLU SAEs, by hand."""


@pytest.mark.parametrize(
    ("written", "dtype", "needed"),
    [
        ("Gemma Scope", "float32", 3 * ONE),
        ("Gemma Scope", "float64", 6 * ONE),
        ("SAELens", "float32", 3 * ONE),
        ("SAELens", "bfloat16", 3 * ONE / 2),
    ],
)
def test_auto_holds_all_that_leave_half_of_the_memory(
    tmp_path, monkeypatch, written, dtype, needed
):
    WRITERS[written](tmp_path)
    asked = []
    for spare, kind in ((0, dict), (-2, StreamedSaes)):
        at_hand = 2 * int(needed) + spare
        monkeypatch.setattr(
            residency, "memory_at_hand", lambda on, n=at_hand: asked.append(on) or n
        )
        assert type(load_saes(tmp_path, dtype=dtype)) is kind
    assert asked == ["cpu", "cpu"]


def test_auto_counts_features_where_layers_differ(tmp_path, monkeypatch):
    for layer, features in ((0, FEATURES), (1, 2 * FEATURES)):
        made = formats.weights(layer, WIDTH, features)
        formats.write_gemma_scope(tmp_path / f"layer_{layer}", made)
    for at_hand, kind in ((6 * ONE, dict), (6 * ONE - 2, StreamedSaes)):
        monkeypatch.setattr(residency, "memory_at_hand", lambda _, n=at_hand: n)
        assert type(load_saes(tmp_path)) is kind


def test_screens_are_chosen_where_they_fit(tmp_path, monkeypatch):
    write_saelens(tmp_path)
    saes = load_saes(tmp_path)
    # Here without fast products, and small: dense, but for those who insist.
    assert encoding_of(saes, "auto") == encoding_of(saes, "dense") == "dense"
    assert encoding_of(saes, "screened") == "screened"
    monkeypatch.setattr(encoding, "fast_bfloat16", lambda _: True)
    monkeypatch.setattr(encoding, "_LARGE", FEATURES)
    needed = 4 * 3 * sum(sae.n_bytes for sae in saes.values()) // 4
    for at_hand, chosen in ((needed, "screened"), (needed - 4, "dense")):
        monkeypatch.setattr(residency, "memory_at_hand", lambda _, n=at_hand: n)
        assert encoding_of(saes, "auto") == chosen
    monkeypatch.setattr(residency, "memory_at_hand", lambda _: sys.maxsize)
    streamed = load_saes(tmp_path, residency="streamed")
    assert encoding_of(streamed, "auto") == "dense"


def test_the_choice_can_be_made_by_the_user(tmp_path, monkeypatch):
    write_saelens(tmp_path)
    monkeypatch.setattr(residency, "memory_at_hand", lambda _: 0)
    assert type(load_saes(tmp_path, residency="memory")) is dict
    monkeypatch.setattr(residency, "memory_at_hand", lambda _: sys.maxsize)
    assert type(load_saes(tmp_path, residency="streamed")) is StreamedSaes


def test_an_unknown_residency_is_refused(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"^unknown residency 'disk'; valid: auto, memory, streamed$"
    ):
        load_saes(tmp_path, residency="disk")
    words = "unknown sae_residency 'disk'; valid: auto, memory, streamed"
    with pytest.raises(ValueError, match=words):
        vlm_probe.load("toy", sae_residency="disk")
    monkeypatch.setattr(sys, "argv", ["vlm-probe", "doctor", "--sae-residency=disk"])
    with pytest.raises(SystemExit, match=words):
        main()
    with pytest.raises(ValueError, match="sae_residency given, but saes is an object"):
        vlm_probe.load("toy", saes={0: tiny_sae(0)}, sae_residency="memory")


GIB = 2**30


def group(folder, version, limit, usage, files=0):
    """Files of one control group; half of its cached files were used lately."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    half = files // 2
    kinds = (f"{names[2]}{kind}_file {half}" for kind in ("inactive", "active"))
    (folder / "memory.stat").write_text("\n".join(["anon 12345", *kinds, ""]))


JOB = "system.slice/slurmstepd.scope/job_7"


def test_a_job_has_what_its_group_leaves(tmp_path):
    proc, mount = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text(f"0::/{JOB}/step_0/task_0\n")
    group(mount / JOB, 2, 8 * GIB, 3 * GIB)
    group(mount / JOB / "step_0", 2, "max", 3 * GIB)
    group(mount / JOB / "step_0" / "task_0", 2, "max", 3 * GIB)
    assert allowed(proc, mount) == 5 * GIB
    # Files that were read make way.
    group(mount / JOB, 2, 8 * GIB, 8 * GIB, files=6 * GIB)
    assert allowed(proc, mount) == 6 * GIB
    # The narrowest decides, and what is exceeded leaves nothing.
    group(mount / JOB / "step_0", 2, 4 * GIB, 3 * GIB)
    assert allowed(proc, mount) == 1 * GIB
    group(mount / JOB / "step_0", 2, 4 * GIB, 5 * GIB)
    assert allowed(proc, mount) == 0


def test_groups_of_version_1(tmp_path):
    proc, mount = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("5:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n1:name=systemd:/\n0::/\n")
    group(mount / "memory", 1, 2**63 - 4096, 9 * GIB)
    assert allowed(proc, mount) > 2**62
    group(mount / "memory" / "slurm", 1, 16 * GIB, 9 * GIB, files=2 * GIB)
    assert allowed(proc, mount) == 9 * GIB
    group(mount / "memory" / "slurm" / "job_7", 1, 4 * GIB, 1 * GIB)
    assert allowed(proc, mount) == 3 * GIB


def test_a_container_knows_its_group_by_an_outer_name(tmp_path):
    proc, mount = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("4:memory:/docker/0123abc\n")
    group(mount / "memory", 1, 2 * GIB, 1 * GIB)
    assert allowed(proc, mount) == 1 * GIB
    proc.write_text("0::/../../init.scope\n")
    group(mount, 2, 3 * GIB, 1 * GIB)
    assert allowed(proc, mount) == 2 * GIB


def test_nothing_limits_where_there_are_no_groups(tmp_path):
    assert allowed(tmp_path / "none", tmp_path) == sys.maxsize
    (tmp_path / "cgroup").write_text("0::/\n")
    assert allowed(tmp_path / "cgroup", tmp_path) == sys.maxsize


def test_this_machine_has_some_memory(monkeypatch):
    assert 0 < memory_at_hand("cpu") < 2**50
    monkeypatch.setattr(memory, "allowed", lambda: 1000)
    assert memory_at_hand("cpu") == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # as torchrun says
    assert memory_at_hand("cpu") == 250


def test_on_a_gpu_what_pytorch_keeps_for_itself_is_free(monkeypatch):
    told = {"mem_get_info": (10, 100), "memory_reserved": 7, "memory_allocated": 4}
    for name, said in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, said=said: said)
    assert memory_at_hand("cuda:0") == 10 + 7 - 4


# A whole model


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """All parts but the SAEs, on disk."""
    root = tmp_path_factory.mktemp("stack")
    hub.write_language(root / "tiny-gemma-2", "gemma2")
    hub.write_vision(root / "ViT-tiny")
    torch.save(torch.nn.Linear(24, WIDTH).state_dict(), root / "projector.pth")
    return {
        "language": root / "tiny-gemma-2",
        "vision": root / "ViT-tiny",
        "adapter": root / "projector.pth",
        "device": "cpu",
    }


def probe(model):
    pictures = [hub.picture((50 + seed, 40), seed) for seed in range(3)]
    how = dict(replicates=20, batch_size=2, controls=["noise"], progress=False)
    return vlm_probe.probe_layers(model, pictures, **how)


def test_a_probe_finds_the_same_bit_for_bit_with_two_saes(stack, folder, monkeypatch):
    alive, most = weakref.WeakSet(), []
    read = loading.read

    def counted(*given, **how):
        most.append(sum(not sae.W_enc.is_meta for sae in alive))
        sae = read(*given, **how)
        alive.add(sae)
        return sae

    held = vlm_probe.load(**stack, saes=folder, sae_residency="memory")
    monkeypatch.setattr(loading, "read", counted)
    model = vlm_probe.load(**stack, saes=folder, sae_residency="streamed")
    assert isinstance(model.saes, StreamedSaes)
    expected, found = probe(held), probe(model)
    assert found.layers.equals(expected.layers)
    assert found.features.equals(expected.features)
    assert found.top_features.equals(expected.top_features)
    assert found.meta["parts"] == expected.meta["parts"]
    assert found.meta["findings"] == expected.meta["findings"]
    assert len(most) > 3 * LAYERS
    # One was there whenever another was begun to be read.
    assert max(most) == 1


def streamed_model():
    shelf = Shelf(LAYERS)
    return replace(tiny_model(), saes=shelf.streamed()), shelf


def test_what_needs_no_weights_reads_none():
    model, shelf = streamed_model()
    finish()
    for said in (shelf.read_now, shelf.read_ahead):
        said.clear()
    findings = cheap_findings(model)
    assert findings == cheap_findings(tiny_model())
    assert model.hook_point == "resid_post"
    assert max(model.saes) == 2
    finish()
    # Type checks, which only tests make, look at the first, and the next is read ahead.
    assert 2 not in shelf.read_now + shelf.read_ahead


def test_the_doctor_counts_two(monkeypatch):
    monkeypatch.setattr(checkup, "_size", str)
    model, _ = streamed_model()
    one = 4 * (2 * 16 * 64 + 2 * 64 + 16)
    for examined, words in (
        (model, f" two SAEs of 3 {2 * one},"),
        (tiny_model(), f" SAEs {3 * one},"),
    ):
        found = {f.check: f.said for f in checkup.doctor(examined, quiet=True)}
        assert words in found["memory"]


def test_a_streamed_model_is_saved_whole(stack, folder, tmp_path):
    model = vlm_probe.load(**stack, saes=folder, sae_residency="streamed")
    again = vlm_probe.load(model.save(tmp_path / "bundle"), device="cpu")
    expected, found = model.identities(), again.identities()
    assert {n: p["sha256"] for n, p in expected.items()} == {
        n: p["sha256"] for n, p in found.items()
    }


# Identities


@pytest.fixture
def hashed(monkeypatch):
    """Modules that were hashed."""
    seen = []
    sha256 = identity._sha256
    monkeypatch.setattr(
        identity, "_sha256", lambda module: seen.append(module) or sha256(module)
    )
    return seen


def shift(sae):
    with torch.no_grad():
        sae.b_enc.add_(1)


def shuffle(sae):
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec.flip(0))


def through_data(sae):
    sae.W_enc.data[3, 5] += 1e-3


def replaced(sae):
    sae.b_dec.data = sae.b_dec.data.roll(2)  # which leaves the sum as it is


@pytest.mark.parametrize("change", [shift, shuffle, through_data, replaced])
def test_weights_are_hashed_once_and_again_when_changed(hashed, change):
    model = tiny_model()
    first = model.identities()
    assert len(hashed) == 6
    hashed.clear()
    assert model.identities() == first
    assert replace(model, name="other").identities() == first
    assert hashed == []
    change(model.saes[1].sae)
    second = model.identities()
    assert hashed == [model.saes[1].sae]
    assert {who for who in first if first[who] != second[who]} == {"sae of layer 1"}
    assert model.identities() == second
    assert len(hashed) == 1


def test_streamed_weights_are_hashed_once(hashed):
    model, shelf = streamed_model()
    first = model.identities()
    finish()  # since making a tiny SAE draws random numbers
    assert first == tiny_model().identities()
    assert len(hashed) == 12
    hashed.clear()
    shelf.read_now.clear()
    assert model.identities() == first
    assert hashed == []
    assert set(shelf.read_now) <= {0}  # by type checks, which only tests make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("begin", range(5))
def test_every_bit_is_summed(dtype, begin):
    """Wherever a tensor begins in its storage."""
    whole = torch.arange(40).to(dtype)
    part = whole[begin:37]
    before = identity._sum_of_bits(part)
    for at in range(len(part)):
        kept = part[at].clone()
        part[at] += 1
        assert identity._sum_of_bits(part) != before
        part[at] = kept
    assert identity._sum_of_bits(part) == before
    assert identity._sum_of_bits(torch.tensor([3, 4])) == 7
    assert identity._sum_of_bits(torch.tensor(3)) == 3
    assert identity._sum_of_bits(torch.empty(0)) == 0
