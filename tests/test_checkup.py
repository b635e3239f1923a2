"""The doctor: every trap that is known to spoil the numbers, and what is said of it."""

import json
from dataclasses import replace

import hub
import pytest
import torch
from PIL import Image
from sae_lens import SAE
from tiny import D_VISION, tiny_vision

from vlm_probe.adapter import LinearAdapter
from vlm_probe.checkup import _judged, as_table, doctor
from vlm_probe.language import LanguageModel
from vlm_probe.model import VisionLanguageModel
from vlm_probe.model.findings import Finding, cheap_findings
from vlm_probe.probe import probe_layers
from vlm_probe.saes import LayerSae
from vlm_probe.settings import ProbeSettings
from vlm_probe.vision import VisionModel

WIDTH = 32
TEXTS = ("the quick brown fox jumps", "a large red circle on grass", "describe it")


def exact_sae(layer, turn=None, **metadata):
    """x = relu(x) - relu(-x): explains everything; less so if its space is turned."""
    sae = SAE.from_dict(
        {
            "architecture": "standard",
            "d_in": WIDTH,
            "d_sae": 2 * WIDTH,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"} | metadata,
        }
    )
    eye = torch.eye(WIDTH)
    out = eye if turn is None else eye @ turn
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([out, -out]))
    return LayerSae(layer, sae, f"exact/{layer}")


def stack(language, *, saes=None):
    return VisionLanguageModel(
        vision=tiny_vision(),
        adapter=LinearAdapter(D_VISION, WIDTH).requires_grad_(False),
        language=language,
        saes=saes or {layer: exact_sae(layer) for layer in range(3)},
        reference_texts=TEXTS,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for family in hub.FAMILIES:
        hub.write_language(root / family, family)
    return root


def examined(model, **options):
    """Findings by check; the last of several."""
    return {f.check: f for f in doctor(model, quiet=True, **options)}


@pytest.mark.parametrize("family", hub.FAMILIES)
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_sound_model_has_nothing_wrong(folders, family, backend):
    model = stack(LanguageModel.load(folders / family, backend=backend))
    found = examined(model)
    bad = [f for f in found.values() if f.verdict in ("warning", "wrong")]
    # The tiny adapter is untrained, and GPT-2's tiny words are short.
    assert {f.check for f in bad} <= {"image vectors"}
    assert found["explained by the SAEs"].said == (
        "layers 0-2: 1.00 to 1.00 of plain sentences' variance"
    )
    assert found["hook points"].said == "resid_post of 3 of 3 layers"


def test_the_toy_is_sound(toy):
    bad = [f for f in doctor(toy, quiet=True) if f.verdict in ("warning", "wrong")]
    assert bad == []


def test_processed_weights_under_raw_saes(folders):
    processed = LanguageModel.load(
        folders / "gpt2", processing={"center_writing_weights": True}
    )
    found = examined(stack(processed))["weight processing"]
    assert found.verdict == "wrong"
    assert "the language model's: center_writing_weights; the SAEs were" in found.said
    assert "of weights with: none. Load the language model from its own" in found.said


@pytest.mark.filterwarnings("ignore:(?s).*non-empty model_from_pretrained:UserWarning")
def test_raw_weights_under_processed_saes(folders):
    kwargs = {"center_writing_weights": True}
    saes = {0: exact_sae(0, model_from_pretrained_kwargs=kwargs)}
    raw = LanguageModel.load(folders / "gpt2")
    found = examined(stack(raw, saes=saes))["weight processing"]
    assert found.verdict == "wrong"
    assert "the language model's: none; the SAEs were trained on" in found.said
    right = LanguageModel.load(folders / "gpt2", processing=saes[0].processing)
    found = examined(stack(right, saes=saes))["weight processing"]
    assert (found.verdict, found.said) == ("ok", "center_writing_weights, as the SAEs'")


def test_an_sae_of_another_model_shows_in_what_it_explains(folders):
    language = LanguageModel.load(folders / "llama")
    turn, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH))
    saes = {0: exact_sae(0), 1: exact_sae(1, turn), 2: exact_sae(2, turn)}
    told = [
        f for f in doctor(stack(language, saes=saes), quiet=True) if "SAEs" in f.check
    ]
    assert [f.verdict for f in told] == ["wrong", "ok"]
    assert told[0].said.startswith("layers 1-2: -")
    assert "SAEs of this model would explain more. Are they trained on" in told[0].said


