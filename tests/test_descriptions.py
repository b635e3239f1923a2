"""Descriptions: tables of the user, labels from texts, and the word that opens them."""

import inspect
import json
import re

import neuronpedia as np_
import numpy as np
import pytest
import torch
from tiny import FEATURES, tiny_model, tiny_sae

from vlm_probe.analysis.descriptions import (
    Descriptions,
    DescriptionTable,
    NeuronpediaApi,
    NeuronpediaExport,
    SaeIdentity,
    label_from_texts,
    open_descriptions,
    read_descriptions,
    write_descriptions,
)
from vlm_probe.analysis.descriptions.interface import identities
from vlm_probe.analysis.descriptions.reading import FIRING, Strongest, strongest_on
from vlm_probe.saes import StreamedSaes


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


# The interface


def test_what_is_known_of_an_sae():
    sae = tiny_sae(2)
    sae.sae.cfg.metadata.model_name = "tiny"
    sae.sae.cfg.metadata.neuronpedia_id = "tiny/2-res"
    told = SaeIdentity(2, "resid_post", FEATURES, "tiny", "tiny/2-res")
    assert SaeIdentity.of(sae) == told
    assert identities({2: sae, 0: np_.identity(0)}) == {0: np_.identity(0), 2: told}


def test_streamed_saes_are_not_read():
    read = []

    def reader():
        read.append(1)
        return tiny_sae(0)

    saes = StreamedSaes({0: reader})
    del read[:]
    # As users run it: the check of types that tests add looks into the mapping.
    assert inspect.unwrap(identities)(saes)[0].n_features == FEATURES
    assert read == []


def test_saes_that_cannot_be():
    with pytest.raises(ValueError, match="no SAE given"):
        identities({})
    with pytest.raises(ValueError, match="an SAE of layer 1 stands under layer 0"):
        identities({0: np_.identity(1)})


def test_a_source_of_one_s_own():
    class Mine(Descriptions):
        name = "mine"

        def of(self, layer, features):
            return {feature: f"{layer}.{feature}" for feature in features}

        def layers(self):
            return (0, 1)

    assert Mine().of(1, [2]) == {2: "1.2"}
    with pytest.raises(ValueError, match="mine cannot list the features"):
        Mine().described(0)


# Tables


def test_a_csv_is_read(tmp_path):
    file = write(
        tmp_path / "mine.csv",
        "\ufefffeature,by,layer,description\r\n"
        '5,me,1,"red, or ""rosso""\r\n<b>line 2</b>"\r\n'
        "6,me,1,\r\n"
        "\r\n"
        '5,me,1,"red, or ""rosso""\r\n<b>line 2</b>"\r\n'
        "0,me,3,blue\r\n",
    )
    found = read_descriptions(file)
    assert found.name == "mine.csv"
    assert found.layers() == (1, 3)
    assert found.of(1, [6, 5, 7, 5]) == {
        6: None,
        5: 'red, or "rosso"\r\n<b>line 2</b>',
        7: None,
    }
    assert found.described(1) == (5,)
    assert found.described(2) == ()
    assert found.of(2, [0]) == {0: None}


