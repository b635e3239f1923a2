"""The one road from images to a result."""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vlm_probe import controls
from vlm_probe.codes import FeatureSums, Peaks, peaks
from vlm_probe.examples import UNREADABLE, Example, as_examples
from vlm_probe.language import Visitor
from vlm_probe.model import VisionLanguageModel
from vlm_probe.model.findings import cheap_findings
from vlm_probe.result import ProbeResult
from vlm_probe.settings import ProbeSettings
from vlm_probe.sums import LayerSums, bootstrap_weights
from vlm_probe.tokens import Prompt, check_names


def probe_layers(
    model: VisionLanguageModel,
    images: Iterable[Image.Image | str | Path | Example],
    settings: ProbeSettings | None = None,
    *,
    progress: bool = True,
    **changes: object,
) -> ProbeResult:
    """Measures, layer by layer, how well language features describe image tokens.

    Each picture goes through the model once for the condition `model` and once for
    each control arm, and once more without picture, in words, for `text_only`. At
    each layer the SAE codes the residual stream, and only sums are kept. What
    `vlm_probe.doctor` can tell without a pass is looked at first: what may spoil the
    numbers is warned of, and stands in `meta["findings"]`.

    Args:
        model: Of `vlm_probe.load`.
        images: Pictures, paths or examples; a generator is read as it comes. One that
            cannot be read is listed in `failures` and the rest goes on.
        settings: What is asked; the defaults if None.
        progress: Whether to show a progress bar.
        **changes: Fields of `ProbeSettings`, over `settings`, for instance
            `layers=[0, 4]`, `controls=["noise"]`, `convention="paper"`.

    Returns:
        Tables by layer, group and condition, with 95 % bounds.

    Raises:
        TypeError: Something among the images is none, or an unknown setting.
        ValueError: No image (could be read), an unknown layer, group or control, or
            an activation that is not a number.
    """
    findings = [f for f in cheap_findings(model) if f.verdict != "ok"]
    for finding in findings:
        if finding.verdict in ("warning", "wrong"):
            warnings.warn(f"{finding.check}: {finding.said}", stacklevel=2)
    run = _Run(model, _settings(settings, changes))
    started, begun = datetime.now(UTC), time.perf_counter()
    total = len(images) if hasattr(images, "__len__") else None
    with tqdm(total=total, desc="probe", unit="image", disable=not progress) as bar:
        for batch in run.batches(run.readable(images)):
            run.add(batch)
            bar.update(len(batch))
    return run.result(
        {
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - begun, 2),
            "findings": [asdict(finding) for finding in findings],
        }
    )


@dataclass(frozen=True)
class _Item:
    """A readable example of the run."""

    index: int
    example: Example
    picture: Image.Image


