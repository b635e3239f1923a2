"""Whether the parts of a model belong together, and what to do if not."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from vlm_probe.codes import TILE
from vlm_probe.model import Finding, VisionLanguageModel, cheap_findings
from vlm_probe.saes import (
    SCREEN_SHARE,
    LayerSae,
    StreamedSaes,
    encoding_of,
    outlines,
)
from vlm_probe.settings import ProbeSettings
from vlm_probe.sums import LayerSums, bootstrap_weights
from vlm_probe.tokens import Prompt, ranges


def doctor(
    model: VisionLanguageModel,
    settings: ProbeSettings | None = None,
    *,
    texts: Sequence[str] | None = None,
    quiet: bool = False,
) -> list[Finding]:
    """Examines a model with one small pass, and prints a table of what it finds.

    Args:
        model: Of `vlm_probe.load`.
        settings: Of the probe that is planned, for the estimate of its memory.
        texts: Plain sentences that the SAEs are tried on; the first eight reference
            texts of the model if None.
        quiet: Whether to print nothing.

    Returns:
        All findings, those without fault included.
    """
    texts = list(texts or model.reference_texts[:8])
    found = [
        *cheap_findings(model),
        *_embedding_scale(model),
        *_image_vectors(model),
        *_padding(model, texts),
        *_explained(model, texts),
        *_memory(model, settings or ProbeSettings()),
    ]
    if not quiet:
        print(as_table(found))  # noqa: T201 -- asked for, and can be turned off
    return found


def as_table(findings: Sequence[Finding]) -> str:
    """Findings as text, one below the other."""
    wide = max(len(f.check) for f in findings)
    begun = [f"{f.verdict:<8} {f.check:<{wide}}  " for f in findings]
    return "\n".join(
        textwrap.fill(
            f.said, 100, initial_indent=begin, subsequent_indent=" " * len(begin)
        )
        for begin, f in zip(begun, findings, strict=True)
    )


def _embedding_scale(model: VisionLanguageModel) -> Iterator[Finding]:
    """Words that enter the stream, against the same words at the unembedding.

    Where the two are one matrix, as in Gemma and GPT-2, their ratio is the scale that
    the architecture sets: sqrt(d_model) for Gemma, else 1.
    """
    language = model.language
    ids = list(range(0, language.n_words, max(1, language.n_words // 64)))
    with torch.no_grad():
        words = language.embed(ids).float()
        read = language.hooked.W_U[:, ids].T.float()
    said = read.norm(dim=1) > 0  # the padding's row is zero in some models
    words, read = words[said], read[said]
    alike = torch.cosine_similarity(words, read).median()
    if alike < 0.99:
        said = "cannot be told: embedding and unembedding are two matrices"
        yield Finding("embedding scale", "note", said)
        return
    ratio = float((words.norm(dim=1) / read.norm(dim=1)).median())
    gemma = language.architecture.startswith("Gemma")
    scale = language.d_model**0.5 if gemma else 1.0
    if abs(ratio / scale - 1) < 0.05:
        yield Finding("embedding scale", "ok", f"{ratio:.4g}, as the architecture's")
        return
    twice = abs(ratio / scale**2 - 1) < 0.05 and scale > 1
    yield Finding(
        "embedding scale",
        "wrong",
        f"words enter the stream {ratio:.4g} times as long as at the unembedding, "
        f"expected {scale:.4g}"
        + (": the scale is applied twice" if twice else "")
        + "; load the language model from its own checkpoint",
    )


def _image_vectors(model: VisionLanguageModel) -> Iterator[Finding]:
    """The adapter's vectors for a picture of noise, beside the words' length."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (256, 256, 3), generator=generator)
    picture = Image.fromarray(pixels.to(torch.uint8).numpy())
    with torch.no_grad():
        vectors = model.adapter(model.vision.encode([picture]))[0].float()
    if not vectors.isfinite().all():
        yield Finding(
            "image vectors",
            "wrong",
            "the adapter gives vectors that are not numbers; look at its weights and "
            "the vision model's dtype",
        )
        return
    words = model.language.embed(range(min(512, model.language.n_words)))
    length = float(words.float().norm(dim=1).median())
    ratio = float(vectors.norm(dim=1).median()) / length
    yield Finding(
        "image vectors",
        "ok" if 0.1 <= ratio <= 10 else "warning",
        f"{ratio:.3g} times as long as words (median {length:.3g})"
        + ("" if 0.1 <= ratio <= 10 else "; was the adapter trained for this model?"),
    )


def _padding(model: VisionLanguageModel, texts: Sequence[str]) -> Iterator[Finding]:
    """A short prompt alone and beside a longer one."""
    language = model.language
    short, long = language.chat.text_prompt("a", ""), _longest(model, texts)
    layer = max(model.saes)
    seen: list[torch.Tensor] = []
    for batch in ([short], [short, long]):
        language.read(
            batch,
            None,
            [layer],
            lambda _, x: seen.append(x[0, : len(short.ids)].float().clone()),
            hook_point=model.hook_point,
        )
    off = float((seen[1] - seen[0]).norm() / seen[0].norm())
    # bfloat16 has 8 bits: other shapes of a product round in another order.
    allowed = 1e-4 if language.dtype in (torch.float32, torch.float64) else 3e-2
    if off <= allowed:
        said = f"a prompt is the same alone and in a batch (off by {off:.1g})"
        yield Finding("padding", "ok", said)
        return
    yield Finding(
        "padding",
        "wrong",
        f"the same prompt differs by {off:.2g} of its norm alone and beside a longer "
        f"one (padded on the {language.padding_side}): the model reads the padding; "
        'use batch_size=1, or backend="hooked"',
    )