@pytest.mark.parametrize(
    "told",
    [
        [
            {"layer": 1, "feature": 5, "description": "red"},
            {"layer": 1, "feature": 6, "description": None, "by": "me"},
            {"layer": "3", "feature": "0", "description": "blue"},
        ],
        {"1": {"5": "red", "6": None}, "3": {"0": "blue"}},
    ],
)
def test_json_is_read(tmp_path, told):
    found = read_descriptions(write(tmp_path / "mine.json", json.dumps(told)))
    assert found.layers() == (1, 3)
    assert found.of(1, [5, 6]) == {5: "red", 6: None}
    assert found.of(3, [0]) == {0: "blue"}


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_what_is_written_is_read(tmp_path, name):
    told = {0: {3: 'a "b", c\r\nd\n<i>', 1: "é€😀 ,"}, 2: {0: " \x00x"}}
    table = DescriptionTable(told)
    file = write_descriptions(table, tmp_path / name)
    again = read_descriptions(file)
    assert again.layers() == (0, 2)
    assert all(again.of(n, list(told[n])) == told[n] for n in told)
    # Features without description stay, where they are asked for.
    write_descriptions(table, file, features={0: [1, 9], 5: [4]})
    again = read_descriptions(file)
    assert again.of(0, [1, 9]) == {1: "é€😀 ,", 9: None}
    assert again.layers() == (0, 5)
    assert again.described(5) == ()
    with pytest.raises(ValueError, match=r"are written to \.csv or \.json"):
        write_descriptions(table, tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer,feature\n1,2\n", "has no column description; its first line must"),
        ("", "has no column layer, feature, description"),
        ("1,2,red\n", "and is '1,2,red'"),
        (
            "layer,feature,description\n1,2,red\n\n1,2,blue\n",
            "feature 2 of layer 1 twice: line 2 says 'red', line 4 says 'blue'",
        ),
        (
            'layer,feature,description\n1,2,"r\ne\nd"\n1,2,\n',
            "line 2 says 'r\\ne\\nd', line 5 says None",
        ),
        ("layer,feature,description\n1,x,red\n", "line 2 of .*: feature 'x' is no num"),
        (
            "layer,feature,description\n-1,0,red\n",
            "line 2 of .*: layer '-1' is no numb",
        ),
        ("layer,feature,description\n1,2,red, blue\n", "has 4 cells, its first line 3"),
        ('layer,feature,description\n1,2,"red\n', "line 2 of .* is no CSV"),
        (
            "layer,feature,description\n0,2,a\n1,64,red\n",
            "line 3 of .*: feature 64 of layer 1, whose SAE has features 0 to 63",
        ),
        ("layer,feature,description\n7,2,a\n", "describes layers 7, the SAEs are of"),
    ],
)
def test_a_wrong_csv_is_refused(tmp_path, text, words):
    file = write(tmp_path / "mine.csv", text)
    pattern = words if ".*" in words else re.escape(words)
    with pytest.raises(ValueError, match=pattern):
        read_descriptions(file, {n: tiny_sae(n) for n in (0, 1)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[\n{", "line 2 of .* is no JSON"),
        ("7", "holds neither a list nor an object"),
        ('[{"layer": 1}]', "entry 1 of .* is no object with layer, feature, descr"),
        ('{"1": "red"}', "layer 1 of .* is no object"),
        ('{"1": {"2": 5}}', "layer 1, feature 2 of .*: the description 5 is no text"),
        ('{"1": {"2": "a", "2": "b"}}', "twice: layer 1, feature 2 says 'a', layer 1"),
        ('{"1": {"2": "a"}, "1": {"2": "b"}}', "twice: .* says 'a', .* says 'b'"),
        ('{"1": {"1.5": "a"}}', "feature '1.5' is no number from 0"),
        ('{"1": {"64": "a"}}', "feature 64 of layer 1, whose SAE has features 0 to 63"),
        (
            '[{"layer": 1, "feature": true, "description": "a"}]',
            "entry 1 of .*: feature True is no number",
        ),
        (json.dumps([np_.line(0, "a")]), "is an export of Neuronpedia; open it with"),
    ],
)
def test_wrong_json_is_refused(tmp_path, text, words):
    file = write(tmp_path / "mine.json", text)
    with pytest.raises(ValueError, match=words):
        read_descriptions(file, {1: tiny_sae(1)})


def test_a_table_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_descriptions(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes(b"layer,feature,description\n1,2,caf\xe9\n")
    with pytest.raises(ValueError, match=r"line 2 of .* is no UTF-8"):
        read_descriptions(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"are read from \.csv or \.json"):
        read_descriptions(write(tmp_path / "a.txt", "x"))


def test_a_table_knows_the_widths(tmp_path):
    file = write(tmp_path / "a.csv", "layer,feature,description\n1,2,red\n")
    found = read_descriptions(file, {1: tiny_sae(1), 2: tiny_sae(2)})
    with pytest.raises(ValueError, match="features 0 to 63, asked for were -1, 64-65"):
        found.of(2, [0, 64, 65, -1])


# Labels from texts


def firings(*rows):
    return np.array(list(rows), FIRING)


@pytest.mark.parametrize("sorted_at", [1, 4, 1000])
def test_the_strongest_are_kept(monkeypatch, sorted_at):
    monkeypatch.setattr("vlm_probe.analysis.descriptions.reading._SORT_AT", sorted_at)
    kept = Strongest(2)
    # feature, value, text, position, word
    kept.add(firings((7, 1.0, 0, 1, 5), (3, 2.0, 0, 1, 5), (7, 3.0, 0, 2, 6)))
    kept.add(firings((7, 2.0, 1, 1, 5), (7, 3.0, 1, 2, 6), (3, 2.0, 1, 0, 4)))
    kept.add(firings((3, 0.5, 2, 0, 4), (7, 3.0, 2, 0, 6)))
    assert kept.rows().tolist() == [
        (3, 2.0, 0, 1, 5),
        (3, 2.0, 1, 0, 4),
        (7, 3.0, 0, 2, 6),
        (7, 3.0, 1, 2, 6),
    ]


def test_a_label_by_hand():
    from vlm_probe.analysis.descriptions import TextLabels

    tokenizer = tiny_model().language.tokenizer
    texts = ["a large red circle on grass .", "a small blue bar on red ."]
    first, second = (
        tokenizer(text, add_special_tokens=False).input_ids for text in texts
    )
    red, blue, circle = first[2], second[2], first[3]
    # blue 3 + 1 = 4, red 2.5 + 2 = 4.5, circle 4: red, then blue, which comes first
    # of two equal ones only if its strongest is stronger.
    rows = sorted(
        [
            (7, 4.0, 0, 3, circle),
            (7, 3.0, 1, 2, blue),
            (7, 2.5, 0, 2, red),
            (7, 2.0, 1, 5, red),
            (7, 1.0, 1, 2, blue),
        ],
        key=lambda row: -row[1],
    )
    labels = TextLabels(
        {1: firings(*rows)}, {1: 64}, texts, tokenizer, top_tokens=2, context=2
    )
    assert labels.of(1, [7, 8]) == {
        7: 'red · circle (in: "large red [circle] on grass")',
        8: None,
    }
    assert labels.described(1) == (7,)
    assert labels.described(0) == ()
    assert labels.of(0, [7]) == {7: None}
    with pytest.raises(ValueError, match="features 0 to 63, asked for were 64"):
        labels.of(1, [64])


def test_labels_show_what_fires():
    model = tiny_model()
    labels = label_from_texts(model, context=2)
    texts = model.reference_texts
    assert labels.layers() == (0, 1, 2)
    # By hand: text by text, all features, the largest code of any token.
    tokenizer, sae = model.language.tokenizer, model.saes[1]
    peaks = torch.zeros(2, 8, FEATURES)
    for n, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        prompt = torch.tensor([[tokenizer.bos_token_id, *ids]])
        _, cache = model.language.hooked.run_with_cache(prompt)
        codes = sae.sae.encode(cache["blocks.1.hook_resid_post"][0, 1:])
        peaks[n, : len(ids)] = codes
    fired = peaks.amax((0, 1)) > 0
    assert labels.described(1) == tuple(fired.nonzero()[:, 0].tolist())
    told = labels.of(1, range(FEATURES))
    assert [told[f] is not None for f in range(FEATURES)] == fired.tolist()
    assert 0 < fired.sum() < FEATURES
    for feature in labels.described(1):
        n, place = divmod(int(peaks[:, :, feature].argmax()), 8)
        words = texts[n].split()
        shown = [*words[max(0, place - 2) : place], f"[{words[place]}]"]
        shown += words[place + 1 : place + 3]
        assert told[feature].endswith(f'(in: "{" ".join(shown)}")')


def test_batches_change_nothing():
    model = tiny_model()
    texts = ["a large red circle on grass .", "red", "", "a small bar ."]
    one, all_ = (label_from_texts(model, texts, batch_size=n) for n in (1, 16))
    for layer in one.layers():
        assert one.of(layer, range(FEATURES)) == all_.of(layer, range(FEATURES))


def test_long_texts_are_read_in_pieces():
    model = tiny_model()
    words = ["red", "circle", "on", "grass", "a", "small", "bar"]
    text = " ".join(words * 30)  # 210 tokens, of 95 at a time behind BOS
    kept = strongest_on(model, [text], [0], keep=10**6, batch_size=2)[0]
    assert set(kept["position"]) == set(range(210))
    ids = model.language.tokenizer(text, add_special_tokens=False).input_ids
    assert all(ids[row["position"]] == row["word"] for row in kept)


def test_special_tokens_do_not_count():
    model = tiny_model()
    kept = strongest_on(model, ["red <end> circle"], [0, 1], keep=100, batch_size=1)
    for rows in kept.values():
        assert set(rows["position"]) == {0, 2}


def test_without_beginning_of_text_the_first_position_does_not_count():
    model = tiny_model()
    model.language.tokenizer.bos_token = None
    kept = strongest_on(model, ["red circle on grass"], [0], keep=100, batch_size=1)
    assert set(kept[0]["position"]) == {1, 2, 3}


def test_bounded_memory():
    model = tiny_model()
    kept = strongest_on(model, ["a red circle ."] * 9, [0], keep=3, batch_size=4)[0]
    assert np.bincount(kept["feature"]).max() == 3


def test_the_toy_s_words_are_found(toy):
    labels = label_from_texts(toy, toy.reference_texts[:32], layers=[0])
    colors = {"red", "green", "blue", "yellow", "purple", "orange", "white", "cyan"}
    told = labels.of(0, labels.described(0)).values()
    words = [set(str(label).split(" (in")[0].split(" · ")) for label in told]
    # A fifth of the words are colors; three of a label at once would be so by chance
    # in one feature of a hundred.
    assert sum(len(each) == 3 and each <= colors for each in words) >= 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [0, 9]}, "no SAE for layers 9; the model has SAEs for 0-2"),
        ({"layers": []}, r"no SAE for layers \(none given\)"),
        ({"texts": ["", " "]}, "no text to read"),
        ({"top_tokens": 0}, "top_tokens is 0, expected 1 or more"),
        ({"keep": 0}, "keep is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"context": -1}, "context is -1, expected 0 or more"),
    ],
)
def test_wrong_questions(options, words):
    with pytest.raises(ValueError, match=words):
        label_from_texts(tiny_model(), **options)