class _Run:
    """What a probe holds while images pass through."""

    def __init__(self, model: VisionLanguageModel, settings: ProbeSettings) -> None:
        layers = sorted(model.saes) if settings.layers is None else settings.layers
        check_names("layer", list(map(str, layers)), list(map(str, sorted(model.saes))))
        self.model = model
        self.settings = settings
        self.layers = sorted(set(layers))
        self.tallies: dict[tuple[int, str, str], _Tally] = {}
        self.failures: list[dict[str, object]] = []
        self.n_images = 0
        self.instead = {"captions": 0, "reference texts": 0}
        self._untrained: controls.Map | None = None
        self._last: Float[Tensor, "patch d_model"] | None = None

    def readable(self, images: Iterable) -> Iterator[_Item]:
        """Reads pictures; those that cannot be read become failures."""
        index = -1
        for index, example in enumerate(as_examples(images)):
            try:
                picture = example.picture()
            except UNREADABLE as error:
                said = f"{type(error).__name__}: {error}"
                self.failures.append({"image": index, "id": example.id, "error": said})
                continue
            yield _Item(index, example, picture)
        if index < 0:
            raise ValueError("no images given; expected at least one picture or path")

    def batches(self, items: Iterator[_Item]) -> Iterator[list[_Item]]:
        """Lists of items; the first ones calibrate `random_adapter` if it is asked."""
        if "random_adapter" in self.settings.controls:
            first = list(itertools.islice(items, self.settings.calibration))
            if first:
                self._calibrate(first)
            items = itertools.chain(first, items)
        while batch := list(itertools.islice(items, self.settings.batch_size)):
            yield batch

    def add(self, batch: Sequence[_Item]) -> None:
        """Takes a batch through all conditions."""
        patches = self.model.vision.encode([item.picture for item in batch])
        units = [item.index for item in batch]
        language, point = self.model.language, self.model.hook_point
        asked = self.settings.groups
        weights = bootstrap_weights(units, self.settings.replicates, self.settings.seed)
        if {"image", "text_after_image"} & set(asked):
            prompts = [
                language.chat.image_prompt(item.example.prompt, patches.shape[1])
                for item in batch
            ]
            for condition, vectors in self._conditions(patches, units):
                visit = self._visitor(batch, prompts, condition, weights)
                language.read(prompts, vectors, self.layers, visit, hook_point=point)
        if "text_only" in asked:
            prompts = [
                language.chat.text_prompt(item.example.prompt, self._words(item))
                for item in batch
            ]
            visit = self._visitor(batch, prompts, "model", weights)
            language.read(prompts, None, self.layers, visit, hook_point=point)
        self.n_images += len(batch)

    def result(self, when: dict[str, object]) -> ProbeResult:
        """The tables so far."""
        if not self.n_images:
            first = self.failures[0]
            raise ValueError(
                f"none of {len(self.failures)} images could be read; the first, "
                f"{first['id']!r}: {first['error']}"
            )
        cases = {
            case: self.tallies[case]
            for case in sorted(self.tallies, key=lambda c: (c[2] != "model", c[2], c))
        }
        layers = [_named(case) | tally.sums.row() for case, tally in cases.items()]
        features = [
            pd.DataFrame(_named(case) | tally.features.columns())
            for case, tally in cases.items()
        ]
        top = [
            pd.DataFrame(_named(case) | rows)
            for case, tally in cases.items()
            for rows in tally.top
        ]
        return ProbeResult(
            layers=pd.DataFrame(layers),
            features=pd.concat(features, ignore_index=True),
            top_features=pd.concat(top, ignore_index=True),
            failures=pd.DataFrame(self.failures, columns=["image", "id", "error"]),
            # Through JSON, so that a result is the same after saving and loading.
            meta=json.loads(json.dumps(self._meta() | when)),
        )

    @torch.no_grad()
    def _conditions(
        self, patches: Float[Tensor, "image patch d_vision"], units: list[int]
    ) -> list[tuple[str, Float[Tensor, "image patch d_model"]]]:
        """The picture's vectors under each condition."""
        vectors = self.model.adapter(patches)
        found = [("model", vectors)]
        for control in self.settings.controls:
            if control == "random_adapter":
                # Calibrated by the time there are batches.
                arm = self._untrained(patches)  # pyright: ignore[reportOptionalCall]
            elif control == "noise":
                arm = controls.noise(vectors, units, self.settings.seed)
            else:
                arm = controls.previous_image(vectors, self._last)
            found.append((control, arm))
        self._last = vectors[-1]
        return found

    def _calibrate(self, first: Sequence[_Item]) -> None:
        size = self.settings.batch_size
        encoded = [
            self.model.vision.encode([i.picture for i in first[at : at + size]])
            for at in range(0, len(first), size)
        ]
        self._untrained = controls.random_adapter(
            self.model.adapter,
            torch.cat(encoded).flatten(0, 1),
            self.settings.seed,
        )

    def _words(self, item: _Item) -> str:
        """What stands in the picture's place: its caption, else a reference text."""
        if item.example.caption is not None:
            self.instead["captions"] += 1
            return item.example.caption
        self.instead["reference texts"] += 1
        texts = self.model.reference_texts
        return texts[item.index % len(texts)]

    def _visitor(
        self,
        batch: Sequence[_Item],
        prompts: Sequence[Prompt],
        condition: str,
        weights: Float[np.ndarray, "replicate unit"],
    ) -> Visitor:
        """What is done with a layer: code each group's tokens, add, forget."""
        places = {
            group: found
            for group in self.settings.groups
            if len(found := _places(prompts, group, self.settings.include_special))
        }

        def visit(layer: int, residual: Float[Tensor, "row pos d_model"]) -> None:
            self._check(layer, residual, prompts, batch)
            sae = self.model.saes[layer]
            for group, (row, position) in ((g, p.T) for g, p in places.items()):
                x = residual[torch.from_numpy(row), torch.from_numpy(position)]
                codes, x_hat = sae.code(x)
                found = peaks(codes, row)
                tally = self._tally(layer, group, condition)
                tally.sums.add(
                    x,
                    x_hat,
                    codes.l0(),
                    row,
                    weights,
                    convention=self.settings.convention,
                )
                tally.features.add(codes, found)
                best = found.strongest(self.settings.top_k)
                tally.top.append(self._rows(best, batch, prompts, position))

        return visit

    def _check(
        self,
        layer: int,
        residual: Float[Tensor, "row pos d_model"],
        prompts: Sequence[Prompt],
        batch: Sequence[_Item],
    ) -> None:
        finite = residual.isfinite().all(-1)
        for row, (prompt, item) in enumerate(zip(prompts, batch, strict=True)):
            if not finite[row, : len(prompt.ids)].all():
                position = int((~finite[row]).nonzero()[0])
                raise ValueError(
                    f"an activation of layer {layer} is not a number: example "
                    f"{item.example.id!r}, position {position}; look at the adapter's "
                    "vectors and the dtype of the language model"
                )

    def _tally(self, layer: int, group: str, condition: str) -> _Tally:
        case = (layer, group, condition)
        if case not in self.tallies:
            width = self.model.saes[layer].n_features
            sums = LayerSums(
                self.model.language.d_model, width, self.settings.replicates
            )
            self.tallies[case] = _Tally(sums, FeatureSums(width), [])
        return self.tallies[case]

    def _rows(
        self,
        best: Peaks,
        batch: Sequence[_Item],
        prompts: Sequence[Prompt],
        position: np.ndarray,
    ) -> dict[str, object]:
        """Columns of `top_features` for the strongest features of a batch."""
        at = position[best.token]
        _, columns = self.model.vision.grid
        words, patches = [], []
        for unit, place in zip(best.unit, at, strict=True):
            prompt = prompts[unit]
            inside = place in prompt.image
            patches.append(place - prompt.image.start if inside else None)
            words.append(None if inside else self._word(prompt.ids[place]))
        patch = pd.array(patches, dtype="Int64")
        return {
            "image": np.array([batch[u].index for u in best.unit], np.int64),
            "id": [batch[u].example.id for u in best.unit],
            "rank": np.arange(len(best.unit))
            - np.searchsorted(best.unit, best.unit)
            + 1,
            "feature": best.feature,
            "value": best.value,
            "position": at,
            "token": pd.array(words, dtype="str"),
            "patch_row": patch // columns,
            "patch_column": patch % columns,
        }

    def _word(self, token: int) -> str:
        return self.model.language.tokenizer.decode([token])

    def _meta(self) -> dict[str, object]:
        return {
            "model": self.model.name,
            "parts": self.model.identities(),
            "settings": asdict(self.settings),
            "layers": self.layers,
            "hook_point": self.model.hook_point,
            "n_layers": self.model.language.n_layers,
            "patch_grid": list(self.model.vision.grid),
            "d_model": self.model.language.d_model,
            "n_images": self.n_images,
            "n_failures": len(self.failures),
            "text_only_words": self.instead,
            "versions": {name: _version(name) for name in _PACKAGES},
        }


@dataclass(frozen=True)
class _Tally:
    """What is kept of one layer, group and condition."""

    sums: LayerSums
    features: FeatureSums
    top: list[dict[str, object]]


_PACKAGES = (
    "vlm_probe",
    "torch",
    "transformer-lens",
    "sae-lens",
    "nnsight",
    "open_clip_torch",
)


def _settings(
    settings: ProbeSettings | None, changes: dict[str, object]
) -> ProbeSettings:
    valid = [field.name for field in fields(ProbeSettings)]
    unknown = [name for name in changes if name not in valid]
    if unknown:
        raise TypeError(
            f"unknown setting {', '.join(map(repr, unknown))}; "
            f"valid: {', '.join(valid)}"
        )
    return replace(settings or ProbeSettings(), **changes)


def _places(prompts: Sequence[Prompt], group: str, include_special: bool) -> np.ndarray:
    """Row and position of each token of a group, one pair a line."""
    found = [
        (row, position)
        for row, prompt in enumerate(prompts)
        for position in prompt.positions(group, include_special=include_special)
    ]
    return np.array(found, np.int64).reshape(-1, 2)


def _named(case: tuple[int, str, str]) -> dict[str, object]:
    return dict(zip(("layer", "group", "condition"), case, strict=True))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