@pytest.mark.parametrize(
    ("trained", "verdict", "words"),
    [
        ("llama", "ok", "llama"),
        ("meta/llama", "ok", "llama"),
        ("llama-it", "note", "the same weights but for tuning; see how much"),
        (
            "mistral-7b",
            "warning",
            "trained on mistral-7b, used on llama; take that one",
        ),
    ],
)
def test_an_sae_of_another_model_by_name(folders, trained, verdict, words):
    language = LanguageModel.load(folders / "llama")
    saes = {0: exact_sae(0, model_name=trained)}
    found = {f.check: f for f in cheap_findings(stack(language, saes=saes))}
    assert found["SAEs' model"].verdict == verdict
    assert words in found["SAEs' model"].said


def test_weights_of_another_activation(folders, tmp_path):
    """A tower of GELU filled with what was trained with QuickGELU."""
    hub.write_vision(tmp_path / "ViT")
    about = {"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu"}}
    (tmp_path / "ViT" / "config.json").write_text(json.dumps(about))
    with pytest.warns(UserWarning, match="computes GELU"):
        vision = VisionModel.load(tmp_path / "ViT")
    model = replace(stack(LanguageModel.load(folders / "llama")), vision=vision)
    found = examined(model)["vision activation"]
    assert found.verdict == "wrong"
    assert "computes GELU, but its weights were trained with QuickGELU" in found.said
    assert 'set "quick_gelu": true in its model_cfg' in found.said


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_padding_that_is_read(folders, family, monkeypatch):
    language = LanguageModel.load(folders / family, backend="bridge")
    language.padding_side = "left"
    assert examined(stack(language))["padding"].verdict == "ok"
    batch = language._batch

    def unmasked(*given):
        made = batch(*given)
        return replace(made, mask=torch.ones_like(made.mask))

    monkeypatch.setattr(language, "_batch", unmasked)
    found = examined(stack(language))["padding"]
    assert found.verdict == "wrong"
    assert (
        "of its norm alone and beside a longer one (padded on the left)" in found.said
    )
    assert "the model reads the padding; use batch_size=1" in found.said


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_an_embedding_scale_applied_twice(folders, backend):
    language = LanguageModel.load(folders / "gemma2", backend=backend)
    assert examined(stack(language))["embedding scale"].verdict == "ok"
    scale = WIDTH**0.5
    if backend == "hooked":
        language.hooked.W_E.data *= scale
    else:  # as if the words were scaled again after Gemma's own scale
        embedding = language.hooked.original_model.get_input_embeddings()
        kept = getattr(embedding, "_original_component", embedding)
        kept.embed_scale = kept.embed_scale * scale
    found = examined(stack(language))["embedding scale"]
    assert found.verdict == "wrong"
    assert "words enter the stream 32 times as long as at the unembed" in found.said
    assert "expected 5.657: the scale is applied twice; load" in found.said


def test_a_missing_and_a_doubled_beginning(folders):
    for begin, words in (
        ("", "do not begin with"),
        ("{{ bos_token }}" * 2, "hold 2 times"),
    ):
        language = LanguageModel.load(folders / "gemma2")
        template = language.tokenizer.chat_template
        language.tokenizer.chat_template = template.replace("{{ bos_token }}", begin)
        model = stack(language, saes={0: exact_sae(0, prepend_bos=True)})
        (found,) = [f for f in cheap_findings(model) if f.check == "beginning of text"]
        assert found.verdict == "wrong"
        assert f"prompts {words}" in found.said
        assert "'<bos>', which the language model and its SAEs read once" in found.said


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_gemma_without_its_soft_cap(folders, backend):
    language = LanguageModel.load(folders / "gemma2", backend=backend)
    said = {f.check: f for f in cheap_findings(stack(language))}["soft-cap"]
    assert (said.verdict, said.said) == ("ok", "attention scores 5, logits 3")
    if backend == "hooked":
        language.hooked.cfg.output_logits_soft_cap = -1.0
    else:
        language.hooked.original_model.config.final_logit_softcapping = None
    found = {f.check: f for f in cheap_findings(stack(language))}["soft-cap"]
    assert found.verdict == "wrong"
    assert "a Gemma-2 without soft-caps (attention scores 5, logits -1)" in found.said


def test_activations_that_are_not_numbers(folders):
    language = LanguageModel.load(folders / "llama")
    language.hooked.blocks[1].mlp.W_out.data[0, 0] = float("nan")
    found = examined(stack(language))
    assert found["numbers"].verdict == "wrong"
    assert "activations of layers 1-2 are not numbers" in found["numbers"].said
    model = stack(LanguageModel.load(folders / "llama"))
    model.adapter.linear.bias.data[0] = float("inf")
    assert examined(model)["image vectors"].verdict == "wrong"


