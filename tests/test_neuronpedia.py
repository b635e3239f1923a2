"""Neuronpedia's exports and API: read whole, checked, asked once."""

import dataclasses
import json
import os
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import neuronpedia as np_
import pytest
from tiny import tiny_sae

from vlm_probe.analysis.descriptions import (
    NeuronpediaApi,
    NeuronpediaExport,
    SaeIdentity,
)
from vlm_probe.analysis.descriptions import database as database_module
from vlm_probe.analysis.descriptions.explanations import Explanation, best
from vlm_probe.analysis.descriptions.index import Indexed
from vlm_probe.analysis.descriptions.sources import Source, canonical, known_source
from vlm_probe.saes.offers import features
from vlm_probe.tokens import HOOK_POINTS


@pytest.fixture
def export(tmp_path):
    """Two batches of one source; feature 2 has no description, 5 has two explainers."""
    np_.write_batch(tmp_path, 0, [np_.line(0, "zero"), np_.line(1, "<b>one</b>")])
    np_.write_batch(
        tmp_path,
        10,
        [
            np_.line(2, " "),
            np_.line(5, "five"),
            np_.line(5, "cinq", explainer="o3"),
        ],
    )
    return tmp_path


def open_export(folder, sae=None, **options):
    sae = sae or np_.identity()
    return NeuronpediaExport(folder, {sae.layer: sae}, **options)


# By hand


def test_an_export_is_read(export):
    found = open_export(export)
    assert found.of(20, [1, 0, 2, 5, 7, 1]) == {
        1: "<b>one</b>",
        0: "zero",
        2: None,
        5: "five",
        7: None,
    }
    assert found.layers() == (20,)
    assert found.described(20) == (0, 1, 5)
    # A layer that it knows nothing of.
    assert found.of(3, [0]) == {0: None}
    assert dataclasses.asdict(found.report) == {
        "n_features": 16384,
        "n_described": 3,
        "n_missing": 16381,
        "n_duplicates": 0,
        "n_contradictions": 0,
        "sources": {20: np_.ID},
        "missing_layers": (),
        "unconfirmed": (np_.ID,),
        "not_read": (),
    }


def test_older_files_of_128_features_are_read(tmp_path):
    folder = tmp_path / "gemma-2-2b-gemmascope-res-16k" / np_.SOURCE
    folder.mkdir(parents=True)
    for start in (0, 128):
        told = [
            np_.feature(n, np_.said(f"number {n}")) for n in range(start, start + 128)
        ]
        (folder / f"{start // 128}.json").write_text(json.dumps(told))
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    found = open_export(tmp_path)
    assert found.of(20, [0, 127, 128, 255, 256]) == {
        0: "number 0",
        127: "number 127",
        128: "number 128",
        255: "number 255",
        256: None,
    }
    assert found.report.n_described == 256
    assert found.report.not_read == (str(tmp_path / "notes.json"),)


def test_older_files_may_be_objects_and_lists_of_explanations(tmp_path):
    (tmp_path / "gemma-2-2b_20-gemmascope-res-16k.json").write_text(
        json.dumps([np_.line(3, "three")])
    )
    other = "21-gemmascope-res-16k"
    (tmp_path / "batch-0.json").write_text(
        json.dumps({"features": [np_.feature(4, np_.said("four"), source=other)]})
    )
    found = NeuronpediaExport(tmp_path, {n: np_.identity(n) for n in (20, 21, 22)})
    assert found.of(20, [3, 4]) == {3: "three", 4: None}
    assert found.of(21, [3, 4]) == {3: None, 4: "four"}
    assert found.report.missing_layers == (22,)
    assert found.layers() == (20, 21)


def test_one_file_can_be_opened(export):
    (file,) = export.rglob("batch-0.jsonl.gz")
    assert open_export(file).report.n_described == 2


def test_the_best_explanation_is_shown(tmp_path):
    folder = tmp_path / np_.SOURCE
    folder.mkdir()
    entries = [
        np_.feature(0),
        np_.feature(1, np_.said("a"), np_.said("b", scores=[0.2, 0.4])),
        np_.feature(2, np_.said("a", scores=[0.2, 0.6]), np_.said("b", scores=[0.3])),
        np_.feature(
            3,
            np_.said("new", created="2025-01-02T00:00:00.000Z"),
            np_.said("old", created="2024-01-02T00:00:00.000Z"),
        ),
        np_.feature(4, np_.said("first"), np_.said("second", explainer="o3")),
        np_.feature(5, np_.said(None), np_.said("said")),
        np_.feature(6, np_.said("a", scores=[float("nan")]), np_.said("b", scores=[0])),
    ]
    (folder / "0.json").write_text(json.dumps(entries))
    told = open_export(tmp_path).of(20, range(7))
    assert told == {0: None, 1: "b", 2: "a", 3: "new", 4: "first", 5: "said", 6: "b"}