def test_labels_can_be_kept(tmp_path):
    labels = label_from_texts(tiny_model())
    file = write_descriptions(labels, tmp_path / "labels.csv")
    again = read_descriptions(file)
    for layer in labels.layers():
        every = list(range(FEATURES))
        assert again.of(layer, every) == labels.of(layer, every)


# Opening


def test_the_right_source_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saes = {20: np_.identity(id=np_.ID)}
    np_.write_batch(tmp_path / "neuronpedia", 0, [np_.line(0, "zero")])
    file = write(tmp_path / "a.csv", "layer,feature,description\n20,2,red\n")
    assert isinstance(open_descriptions("neuronpedia", saes), NeuronpediaApi)
    found = open_descriptions(tmp_path / "neuronpedia", saes)
    assert isinstance(found, NeuronpediaExport)
    assert open_descriptions("./neuronpedia", saes).of(20, [0]) == {0: "zero"}
    (batch,) = tmp_path.rglob("batch-0.jsonl.gz")
    assert open_descriptions(batch, saes).of(20, [0]) == {0: "zero"}
    assert open_descriptions(str(file), saes).of(20, [2]) == {2: "red"}
    with pytest.raises(FileNotFoundError, match="no descriptions at 'nowhere': exp"):
        open_descriptions("nowhere", saes)
    with pytest.raises(ValueError, match="expected 'neuronpedia', a folder of its"):
        open_descriptions(write(tmp_path / "a.txt", "x"), saes)