def _explained(model: VisionLanguageModel, texts: Sequence[str]) -> Iterator[Finding]:
    """How much of plain sentences the SAEs explain, by 1 - FVU over their tokens."""
    language, special = model.language, model.language.chat.special
    begins = language.chat.text_prompt("a", "").ids[:1]
    begins = begins if begins[0] in special else ()
    prompts = [
        Prompt((*begins, *ids), range(0), special)
        for text in texts
        if (ids := language.tokenizer(text, add_special_tokens=False).input_ids)
    ]
    if not prompts:
        raise ValueError("no texts to try the SAEs on; give some sentences as texts=")
    explained: dict[int, float] = {}
    broken: list[int] = []

    def visit(layer: int, residual: torch.Tensor) -> None:
        x = torch.cat(
            [
                r[p.positions("text_only")]
                for r, p in zip(residual, prompts, strict=True)
            ]
        )
        if not x.isfinite().all():
            broken.append(layer)
            return
        sae = model.saes[layer]
        codes, x_hat = sae.code(x)
        sums = LayerSums(sae.d_model, sae.n_features, 0)
        weights = bootstrap_weights([0], 0, 0)
        unit = np.zeros(len(x), np.int64)
        sums.add(x, x_hat, codes.l0(), unit, weights)
        explained[layer] = 1 - sums.row()["fvu"]

    language.read(prompts, None, sorted(model.saes), visit, hook_point=model.hook_point)
    yield Finding(
        "numbers",
        "wrong" if broken else "ok",
        f"activations of layers {ranges(broken)} are not numbers; try dtype float32"
        if broken
        else "all activations are finite",
    )
    for verdict, layers in _judged(explained).items():
        if layers:
            yield _said_of(verdict, {n: explained[n] for n in layers}, model)


def _judged(explained: dict[int, float]) -> dict[str, list[int]]:
    """Layers by how their SAE does; the mean alone explains 0, published SAEs > 0.6."""
    bounds = {"wrong": (-math.inf, 0.2), "warning": (0.2, 0.5), "ok": (0.5, 2.0)}
    return {
        # What is not a number is as wrong as can be.
        verdict: [
            layer
            for layer, share in explained.items()
            if low <= (share if math.isfinite(share) else -math.inf) < high
        ]
        for verdict, (low, high) in bounds.items()
    }


def _said_of(
    verdict: str, explained: dict[int, float], model: VisionLanguageModel
) -> Finding:
    low, high = min(explained.values()), max(explained.values())
    which = ranges(explained)
    said = f"layers {which}: {low:.2f} to {high:.2f} of plain sentences' variance"
    if verdict != "ok":
        said += (
            f"; SAEs of this model would explain more. Are they trained on "
            f"{model.language.name!r}, at {model.hook_point} of these layers, on "
            "weights processed alike?"
        )
    return Finding("explained by the SAEs", verdict, said)


def _memory(model: VisionLanguageModel, settings: ProbeSettings) -> Iterator[Finding]:
    """What the weights take, and what a probe with these settings adds."""
    language = model.language
    saes, sizes = _resident(model.saes)
    weights = {
        "vision": _bytes(model.vision.visual),
        "adapter": _bytes(model.adapter),
        "language": _bytes(language.hooked),
        saes: sum(sizes),
    }
    layers = len(model.saes if settings.layers is None else settings.layers)
    pictured = {"image", "text_after_image"} & {*settings.groups}
    cases = len(pictured) * (1 + len(settings.controls))
    cases += "text_only" in settings.groups
    rows, columns = model.vision.grid
    tokens = settings.batch_size * (rows * columns + 64)
    width = max(sae.n_features for sae in outlines(model.saes).values())
    kept = (settings.replicates + 1) * language.d_model + 4 * width
    sums = 8 * layers * cases * kept
    # A chunk of pre-activations, each image's peaks, the stream in a few copies.
    chunk = TILE.get(language.device.type, TILE["cpu"])
    batch = chunk + 4 * (settings.batch_size * width + 12 * tokens * language.d_model)
    if encoding_of(model.saes, settings.encoding) == "screened":
        weights["screens"] = int(SCREEN_SHARE * sum(sizes))
    weights |= {"sums": sums, "a batch": batch}
    said = ", ".join(f"{name} {_size(n)}" for name, n in weights.items())
    yield Finding("memory", "note", f"about {_size(sum(weights.values()))}: {said}")


def _resident(saes: Mapping[int, LayerSae]) -> tuple[str, list[int]]:
    """Which SAEs are in memory at once, and the bytes of each; the largest, if some."""
    sizes = sorted(sae.n_bytes for sae in outlines(saes).values())
    if isinstance(saes, StreamedSaes):
        return f"two SAEs of {len(sizes)}", sizes[-2:]
    return "SAEs", sizes


def _longest(model: VisionLanguageModel, texts: Sequence[str]) -> Prompt:
    prompts = [model.language.chat.text_prompt("a", text) for text in texts]
    return max(prompts, key=lambda prompt: len(prompt.ids))


def _bytes(module: nn.Module) -> int:
    held = itertools.chain(module.parameters(), module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**27 else f"{n / 2**20:.1f} MiB"