def test_duplicates_are_counted(tmp_path):
    lines = [
        np_.line(0, "a"),
        np_.line(0, "a"),
        np_.line(0, "other"),
        np_.line(0, "another explainer", explainer="o3"),
    ]
    np_.write_batch(tmp_path, 0, lines)
    found = open_export(tmp_path)
    assert found.report.n_duplicates == 2
    assert found.report.n_contradictions == 1
    assert found.of(20, [0]) == {0: "a"}


def test_folders_of_several_explainers_are_one_source(export):
    np_.write_batch(export, 0, [np_.line(7, "seven", explainer="o3")], part="-o3")
    np_.write_batch(export, 0, [np_.line(8, "no")], part="/../features")
    found = open_export(export)
    assert found.report.n_described == 4
    assert found.of(20, [7, 8]) == {7: "seven", 8: None}


# Which SAE


@pytest.mark.parametrize(
    ("name", "layer", "hook", "width"),
    [
        ("20-gemmascope-res-16k", 20, "resid_post", "16k"),
        ("20-gemmascope-res-16k__l0-71", 20, "resid_post", "16k"),
        ("3-gemmascope-2-res-262k", 3, "resid_post", "262k"),
        ("0-gemmascope-att-16k", 0, "attn_out", "16k"),
        ("0-gemmascope-mlp-65k", 0, "mlp_out", "65k"),
        ("0-gemmascope-2-transcoder-262k", 0, "transcoder", "262k"),
        ("5-res-jb", 5, "resid_post", None),
        ("8-res_fs768-jb", 8, "resid_post", "768"),
        ("7-res_mid_32k-oai", 7, "resid_mid", "32k"),
        ("7-res_post_128k-oai", 7, "resid_post", "128k"),
        ("19-resid-post-aa", 19, "resid_post", None),
        ("31-llamascope-res-131k", 31, "resid_post", "131k"),
        ("strange", None, None, None),
    ],
)
def test_a_source_s_name_is_understood(name, layer, hook, width):
    source = Source("m", name)
    assert (source.layer, source.hook_point, source.width) == (layer, hook, width)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("google/gemma-2-2b", "gemma-2-2b"),
        ("gpt2", "gpt2-small"),
        ("openai-community/gpt2", "gpt2-small"),
        ("google/gemma-3-4b-pt", "gemma-3-4b"),
        ("meta-llama/Llama-3.1-8B", "llama3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3-8b-it"),
    ],
)
def test_models_have_several_names(one, other):
    assert canonical(one) == canonical(other)


def test_other_models_have_other_names():
    assert canonical("gemma-2-2b-it") != canonical("gemma-2-2b")
    assert canonical("gpt2-medium") != canonical("gpt2")


def test_the_first_sets_of_gpt2_are_of_resid_pre():
    assert Source("gpt2-small", "5-res-jb").hook_point == "resid_pre"
    assert Source("gpt2", "2-res_scefr-ajt").hook_point == "resid_pre"
    assert Source("gpt2-small", "7-res_post_32k-oai").hook_point == "resid_post"
    assert Source("gemma-2b", "6-res-jb").hook_point == "resid_post"
    # The set has one more than there are blocks: what leaves the last of them.
    name = "gpt2-small/12-res-jb"
    last = SaeIdentity(11, "resid_post", 24576, "gpt2-small", name)
    assert Source.named(name).differences(last) == []
    before = SaeIdentity(11, "resid_post", 24576, "gpt2-small")
    assert len(Source.named(name).differences(before)) == 2