def test_an_sae_that_is_not_a_number(folders):
    saes = {0: exact_sae(0), 1: exact_sae(1)}
    saes[1].sae.b_dec.data[0] = float("nan")
    model = stack(LanguageModel.load(folders / "llama"), saes=saes)
    told = [f for f in doctor(model, quiet=True) if f.check == "explained by the SAEs"]
    assert [f.verdict for f in told] == ["wrong", "ok"]
    assert told[0].said.startswith("layers 1: nan to nan")


def test_what_the_saes_explain_is_judged():
    shares = {0: 0.9, 1: 0.51, 2: 0.49, 3: 0.21, 4: 0.19, 5: -3.0, 6: float("nan")}
    assert _judged(shares) == {"wrong": [4, 5, 6], "warning": [2, 3], "ok": [0, 1]}


def test_the_length_of_image_vectors_is_judged(folders):
    model = stack(LanguageModel.load(folders / "llama"))

    def scaled(factor):
        model.adapter.linear.weight.data *= factor
        model.adapter.linear.bias.data *= factor
        return examined(model)["image vectors"]

    ratio = float(scaled(1.0).said.split()[0])
    assert scaled(1 / ratio).verdict == "ok"
    assert scaled(9).verdict == "ok"
    assert scaled(2).verdict == "warning"
    assert scaled(1 / 18 / 9).verdict == "ok"
    assert scaled(1 / 2).verdict == "warning"


def test_a_tokenizer_with_more_words_than_the_embedding(folders):
    language = LanguageModel.load(folders / "llama")
    language.tokenizer.add_tokens([f"<more{n}>" for n in range(40)])
    assert examined(stack(language))["numbers"].verdict == "ok"


def test_an_adapter_of_another_stack(folders):
    model = stack(LanguageModel.load(folders / "llama"))
    model.adapter.manifest |= {"language": "gpt2", "vision": "tiny", "vision_block": -2}
    found = {f.check: f for f in cheap_findings(model)}
    assert "trained on gpt2, used on llama" in found["adapter's model"].said
    seen = found["adapter's vision"]
    assert seen.verdict == "warning"
    assert "trained on block -2 of 'tiny', used on block -1 of 'tiny'; g" in seen.said
    model.adapter.manifest |= {"vision": "openai/clip", "vision_block": 1}  # of two
    (seen,) = [f for f in cheap_findings(model) if f.check == "adapter's vision"]
    assert seen.verdict == "note"


def test_some_layers_only_is_told(folders):
    language = LanguageModel.load(folders / "llama")
    found = examined(stack(language, saes={0: exact_sae(0), 2: exact_sae(2)}))
    assert found["hook points"].verdict == "note"
    assert found["hook points"].said == "resid_post of 2 of 3 layers: 0, 2"


def test_the_estimate_of_memory(folders):
    """The weights by hand: three SAEs of 32 x 64 twice and their biases."""
    model = stack(LanguageModel.load(folders / "llama"))
    said = examined(model)["memory"].said
    floats = 3 * (2 * 32 * 64 + 32 + 64)
    assert f"SAEs {floats * 4 / 2**20:.1f} MiB" in said
    more = examined(model, settings=ProbeSettings(replicates=40_000))["memory"].said
    sums = 8 * 3 * 3 * (40_001 * 32 + 4 * 64)
    assert f"sums {sums / 2**20:.1f} MiB" in more


def test_the_table(folders, capsys):
    model = stack(LanguageModel.load(folders / "llama"))
    found = doctor(model)
    assert capsys.readouterr().out == as_table(found) + "\n"
    assert as_table(
        [Finding("a", "ok", "fine"), Finding("long", "wrong", "x " * 99)]
    ) == (
        "ok       a     fine\n"
        + "wrong    long  "
        + ("x " * 43).strip()
        + "\n"
        + ("               " + ("x " * 43).strip() + "\n")
        + "               "
        + ("x " * 13).strip()
    )


def test_a_probe_warns_of_what_is_wrong_and_keeps_it(folders):
    language = LanguageModel.load(folders / "llama")
    template = language.tokenizer.chat_template
    language.tokenizer.chat_template = template.replace("{{ bos_token }}", "")
    model = stack(language)
    blank = Image.new("RGB", (40, 30))
    with pytest.warns(
        UserWarning, match="beginning of text: prompts do not begin with"
    ):
        result = probe_layers(model, [blank], progress=False, replicates=2)
    kept = {f["check"]: f["verdict"] for f in result.meta["findings"]}
    assert kept == {"beginning of text": "wrong"}
