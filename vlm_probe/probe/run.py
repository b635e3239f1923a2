"""What a probe holds while images pass through."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from vlm_probe.checkpoint import State
from vlm_probe.codes import FeatureSums
from vlm_probe.model import VisionLanguageModel
from vlm_probe.probe.arms import Arms
from vlm_probe.probe.boxes import Size, boxes_of, why_unknown
from vlm_probe.probe.clock import Clock
from vlm_probe.probe.feed import Block, Failure, Feed, Item
from vlm_probe.probe.prompts import Prompts
from vlm_probe.probe.provenance import versions
from vlm_probe.probe.reference import PREFIX, Reference, first_pictures, settle
from vlm_probe.probe.tally import Tallies, Tally
from vlm_probe.probe.visit import Coded, Visit
from vlm_probe.result import ProbeResult
from vlm_probe.saes import encoding_of, outlines
from vlm_probe.settings import ProbeSettings
from vlm_probe.sums import LayerSums
from vlm_probe.tokens import Prompt, check_names


class Run:
    """The images so far, as what was added up of them."""

    def __init__(self, model: VisionLanguageModel, settings: ProbeSettings) -> None:
        """Starts with no image.

        Raises:
            ValueError: A layer without SAE is asked for; lists those that have one.
        """
        layers = sorted(model.saes) if settings.layers is None else settings.layers
        check_names("layer", list(map(str, layers)), list(map(str, sorted(model.saes))))
        first = model.adapter.inject_layer
        if tuple(settings.groups) == ("image",) and max(layers) < first:
            raise ValueError(
                f"layers {sorted(layers)} come before block {first}, where the "
                "adapter's vectors enter: there are no image tokens; ask for later ones"
            )
        self.model = model
        self.settings = settings
        self.layers = sorted(set(layers))
        self.encoding = encoding_of(model.saes, settings.encoding)
        self.clock = Clock()
        self.tallies = Tallies(self._empty)
        self.failures: list[Failure] = []
        self.names: dict[int, str] = {}
        """Id of each image that went through, by its place."""
        self.n_seen = 0
        """Images taken up, those that failed included."""
        self.next = 0
        """The first block that has not been taken up."""
        self.order = ""
        """Digest of all examples before it."""
        self.n_close = 0
        """Pairs of token and feature within rounding of the threshold."""
        self.calibrated = 0
        """Pictures that `random_adapter` was calibrated on."""
        self.sizes: dict[int, Size] = {}
        """Width and height of each picture that went through, by its place."""
        self.reference: Reference | None = None
        """How seldom features fire; only `selectivity` asks."""
        self.complete = False
        """Whether there are no more images."""
        self.whole = True
        """Whether every image is in all sums or in none."""
        self._rarity: dict[int, Float[Tensor, " feature"]] = {}
        self._prompts = Prompts(model, settings)
        self._arms = Arms(model, settings, self._usable, self.clock)

    def prepare(self, feed: Feed, state: State | None) -> None:
        """Goes back to a state, and looks at the first images for what needs them."""
        if state is not None:
            self.restore(state)
            self.complete = False
        self._arms.prepare(feed)
        before, now = self.calibrated, self._arms.calibrated
        if self.next and before != now:
            raise ValueError(
                f"the run was begun with {before} pictures to calibrate random_adapter "
                f"on, now there are {now}, so its adapter would be another; give the "
                f"same pictures, or another folder and {self.settings.calibration} "
                "pictures or more at its beginning"
            )
        self.calibrated = now
        if "selectivity" in self.settings.rank_by:
            with self.clock("reference"):
                self.reference = settle(
                    self.reference,
                    self.model,
                    self.settings,
                    self.layers,
                    first_pictures(feed, self._usable, self.settings.calibration),
                    encoding=self._how(),
                )
            self._rarity = self.reference.rarity(self.model.language.device)

    def add(self, block: Block, on_error: str) -> None:
        """Takes a block through all conditions.

        Raises:
            ValueError: An example cannot be used, and `on_error` is "raise".
        """
        failures, items = [*block.failures], []
        for item in block.items:
            if error := self._prompts.too_long(item):
                failures.append(Failure.of(item.index, item.example, error))
            else:
                items.append(item)
        if failures and on_error == "raise":
            first = min(failures, key=lambda failure: failure.image)
            raise ValueError(
                f"image {first.image}, {first.id!r}: {first.error} "
                '(on_error="record" lists it and goes on)'
            )
        self.whole = False
        self.failures += failures
        if items:
            self._pass(items, block.skipped)
        else:
            self._arms.pass_over(block.skipped)
        self.n_seen += len(block.examples)
        self.next, self.order = block.number + 1, block.digest
        self.whole = True

    def result(
        self, more: Mapping[str, object], timing: dict, n_given: int | None
    ) -> ProbeResult:
        """The tables so far.

        Args:
            more: For `meta`.
            timing: When and how long.
            n_given: How many images there are, if known.

        Raises:
            ValueError: No image went through.
        """
        failures = sorted(self.failures, key=lambda failure: failure.image)
        if not self.names:
            if not failures:
                raise ValueError(
                    "no images given; expected at least one picture or path"
                )
            raise ValueError(
                f"none of {len(failures)} images could be used; the first, "
                f"{failures[0].id!r}: {failures[0].error}"
            )
        of = "" if n_given is None else f" of {n_given}"
        vision, reference = self.model.vision, self.reference
        unknown = why_unknown(vision)
        layers, features, top = self.tallies.tables(
            self.names,
            vision.grid[1],
            lambda word: self.model.language.tokenizer.decode([word]),
            lambda rows: boxes_of(
                vision,
                rows["image"],
                np.full(len(rows), -1) if unknown else rows["patch"],
                self.sizes,
            ),
            lambda layer: reference and reference.layers[layer].rate(),
        )
        meta = {
            "model": self.model.name,
            "parts": self.model.identities(),
            "settings": asdict(self.settings),
            "encoding": self.encoding,
            "layers": self.layers,
            "hook_point": self.model.hook_point,
            "saes": {
                str(layer): {name: getattr(sae, name) for name in _OF_SAE}
                for layer, sae in outlines(self.model.saes).items()
                if layer in self.layers
            },
            "inject_layer": self.model.adapter.inject_layer,
            "n_layers": self.model.language.n_layers,
            "patch_grid": list(vision.grid),
            "patch_boxes": unknown or "known",
            "d_model": self.model.language.d_model,
            "n_images": len(self.names),
            "n_failures": len(failures),
            "n_close": self.n_close,
            "partial": None
            if self.complete
            else f"stopped after {self.n_seen}{of} images",
            "text_only_words": self._prompts.instead,
            "reference": reference and reference.about(),
            "versions": versions(),
        }
        return ProbeResult(
            layers=layers,
            features=features,
            top_features=top,
            failures=pd.DataFrame(
                [asdict(failure) for failure in failures],
                columns=[field.name for field in fields(Failure)],
            ),
            # Through JSON, so that a result is the same after saving and loading.
            meta=json.loads(json.dumps(meta | dict(more))),
            timing=timing,
        )

    def state(self) -> State:
        """All of it that could not be had again."""
        tensors = self.tallies.state()
        # Before the first block it is of pictures that nothing was recorded of yet.
        if self._arms.last is not None and self.next:
            tensors["last"] = self._arms.last
        if self.reference is not None and self.next:
            tensors |= self.reference.state()
        record = {
            "failures": [asdict(failure) for failure in self.failures],
            "names": list(self.names.items()),
            "sizes": list(self.sizes.items()),
            "instead": self._prompts.instead,
            **{name: getattr(self, name) for name in _COUNTS},
        }
        return State(tensors, record)

    def restore(self, state: State) -> None:
        """Takes what `state` gave."""
        tensors, record = dict(state.tensors), state.record
        reference = {n: tensors.pop(n) for n in list(tensors) if n.startswith(PREFIX)}
        if reference:
            self.reference = Reference.restored(reference)
        last = tensors.pop("last", None)
        if last is not None:
            self._arms.last = last.to(self.model.language.device)
        self.tallies.restore(tensors)
        self.failures = [Failure(**failure) for failure in record["failures"]]
        self.names = {index: name for index, name in record["names"]}
        self.sizes = {index: (w, h) for index, (w, h) in record["sizes"]}
        self._prompts.instead.update(record["instead"])
        for name in _COUNTS:
            setattr(self, name, record[name])

    def merge(self, other: Run) -> None:
        """Adds another process' part of the same run."""
        self.tallies.merge(other.tallies)
        self.failures += other.failures
        self.names |= other.names
        self.sizes |= other.sizes
        # Each process measured the same.
        self.reference = self.reference or other.reference
        instead = self._prompts.instead
        for words in instead:
            instead[words] += other._prompts.instead[words]
        self.n_seen += other.n_seen
        self.n_close += other.n_close
        self.complete &= other.complete

    def _pass(self, items: Sequence[Item], skipped: Sequence[Block]) -> None:
        """Runs the models, and adds up what each layer's SAE makes of them."""
        self.names |= {item.index: str(item.example.id) for item in items}
        self.sizes |= {item.index: item.picture.size for item in items}
        if {"image", "text_after_image"} & set(self.settings.groups):
            prompts = [self._prompts.with_picture(item) for item in items]
            pictured: dict[int, Coded] = {}
            for condition, vectors in self._arms.of(items, skipped):
                self._read(items, prompts, vectors, condition, pictured)
        if "text_only" in self.settings.groups:
            prompts = [self._prompts.with_words(item) for item in items]
            self._read(items, prompts, None, "model", {})

    def _read(
        self,
        items: Sequence[Item],
        prompts: Sequence[Prompt],
        vectors: Float[Tensor, "image patch d_model"] | None,
        condition: str,
        pictured: dict[int, Coded],
    ) -> None:
        visit = Visit(
            self.model,
            self.settings,
            self.tallies,
            self.clock,
            prompts=prompts,
            images=[item.index for item in items],
            names=[str(item.example.id) for item in items],
            condition=condition,
            encoding=self._how(),
            pictured=pictured,
            rarity=self._rarity,
        )
        if not visit:
            return
        with self.clock("language"):
            self.model.language.read(
                prompts,
                vectors,
                self.layers,
                visit,
                hook_point=self.model.hook_point,
                inject_layer=self.model.adapter.inject_layer,
            )
        self.n_close += visit.n_close

    def _how(self) -> str:
        """How tokens are coded."""
        return "dense" if self.encoding == "dense" else self.settings.encoding

    def _usable(self, block: Block) -> list[Item]:
        return [item for item in block.items if not self._prompts.too_long(item)]

    def _empty(self, layer: int) -> Tally:
        sae, device = outlines(self.model.saes)[layer], self.model.language.device
        d_model, replicates = self.model.language.d_model, self.settings.replicates
        return Tally(
            LayerSums(d_model, sae.n_features, replicates, device),
            FeatureSums(sae.n_features, device),
        )


_OF_SAE = ("hook_point", "n_features", "model_name", "neuronpedia_id")
"""What descriptions of an SAE's features must agree with."""
_COUNTS = ("n_seen", "n_close", "next", "order", "calibrated", "complete")
"""What else of a run is kept, JSON only."""