def test_names_agree_with_the_list_of_saelens():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    from vlm_probe.saes.offers import release_offers

    seen, wrong = 0, []
    for release in get_pretrained_saes_directory().values():
        for offer in release_offers(release):
            name = release.neuronpedia_id[offer.name]
            if not name or offer.hook_point not in HOOK_POINTS:
                continue
            source = Source.named(name)
            # Where the list has no width, the name's own.
            width = offer.width or (features(source.width) if source.width else 1)
            sae = SaeIdentity(offer.layer, offer.hook_point, width, release.model, name)
            seen += 1
            wrong += [name] if known_source(sae) is None else []
    assert seen > 300
    # Mistakes of the list: the SAEs are of layer 2, and of blocks.0.hook_resid_pre.
    assert set(wrong) <= {
        "gemma-2-9b/20-gemmascope-res-131k__l0-10",
        "pythia-70m-deduped/e-att-sm",
    }


@pytest.mark.parametrize(
    ("sae", "words"),
    [
        (
            np_.identity(model="gemma-2-2b-it"),
            "model gemma-2-2b, the SAE's is gemma-2-2b-it",
        ),
        (np_.identity(19), "layer 20, the SAE's is 19"),
        (
            np_.identity(hook="resid_pre"),
            "hook point resid_post, the SAE's is resid_pre",
        ),
        (np_.identity(width=65536), "width 16k, the SAE has 65536 features"),
        (
            np_.identity(id="gemma-2-2b/20-gemmascope-res-16k__l0-38"),
            "the SAE's is gemma-2-2b/20-gemmascope-res-16k__l0-38",
        ),
        (
            np_.identity(model=None, id="gemma-2-9b/20-gemmascope-res-16k"),
            "name gemma-2-2b/20-gemmascope-res-16k, the SAE's is gemma-2-9b/20-gemma",
        ),
    ],
)
def test_a_wrong_source_is_refused_by_name(export, sae, words):
    with pytest.raises(ValueError, match="does not describe the SAE") as caught:
        open_export(export, sae)
    assert words in str(caught.value)
    assert np_.ID in str(caught.value)


def test_the_model_it_was_trained_on_counts(export):
    # Gemma Scope's SAEs are of gemma-2-2b, whatever model they are run on.
    assert open_export(export, np_.identity(model="google/gemma-2-2b")).layers()
    assert open_export(export, np_.identity(model=None)).layers()


def test_an_sae_that_says_its_id_is_confirmed(export):
    found = open_export(export, np_.identity(id=np_.ID))
    assert found.report.unconfirmed == ()


def test_an_id_of_another_sae_is_not_trusted(export):
    wrong = np_.identity(id="gemma-2-2b/2-gemmascope-res-16k")
    found = open_export(export, wrong)
    assert found.report.unconfirmed == (np_.ID,)
    with pytest.raises(ValueError, match="layer 2, the SAE's is 20; leave this layer"):
        NeuronpediaApi({20: wrong})


def test_an_id_tells_sources_apart(tmp_path):
    for name in ("20-gemmascope-res-16k", "20-gemmascope-res-16k__l0-38"):
        np_.write_batch(tmp_path, 0, [np_.line(0, name, source=name)], source=name)
    with pytest.raises(ValueError, match="2 sources that may be of the SAE of layer"):
        open_export(tmp_path)
    assert open_export(tmp_path, np_.identity(id=np_.ID)).of(20, [0]) == {0: np_.SOURCE}


def test_a_feature_beyond_the_width_is_refused(tmp_path):
    source = "20-res-xy"
    np_.write_batch(tmp_path, 0, [np_.line(64, "a", source=source)], source=source)
    with pytest.raises(ValueError, match="names feature 64, the SAE has 64 features"):
        open_export(tmp_path, np_.identity(width=64))
    found = open_export(tmp_path, np_.identity(width=65))
    with pytest.raises(ValueError, match="features 0 to 64, asked for were 65, 99"):
        found.of(20, [3, 65, 99])


def test_a_loaded_sae_is_taken(tmp_path):
    sae = tiny_sae(1)
    sae.sae.cfg.metadata.model_name = "tiny"
    source = "1-mine-res"
    np_.write_batch(
        tmp_path, 0, [np_.line(9, "nine", model="tiny", source=source)], model="tiny"
    )
    assert NeuronpediaExport(tmp_path, {1: sae}).of(1, [9]) == {9: "nine"}


# Damage


