"""What each feature of the toy's SAEs means, measured on texts where all is known.

A label is a concept of the world and how it is read (`vlm_probe.toy.truth`): as a word,
or as what the text is about. Late layers say more of what comes than of the word that
stands there, and the second reading finds them. How well a concept fits a feature is
the share of its activation, summed over tokens, at tokens where the concept is there,
beyond what chance would give:

    score = (share - p) / (1 - p)
        p = share of tokens where the concept is there

It is 0 where feature and concept have nothing to do with each other, however frequent
the concept is, and 1 where the feature fires nowhere else. F1 would not do: a feature
that always fires has 2p / (1 + p), 0.6 for what is true of every other token, such as
"small"; and where several features share a word between them, as those of an SAE do,
each has a small one. Concepts are chosen on one half of the texts and measured on the
other, so that the best of many is not taken for better than it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy.sparse import csc_array
from torch import Tensor

from vlm_probe.codes import SparseCodes
from vlm_probe.examples import data_folder
from vlm_probe.language import LanguageModel
from vlm_probe.model.identity import digest
from vlm_probe.saes import LayerSae
from vlm_probe.tokens import Prompt
from vlm_probe.toy.examples import HELD_OUT
from vlm_probe.toy.texts import document
from vlm_probe.toy.truth import CONCEPTS, READINGS, at_tokens
from vlm_probe.toy.world import draw_scene

DOCUMENTS = 500
BATCH = 16
BOUND = 0.5
"""The least score, on the texts that it is chosen on, that makes a label."""
LEAST = 50
"""Tokens there that a feature must fire at to be labeled: with fewer, chance alone has
one of the many concepts score that much."""


@dataclass(frozen=True)
class Label:
    """What a feature means."""

    concept: str
    """One of `CONCEPTS`."""
    reading: str
    """One of `READINGS`."""
    chosen: float
    """Score on the texts that the concept was chosen on."""
    score: float
    """Score on the other texts: what the label is worth."""


@dataclass(frozen=True)
class LayerLabels:
    """Labels of one SAE."""

    sae: str
    """SHA-256 of the SAE's weights."""
    width: int
    """Number of features."""
    n_fired: int
    """How many features fire often enough to be labeled."""
    labels: Mapping[int, Label]
    """By feature; one that fits no concept has none."""

    def concepts(self) -> dict[int, str]:
        """The concept of each feature that has one."""
        return {feature: label.concept for feature, label in self.labels.items()}


def measure_labels(
    language: LanguageModel,
    saes: Mapping[int, LayerSae],
    *,
    documents: int = DOCUMENTS,
    bound: float = BOUND,
    seed: int = 0,
) -> dict[int, LayerLabels]:
    """Labels the features of SAEs of the toy's language model.

    Args:
        language: The toy's.
        saes: By layer.
        documents: How many texts are read; of none was ever learned.
        bound: The least score that makes a label.
        seed: Of the texts.

    Returns:
        Labels by layer.
    """
    sums = add_up(language, saes, documents, seed)
    return {
        layer: LayerLabels(
            sae=digest(sae.sae),
            width=sae.n_features,
            n_fired=int((sums[layer].fired[0] >= LEAST).sum()),
            labels=choose(sums[layer], bound),
        )
        for layer, sae in saes.items()
    }


@dataclass
class Sums:
    """What is added up of a layer, for each half of the texts."""

    value: Float64[np.ndarray, "half feature case"]
    """Activation at the tokens where a case is there: a reading and a concept."""
    total: Float64[np.ndarray, "half feature"]
    """Activation at all tokens."""
    fired: Int[np.ndarray, "half feature"]
    """Tokens at which a feature fires."""
    there: Int[np.ndarray, "half case"]
    """Tokens where a case is there."""
    seen: Int[np.ndarray, " half"]
    """Tokens."""

    @classmethod
    def none(cls, n_features: int) -> Sums:
        """Nothing seen yet."""
        n_cases = len(READINGS) * len(CONCEPTS)
        return cls(
            np.zeros((2, n_features, n_cases)),
            np.zeros((2, n_features)),
            np.zeros((2, n_features), np.int64),
            np.zeros((2, n_cases), np.int64),
            np.zeros(2, np.int64),
        )

    def add(
        self,
        codes: SparseCodes,
        truth: Bool[np.ndarray, "token case"],
        half: Int[np.ndarray, " token"],
    ) -> None:
        """Adds some tokens, of either half."""
        shape = codes.n_features, codes.n_tokens
        value, feature, token = (
            part.cpu().numpy() for part in (codes.value, codes.feature, codes.token)
        )
        found = csc_array((value.astype(float), (feature, token)), shape)
        for one in (0, 1):
            (mine,) = np.nonzero(half == one)
            here = found[:, mine]
            self.value[one] += here @ truth[mine].astype(float)
            self.total[one] += here.sum(1)
            self.fired[one] += (here != 0).sum(1)
            self.there[one] += truth[mine].sum(0)
            self.seen[one] += len(mine)

    def scores(self, half: int) -> Float64[np.ndarray, "feature case"]:
        """The score of each case; -1 for what is never or always there, or silent."""
        p = self.there[half] / max(1, self.seen[half])
        told = (self.total[half] > 0)[:, None] & (p > 0) & (p < 1)
        total = np.where(self.total[half] > 0, self.total[half], 1.0)[:, None]
        above = self.value[half] / total - p
        return np.divide(above, 1 - p, np.full_like(above, -1.0), where=told)


