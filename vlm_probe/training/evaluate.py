"""Whether an adapter shows the language model anything of the picture."""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vlm_probe.adapter import Adapter
from vlm_probe.examples import UNREADABLE, Example, as_examples
from vlm_probe.language import LanguageModel
from vlm_probe.training.evaluation import ARMS, SURE, AdapterEvaluation
from vlm_probe.training.objective import lesson, surprise
from vlm_probe.vision import VisionModel


def evaluate_adapter(
    vision: VisionModel,
    adapter: Adapter,
    language: LanguageModel,
    examples: Iterable[Example],
    *,
    batch_size: int = 32,
) -> AdapterEvaluation:
    """Answers and captions with the true picture, with another one, and with none.

    An answer is right if the greedy answer equals it, spaces, case and a full stop at
    the end aside. Only the first question of an example is asked. Of a caption,
    cross-entropy is that of the model's answer to its default prompt.

    Args:
        vision: Gives patch tokens.
        adapter: What is evaluated; its vectors enter where it says.
        language: Answers.
        examples: At least two that can be read, with answer or caption; none of them
            trained on.
        batch_size: Pictures at a time.

    Raises:
        ValueError: Fewer than two examples can be used.

    Warns:
        UserWarning: The adapter does not beat the shuffled image.
    """
    given = examples if isinstance(examples, Sequence) else list(examples)
    rows_and_columns = vision.grid
    read = partial(_read, language, rows_and_columns[0] * rows_and_columns[1])
    failures: list[dict[str, str]] = []
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        encode = lambda pictures: adapter(vision.encode(pictures))  # noqa: E731
        donors = _Donors(encode, read(_numbered(given, backwards=True), []))
        pairs = read(_numbered(given), failures)
        if donors.n_seen < 2:
            n_usable = len(list(pairs))
            raise ValueError(
                f"{n_usable} of {len(given)} examples can be used, expected at least "
                f"two; {failures[0]['id']!r}: {failures[0]['error']}"
                if failures
                else f"{len(given)} examples given, expected at least two"
            )
        while batch := list(itertools.islice(pairs, batch_size)):
            vectors = encode([picture for _, picture in batch])
            keys = [_key(picture) for _, picture in batch]
            arms = vectors, donors.others(keys, vectors), None
            rows += _asked(language, [e for e, _ in batch], arms, adapter.inject_layer)
    found = AdapterEvaluation(
        pd.DataFrame(rows), pd.DataFrame(failures, columns=["id", "error"])
    )
    if any(p >= SURE for p in found.p_values().values()):
        warnings.warn(found.verdict, stacklevel=2)
    return found


class _Donors:
    """Vectors of the nearest picture before an example that is not its own.

    Rows of one picture often follow each other in a file.
    """

    def __init__(
        self,
        encode: Callable[[list[Image.Image]], Tensor],
        backwards: Iterator[tuple[Example, Image.Image]],
    ) -> None:
        """Begins with the last two pictures, which stand before the first."""
        self._latest: list[tuple[bytes, Tensor]] = []
        self.n_seen = 0
        """Pictures that were looked at."""
        for _, picture in backwards:
            self.n_seen += 1
            key = _key(picture)
            if all(key != known for known, _ in self._latest):
                self._latest.insert(0, (key, encode([picture])[0]))
            if len(self._latest) == 2:
                return
        if self.n_seen > 1:
            raise ValueError(
                "all examples that can be used show the same picture; give others, for "
                "what is asked is whether the adapter tells pictures apart"
            )

    def others(
        self, keys: Sequence[bytes], vectors: Float[Tensor, "image patch d_model"]
    ) -> Float[Tensor, "image patch d_model"]:
        """For each of a batch, the vectors of another picture."""
        found = []
        for key, own in zip(keys, vectors, strict=True):
            if key != self._latest[-1][0]:
                self._latest = [self._latest[-1], (key, own)]
            found.append(self._latest[-2][1])
        return torch.stack(found)


def _key(picture: Image.Image) -> bytes:
    return hashlib.sha1(picture.tobytes() + repr(picture.size).encode()).digest()


def _numbered(
    given: Sequence[Example], *, backwards: bool = False
) -> Iterator[Example]:
    """Examples, each with an id, read as they are asked for."""
    places = range(len(given))
    for place in reversed(places) if backwards else places:
        (example,) = as_examples([given[place]])
        yield example if given[place].id else replace(example, id=str(place))