def test_a_broken_line_is_named(export):
    file = np_.write_batch(export, 11, [np_.line(9, "nine"), '{"modelId": "gem'])
    with pytest.raises(ValueError, match=rf"line 2 of .*{file.name} is no JSON"):
        open_export(export)
    # Nothing of it was kept, and nothing is lost that was.
    file.unlink()
    assert open_export(export).report.n_described == 3


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"modelId": "m"}, "is no explanation or feature of Neuronpedia"),
        (np_.line("x", "a"), "index 'x' is no feature's number"),
        (np_.line(10**12, "a"), "index '1000000000000' is no feature's number"),
        (np_.line(-1, "a"), "index '-1' is no feature's number"),
        (np_.line(1, 7), "the description is 7, no text"),
        (np_.line(1, "a", source="21-gemmascope-res-16k"), "keep one source in each"),
        (np_.line(1, "a", model="gemma-2-9b"), "is of gemma-2-9b/20-gemmascope"),
    ],
)
def test_a_wrong_line_is_named(export, bad, words):
    np_.write_batch(export, 11, [np_.line(9, "nine"), bad])
    with pytest.raises(ValueError, match=words) as caught:
        open_export(export)
    assert "line 2 of" in str(caught.value)
    assert "batch-11.jsonl.gz" in str(caught.value)


def test_a_file_that_is_cut_off_is_named(export):
    (file,) = export.rglob("batch-10.jsonl.gz")
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"batch-10\.jsonl\.gz is cut off or damaged"):
        open_export(export)


def test_half_a_letter_is_data(tmp_path):
    np_.write_batch(tmp_path, 0, [np_.line(0, "a\ud800b\x00c\n")])
    assert open_export(tmp_path).of(20, [0]) == {0: "a�b\x00c\n"}