def add_up(
    language: LanguageModel, saes: Mapping[int, LayerSae], documents: int, seed: int
) -> dict[int, Sums]:
    """Reads the texts; every other one is of the half to choose on.

    Special tokens are left out, as they are in a probe.
    """
    sums = {layer: Sums.none(sae.n_features) for layer, sae in saes.items()}
    for start in range(0, documents, BATCH):
        numbers = range(start, min(start + BATCH, documents))
        texts = [
            _read(language, np.random.default_rng([HELD_OUT, seed, number, 7]))
            for number in numbers
        ]
        prompts = [prompt for prompt, _ in texts]
        places = [
            (row, position)
            for row, prompt in enumerate(prompts)
            for position in prompt.positions("text_only")
        ]
        truth = np.stack([texts[row][1][position] for row, position in places])
        half = np.array([numbers[row] % 2 for row, _ in places])
        row, position = torch.tensor(places).T

        def visit(
            layer: int,
            residual: Float[Tensor, "row pos d_model"],
            row: Int[Tensor, " token"] = row,
            position: Int[Tensor, " token"] = position,
            truth: Bool[np.ndarray, "token case"] = truth,
            half: Int[np.ndarray, " token"] = half,
        ) -> None:
            codes, _ = saes[layer].code(residual[row, position])
            sums[layer].add(codes, truth, half)

        language.read(prompts, None, sorted(saes), visit)
    return sums


def _read(
    language: LanguageModel, rng: np.random.Generator
) -> tuple[Prompt, Bool[np.ndarray, "token case"]]:
    """A text as a prompt, and what is there at each of its tokens."""
    scene = draw_scene(rng)
    words = " ".join(piece for piece, _ in document(rng, scene)).split()
    words = words[: language.hooked.cfg.n_ctx - 1]
    truth = np.concatenate(at_tokens(words, scene), axis=1)
    ids = language.tokenizer.convert_tokens_to_ids(words)
    bos = language.tokenizer.bos_token_id
    # Nothing is there at the beginning-of-text token.
    truth = np.concatenate([np.zeros_like(truth[:1]), truth])
    return Prompt((bos, *ids), range(0), language.chat.special), truth


def choose(sums: Sums, bound: float) -> dict[int, Label]:
    """The best concept of each feature, by the half to choose on."""
    choosing, measuring = sums.scores(0), sums.scores(1)
    labels = {}
    for feature, case in enumerate(choosing.argmax(1)):
        chosen = float(choosing[feature, case])
        often = sums.fired[0, feature] >= LEAST and sums.fired[1, feature] > 0
        if often and chosen >= bound:
            reading, concept = divmod(int(case), len(CONCEPTS))
            labels[feature] = Label(
                CONCEPTS[concept],
                READINGS[reading],
                round(chosen, 3),
                round(float(measuring[feature, case]), 3),
            )
    return labels


def write_labels(labels: Mapping[int, LayerLabels], file: Path) -> None:
    """Writes labels as JSON, a line a feature."""
    lines = []
    for layer, of in labels.items():
        rows = [json.dumps([f, *astuple(label)]) for f, label in of.labels.items()]
        about = {name: v for name, v in asdict(of).items() if name != "labels"}
        head = json.dumps({"layer": layer, **about})[:-1]
        lines.append(head + ', "labels": [\n' + ",\n".join(rows) + "\n]}")
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def read_labels(file: Path) -> dict[int, LayerLabels]:
    """Reads what `write_labels` wrote."""
    found = {}
    for told in json.loads(file.read_text()):
        rows: Sequence = told.pop("labels")
        labels = {feature: Label(*rest) for feature, *rest in rows}
        layer = told.pop("layer")
        found[layer] = LayerLabels(**told, labels=labels)
    return found


LABELS = "labels.json"
"""What the features mean, beside the toy's parts."""


def toy_labels() -> dict[int, LayerLabels]:
    """The labels that ship with the toy."""
    return read_labels(data_folder() / "toy" / LABELS)
