"""What can be told of a model's parts without running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlm_probe.model.joined import VisionLanguageModel
from vlm_probe.saes import outlines
from vlm_probe.tokens import ranges

VERDICTS = ("ok", "note", "warning", "wrong")


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    """What was looked at."""
    verdict: str
    """One of `VERDICTS`: "note" is good to know, "warning" may spoil the numbers,
    "wrong" does."""
    said: str
    """What was found, what was expected, and what to do now."""


def cheap_findings(model: VisionLanguageModel) -> list[Finding]:
    """What can be told without a pass; every probe begins with this."""
    return [
        *_fit(model),
        *_processing(model),
        *_soft_cap(model),
        *_activation(model),
        *_beginning(model),
        *_origin(model),
    ]


def _fit(model: VisionLanguageModel) -> Iterator[Finding]:
    """Widths and hook points; what does not fit is refused when parts are joined."""
    layers = sorted(model.saes)
    features = ranges(sae.n_features for sae in outlines(model.saes).values())
    yield Finding(
        "widths",
        "ok",
        f"patch tokens {model.vision.d_vision}, residual stream "
        f"{model.language.d_model}, SAEs {features}",
    )
    yield Finding(
        "hook points",
        "ok" if len(layers) == model.language.n_layers else "note",
        f"{model.hook_point} of {len(layers)} of {model.language.n_layers} layers"
        + ("" if len(layers) == model.language.n_layers else f": {ranges(layers)}"),
    )


def _processing(model: VisionLanguageModel) -> Iterator[Finding]:
    """The model's weights against those that the SAEs were trained on."""
    has = set(model.language.processing)
    if model.language.hooked.cfg.normalization_type in ("RMS", "RMSPre", None):
        yield Finding(
            "weight processing",
            "ok",
            "changes nothing in the residual stream of an RMSNorm model",
        )
        return
    # Folded norms leave the stream as it is; the mean taken out does not.
    shown = has & {"center_writing_weights"}
    wanted = {
        n
        for n, on in next(iter(outlines(model.saes).values())).processing.items()
        if on
    }
    wanted &= {"center_writing_weights"}
    told = [", ".join(sorted(names)) or "none" for names in (shown, wanted)]
    if shown == wanted:
        yield Finding("weight processing", "ok", f"{told[0]}, as the SAEs'")
        return
    yield Finding(
        "weight processing",
        "wrong",
        f"the language model's: {told[0]}; the SAEs were trained on the residual "
        f"stream of weights with: {told[1]}. Load the language model from its own "
        "checkpoint with vlm_probe.load, which processes as the SAEs ask",
    )


def _soft_cap(model: VisionLanguageModel) -> Iterator[Finding]:
    if not model.language.architecture.startswith("Gemma2"):
        return
    caps = model.language.soft_caps
    if min(caps) > 0:
        said = "attention scores {:g}, logits {:g}".format(*caps)
        yield Finding("soft-cap", "ok", said)
    else:
        yield Finding(
            "soft-cap",
            "wrong",
            "a Gemma-2 without soft-caps (attention scores {:g}, logits {:g}); the "
            "released models have 50 and 30; load it from its own checkpoint".format(
                *caps
            ),
        )


def _activation(model: VisionLanguageModel) -> Iterator[Finding]:
    mismatch = model.vision.activation_mismatch()
    computed = {True: "QuickGELU", False: "GELU", None: "the tower's own"}
    yield Finding(
        "vision activation",
        "wrong" if mismatch else "ok",
        mismatch or computed[model.vision.quick_gelu],
    )


def _beginning(model: VisionLanguageModel) -> Iterator[Finding]:
    """Whether prompts begin as the language model was trained to read."""
    tokenizer = model.language.tokenizer
    begins = tokenizer.bos_token_id
    asked = any(sae.prepend_bos for sae in outlines(model.saes).values())
    if begins is None:
        yield Finding("beginning of text", "ok", "the tokenizer has no such token")
        return
    ids = model.language.chat.text_prompt("a", "b").ids
    count = ids.count(begins)
    if count == 1 and ids[0] == begins:
        yield Finding("beginning of text", "ok", f"one {tokenizer.bos_token!r}")
        return
    what = f"hold {count} times" if ids[0] == begins else "do not begin with"
    yield Finding(
        "beginning of text",
        "wrong",
        f"prompts {what} {tokenizer.bos_token!r}, which the language model "
        f"{'and its SAEs read' if asked else 'reads'} once before every text; norms "
        "and features of the first positions are else not those of its training. Set "
        "tokenizer.chat_template to one that writes {{ bos_token }} first, and once",
    )


def _origin(model: VisionLanguageModel) -> Iterator[Finding]:
    """The models that the SAEs and the adapter say they were trained with."""
    named = {sae.model_name for sae in outlines(model.saes).values()} - {None}
    # A saved model keeps its language model in a folder of another name.
    names = (model.language.name, model.name)
    for name in sorted(map(str, named)):
        yield _same_model("SAEs", name, names)
    if name := model.adapter.manifest.get("language"):
        yield _same_model("adapter", str(name), names)
    told, block = map(model.adapter.manifest.get, ("vision", "vision_block"))
    vision = model.vision
    # Every library has its own name for a tower, so another name is worth a note only.
    same = block is None or (block - vision.block) % vision.n_blocks == 0
    if told not in (None, vision.name) or not same:
        yield Finding(
            "adapter's vision",
            "note" if same else "warning",
            f"trained on block {block} of {told!r}, used on block {vision.block} of "
            f"{vision.name!r}" + ("" if same else "; give vision_block as trained"),
        )


def _same_model(part: str, trained: str, names: tuple[str, ...]) -> Finding:
    check = "SAEs' model" if part == "SAEs" else f"{part}'s model"
    given, wanted = [_plain(name) for name in names], _plain(trained)
    if wanted in given:
        return Finding(check, "ok", trained)
    said = f"trained on {trained}, used on {names[0]}"
    if _base(wanted) not in map(_base, given):
        return Finding(check, "warning", f"{said}; take that one")
    if part == "SAEs":
        said += ": the same weights but for tuning; see how much the SAEs explain"
    return Finding(check, "note" if part == "SAEs" else "warning", said)


def _plain(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()


def _base(name: str) -> str:
    """A model's name without what says how it was tuned."""
    for ending in ("-instruct", "-chat", "-it", "-pt", "-base"):
        name = name.removesuffix(ending)
    return name