def test_no_export(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        open_export(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no export of Neuronpedia in"):
        open_export(tmp_path)


# The index


def test_an_export_is_indexed_once(export, monkeypatch):
    open_export(export)
    read = []
    monkeypatch.setattr(
        "vlm_probe.analysis.descriptions.index.entries",
        lambda file: read.append(file) or iter(()),
    )
    monkeypatch.setattr(
        "vlm_probe.analysis.descriptions.index.source_of",
        lambda file: read.append(file),
    )
    assert open_export(export).of(20, [5]) == {5: "five"}
    assert read == []


def test_an_export_that_changed_is_indexed_again(export):
    open_export(export)
    file = np_.write_batch(export, 0, [np_.line(0, "other")])
    changed = open_export(export)
    assert changed.of(20, [0, 1, 5]) == {0: "other", 1: None, 5: "five"}
    file.unlink()
    assert open_export(export).of(20, [0, 5]) == {0: None, 5: "five"}
    # Of the same size, only newer.
    (file,) = export.rglob("batch-10.jsonl.gz")
    np_.write_batch(
        export,
        10,
        [np_.line(2, " "), np_.line(5, "FIVE"), np_.line(5, "cinq", explainer="o3")],
    )
    os.utime(file, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert open_export(export).of(20, [5]) == {5: "FIVE"}


def test_an_index_is_written_whole_or_not(export, monkeypatch):
    found = open_export(export)
    np_.write_batch(export, 0, [np_.line(0, "other")])

    def stopped(counted):
        raise KeyboardInterrupt  # descriptions are written, what was counted is not

    monkeypatch.setattr("vlm_probe.analysis.descriptions.index.astuple", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_export(export)
    assert found.of(20, [0, 1]) == {0: "zero", 1: "<b>one</b>"}
    monkeypatch.undo()
    assert open_export(export).of(20, [0, 1]) == {0: "other", 1: None}


def test_where_the_index_goes(export, tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("index")
    open_export(export, index=place / "deep" / "mine.sqlite")
    assert [f.name for f in place.rglob("*.sqlite")] == ["mine.sqlite"]
    assert not list(export.glob(".*"))

    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    open_export(export)
    assert len(list((place / "vlm_probe" / "exports").glob("*.sqlite"))) == 1
    assert not list(export.glob(".*"))

    monkeypatch.undo()
    open_export(export)
    assert [f.name for f in export.glob(".*")] == [".vlm_probe_descriptions.sqlite"]


def test_an_index_that_is_none_is_left_alone(export, tmp_path):
    other = tmp_path / "text.sqlite"
    other.write_text("my own file, which is long enough to be looked at" * 10)
    with pytest.raises(ValueError, match="damaged, or no cache of descriptions"):
        open_export(export, index=other)
    with database_module.database(tmp_path / "b.sqlite", 7, ["CREATE TABLE t (x)"]):
        pass
    with pytest.raises(ValueError, match="is a database of something else"):
        open_export(export, index=tmp_path / "b.sqlite")
    assert other.read_text().startswith("my own file")


def test_twenty_thousand_features_open_fast_the_second_time(tmp_path, monkeypatch):
    source = "20-gemmascope-res-20k"
    for batch in range(20):
        lines = [np_.line(batch, "in its file", source=source)]
        np_.write_batch(tmp_path, batch, lines, source=source)
    told = {n: f"description {n}" for n in range(20_000)}
    # What 20,000 lines say; to read them takes a second, and some with types checked.
    with monkeypatch.context() as patched:
        patched.setattr(
            "vlm_probe.analysis.descriptions.index._read",
            lambda source, files: (told, Indexed(20_000, 0, 0, 19_999)),
        )
        sae = np_.identity(width=20_000)
        assert open_export(tmp_path, sae).report.n_missing == 0
    start = time.perf_counter()
    found = open_export(tmp_path, sae)
    again = found.of(20, range(20_000))
    assert time.perf_counter() - start < 1.5
    assert again == told


def test_best_of_none():
    assert best([]) is None
    assert best([Explanation(None, "", 1.0, "")]) is None


# The API


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def ask(tmp_path):
    """Opens the API at a server, impatiently."""

    def opened(base_url, **options):
        given = {"cache": tmp_path / "cache.sqlite", "per_second": 1000.0}
        given |= {"backoff": 0.01, "timeout": 0.3, "attempts": 3}
        saes = options.pop("saes", {20: np_.identity(id=np_.ID)})
        return NeuronpediaApi(saes, base_url=base_url, **(given | options))

    return opened


def index_of(path):
    return int(path.rsplit("/", 1)[1])


def well(path, before, headers):
    number = index_of(path)
    if number == 404:
        return 404, {"message": "Not found"}, {}
    explanations = [] if number == 7 else [np_.said(f"number {number}")]
    return 200, np_.feature(number, *explanations), {}


def test_the_api_is_asked_once(ask):
    with np_.server(well) as (base, asked):
        told = ask(base).of(20, [3, 7, 404, 3])
        assert told == {3: "number 3", 7: None, 404: None}
        assert asked == [f"/api/feature/{np_.ID}/{n}" for n in (3, 7, 404)]
        # Another run, and what has no description is not asked again either.
        assert ask(base).of(20, [404, 7, 4]) == {404: None, 7: None, 4: "number 4"}
        assert [index_of(path) for path in asked] == [3, 7, 404, 4]
        assert ask(base).layers() == (20,)
        assert ask(base).of(3, [1]) == {1: None}


@pytest.mark.parametrize(
    "trouble",
    [
        (429, b"slow down", {}),
        (429, b"slow down", {"Retry-After": "0"}),
        (500, b"oops", {}),
        (503, b"", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        (200, b"<html>Bad gateway</html>", {}),
        (200, {"message": "overloaded"}, {}),
        (200, b"[" * 100_000, {}),
        (200, b'{"modelId": "gemm', {}),
        (200, np_.feature(8, np_.said("another feature")), {}),
        (200, np_.feature(3, np_.said("x"), source="21-gemmascope-res-16k"), {}),
        (200, b"cut", {"Content-Length": 100}),
        None,
    ],
)
def test_what_fails_for_now_is_asked_again(ask, trouble):
    def answer(path, before, headers):
        return trouble if before < 2 else well(path, before, headers)

    with np_.server(answer) as (base, asked):
        assert ask(base).of(20, [3]) == {3: "number 3"}
        assert len(asked) == 3


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ((429, b"", {}), "answered 429"),
        ((502, b"", {}), "answered 502"),
        ((200, b"<html>", {}), "sent what is no JSON, '<html>'"),
        ((200, [], {}), "sent what is no feature"),
        (None, "did not answer within 0.3 s"),
    ],
)
def test_what_always_fails_is_an_error_that_names_the_url(ask, trouble, words):
    def answer(path, before, headers):
        return well(path, before, headers) if index_of(path) < 2 else trouble

    with np_.server(answer) as (base, asked):
        with pytest.raises(ConnectionError, match="asked 3 times") as caught:
            ask(base, attempts=3).of(20, [0, 1, 2])
        assert words in str(caught.value)
        assert f"{base}/api/feature/{np_.ID}/2" in str(caught.value)
        # What was answered before is kept.
        del asked[:]
        assert ask(base).of(20, [0, 1]) == {0: "number 0", 1: "number 1"}
        assert asked == []


def test_nobody_listens(ask):
    with np_.server(well) as (base, _):
        pass
    with pytest.raises(ConnectionError, match="broke off"):
        ask(base).of(20, [0])


def test_the_server_says_how_long_to_wait(ask):
    def answer(path, before, headers):
        if before == 0:
            return 429, b"", {"Retry-After": "1"}
        return well(path, before, headers)

    with np_.server(answer) as (base, _):
        start = time.monotonic()
        assert ask(base).of(20, [3]) == {3: "number 3"}
        assert 0.9 < time.monotonic() - start < 3


@pytest.mark.parametrize("dated", [False, True])
def test_it_is_not_waited_for_an_hour(ask, dated):
    when = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    header = {"Retry-After": when if dated else "3600"}
    with np_.server(lambda *_: (429, b"", header)) as (base, asked):
        with pytest.raises(
            ConnectionError, match=r"again in 3[56]\d\d s, more than pat"
        ):
            ask(base).of(20, [3])
        assert len(asked) == 1


def test_waits_grow(ask, monkeypatch):
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    with (
        np_.server(lambda *_: (500, b"", {})) as (base, _),
        pytest.raises(ConnectionError, match="asked 4 times"),
    ):
        ask(base, backoff=1.0, attempts=4).of(20, [3])
    assert [wait for wait in waits if wait >= 0.5] == [1, 2, 4]


def test_the_rate_is_kept(ask):
    with np_.server(well) as (base, _):
        start = time.monotonic()
        ask(base, per_second=20.0).of(20, range(6))
        assert time.monotonic() - start > 0.24


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_not_taken(ask, status, monkeypatch):
    with np_.server(lambda *_: (status, b"", {})) as (base, asked):
        with pytest.raises(PermissionError, match="wants a key in NEURONPEDIA_API_KEY"):
            ask(base).of(20, [3])
        monkeypatch.setenv("NEURONPEDIA_API_KEY", "secret-key")
        with pytest.raises(PermissionError, match="did not take the key") as caught:
            ask(base).of(20, [3])
        assert "secret-key" not in str(caught.value)
        assert len(asked) == 2


def test_the_key_goes_nowhere_else(ask, tmp_path, monkeypatch):
    keys = []

    def answer(path, before, headers):
        keys.append(headers.get("x-api-key"))
        return well(path, before, headers)

    monkeypatch.setenv("NEURONPEDIA_API_KEY", " secret-key\n")
    with np_.server(answer) as (base, _):
        api = ask(base)
        api.of(20, [3])
        assert keys == ["secret-key"]
        assert "secret" not in repr(api) + api.name

        def elsewhere(path, before, headers):
            return 302, b"", {"Location": f"{base}/login"}

        with (
            np_.server(elsewhere) as (other, _),
            pytest.raises(ConnectionError, match="answered 302 and points to"),
        ):
            ask(other).of(20, [3])
        assert keys == ["secret-key"]
    assert b"secret" not in (tmp_path / "cache.sqlite").read_bytes()
    with pytest.raises(ValueError, match="characters that no key has") as caught:
        ask("http://127.0.0.1:9", key="sec\nret")
    assert "sec" not in str(caught.value).replace("characters", "")


def test_saes_without_id_are_left_out(ask):
    saes = {0: np_.identity(0), 20: np_.identity(id=np_.ID)}
    assert ask("http://127.0.0.1:9", saes=saes).layers() == (20,)
    with pytest.raises(ValueError, match="none of the SAEs says its Neuronpedia id"):
        ask("http://127.0.0.1:9", saes={0: np_.identity(0)})
    with pytest.raises(ValueError, match="'nonsense' is no name of a Neuronpedia"):
        ask("http://127.0.0.1:9", saes={0: np_.identity(0, id="nonsense")})


def test_numbers_that_cannot_be_used(ask):
    with pytest.raises(ValueError, match="must be above 0"):
        ask("http://127.0.0.1:9", per_second=0.0)
    with pytest.raises(ValueError, match="features 0 to 16383, asked for were 16384"):
        ask("http://127.0.0.1:9").of(20, [16384])


def test_the_api_cannot_list(ask):
    with pytest.raises(ValueError, match="cannot list the features"):
        ask("http://127.0.0.1:9").described(20)