def _read(
    language: LanguageModel,
    n_patches: int,
    examples: Iterable[Example],
    failures: list[dict[str, str]],
) -> Iterator[tuple[Example, Image.Image]]:
    """Examples with their pictures; those that cannot be used go to `failures`."""
    most = language.hooked.cfg.n_ctx
    for example in examples:
        try:
            if example.answer is None and example.caption is None:
                raise ValueError("neither answer nor caption to compare with")
            picture = example.picture()
            if example.answer is not None:
                prompt = language.chat.image_prompt(example.prompt, n_patches)
                length = len(prompt.ids) + _length(language, example.answer) + _MORE
                if length > most:
                    raise ValueError(
                        f"question and answer take {length} tokens of the {most} that "
                        "the language model is run with"
                    )
            if example.caption is not None:
                lesson(language.chat, _captioned(example), n_patches, most)
        except UNREADABLE as error:
            failures.append({"id": str(example.id), "error": str(error)})
        else:
            yield example, picture


_MORE = 2
"""Tokens that are said beyond the length of the right answer: with these at its end, an
answer is longer than any right one."""


def _captioned(example: Example) -> Example:
    """The example with its caption for an answer."""
    return Example(example.image, answer=example.caption)


def _asked(
    language: LanguageModel,
    batch: Sequence[Example],
    arms: Sequence[Float[Tensor, "image patch d_model"] | None],
    inject_layer: int,
) -> list[dict[str, object]]:
    """Rows of the table."""
    rows: list[dict[str, object]] = [
        {
            "id": example.id,
            "kind": getattr(example, "kind", ""),
            "answer": None if example.answer is None else _plain(example.answer),
        }
        for example in batch
    ]
    for arm, vectors in zip(ARMS, arms, strict=True):
        said = _answers(language, batch, vectors, inject_layer)
        nats = _captions(language, batch, vectors, inject_layer)
        for i, row in enumerate(rows):
            right = said[i] == row["answer"] if i in said else None
            row |= {
                arm: said.get(i),
                f"{arm}_right": right,
                f"{arm}_caption": nats.get(i),
            }
    return rows


def _answers(
    language: LanguageModel,
    batch: Sequence[Example],
    vectors: Float[Tensor, "image patch d_model"] | None,
    inject_layer: int,
) -> dict[int, str]:
    """What is said to those of a batch that have an answer, by place."""
    places = [i for i, example in enumerate(batch) if example.answer is not None]
    if not places:
        return {}
    n_patches = 0 if vectors is None else vectors.shape[1]
    said = language.generate(
        [language.chat.image_prompt(batch[i].prompt, n_patches) for i in places],
        None if vectors is None else vectors[places],
        # With these at its end, an answer is longer than any right one.
        max_new_tokens=max(_length(language, batch[i].answer or "") for i in places)
        + 2,
        inject_layer=inject_layer,
    )
    return {i: _plain(words) for i, words in zip(places, said, strict=True)}


def _captions(
    language: LanguageModel,
    batch: Sequence[Example],
    vectors: Float[Tensor, "image patch d_model"] | None,
    inject_layer: int,
) -> dict[int, float]:
    """Cross-entropy of the captions of those of a batch that have one, by place."""
    places = [i for i, example in enumerate(batch) if example.caption is not None]
    if not places:
        return {}
    n_patches = 0 if vectors is None else vectors.shape[1]
    most = language.hooked.cfg.n_ctx
    lessons = [
        lesson(language.chat, _captioned(batch[i]), n_patches, most) for i in places
    ]
    nats, rows = surprise(
        language,
        lessons,
        None if vectors is None else vectors[places],
        inject_layer=inject_layer,
    )
    found = {
        i: float(nats[rows.to(nats.device) == row].double().mean())
        for row, i in enumerate(places)
    }
    for i, value in found.items():
        if not math.isfinite(value):
            raise ValueError(
                f"the cross-entropy of example {batch[i].id!r} is {value}; look at the "
                "adapter's weights, and at the dtype of the language model"
            )
    return found


def _length(language: LanguageModel, words: str) -> int:
    return len(language.tokenizer(words, add_special_tokens=False).input_ids)


def _plain(words: str) -> str:
    return " ".join(words.lower().split()).removesuffix(".").strip()
