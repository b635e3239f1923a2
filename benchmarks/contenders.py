"""Ways from pictures to the same tables: the least that can be, three that are used.

All take the same examples through the same weights and, but for the two limits, give
back what they found, so that it can be compared.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import vlm_probe as vp
from benchmarks.compare import VALUES, Found
from benchmarks.workload import GROUPS, Batch, Workload

TOP_K = 8
Look = Callable[[int, Tensor], None]
"""Gets a layer and its product, to be looked at before it is forgotten."""

_FREQUENT = 0.05
"""Features that fire in more than this share of images are dropped by the paper."""


def limit(
    workload: Workload,
    batches: list[Batch],
    *,
    reuse: bool = False,
    masked: bool = False,
    look: Look | None = None,
) -> None:
    """The forward pass and one dense product with each encoder, and nothing else.

    No exact code can do without the pass; a dense code cannot do without the product.

    Args:
        workload: Model and examples.
        batches: Image vectors ready made: vision model and adapter take no part.
        reuse: Whether all products are written to one buffer. A fresh tensor of this
            size costs page faults each time, which is not arithmetic either.
        masked: Whether the pass gets an attention mask, which costs it something even
            if it masks nothing.
        look: For a check, which costs time of its own.
    """
    model, n = workload.model, workload.size.layers
    tokens = max(batch.tokens[:, batch.counted].numel() for batch in batches)
    width = workload.size.features
    device = model.language.device
    buffer = torch.empty(tokens, width, device=device) if reuse else None

    def visit(residual: Tensor, batch: Batch, layer: int) -> None:
        x = residual[:, batch.counted].flatten(0, 1)
        encoder = model.saes[layer].sae.W_enc
        if buffer is None:
            product = x @ encoder
        else:
            product = torch.mm(x, encoder, out=buffer[: len(x)])
        if look is not None:
            look(layer, product)

    def hooks(batch: Batch) -> list[tuple[str, Callable]]:
        def at(layer: int) -> Callable:
            return lambda residual, hook: visit(residual, batch, layer)  # noqa: ARG005

        return [("hook_embed", batch.put)] + [
            (f"blocks.{layer}.hook_resid_post", at(layer)) for layer in range(n)
        ]

    for batch in batches:
        model.language.hooked.run_with_hooks(
            batch.tokens,
            return_type=None,
            stop_at_layer=n,
            attention_mask=torch.ones_like(batch.tokens) if masked else None,
            fwd_hooks=hooks(batch),
        )


def values_over_threshold(workload: Workload, batches: list[Batch]) -> float:
    """How many features fire at a token, by the products of `limit`."""
    counts = []

    def look(layer: int, product: Tensor) -> None:
        sae = workload.model.saes[layer].sae
        counts.append((product + sae.b_enc > sae.threshold).sum(1).double())

    limit(workload, batches, look=look)
    return float(torch.cat(counts).mean())


def library(workload: Workload) -> Found:
    """What a user of TransformerLens and sae-lens would write, batch by batch."""
    model, n = workload.model, workload.size.layers
    sums: dict[tuple[int, str], dict[str, Tensor | float]] = {}
    top = {}
    for first, examples in zip(
        range(0, len(workload.examples), workload.size.batch),
        workload.pictures(),
        strict=True,
    ):
        batch = workload.batch(examples)
        with model.language.hooked.hooks([("hook_embed", batch.put)]):
            # Without stop_at_layer it would compute logits as well, which take as long
            # as the pass; a user who wants residual streams alone can know that.
            _, cache = model.language.hooked.run_with_cache(
                batch.tokens,
                return_type=None,
                stop_at_layer=n,
                names_filter=lambda name: name.endswith("hook_resid_post"),
            )
        for layer in range(n):
            sae = model.saes[layer].sae
            for group, where in zip(GROUPS, (batch.image, batch.text), strict=True):
                x = cache["resid_post", layer][:, where]
                features = sae.encode(x)
                x_hat = sae.decode(features)
                _add(sums.setdefault((layer, group), {}), x, x_hat, features)
                strongest = features.amax(1).topk(TOP_K)
                for row in range(len(examples)):
                    top[layer, group, first + row] = _fired(
                        strongest.indices[row], strongest.values[row]
                    )
    return Found(_table({case: _metrics(s) for case, s in sums.items()}), top)


def paper(workload: Workload) -> Found:
    """The published procedure of arXiv 2506.11976, on groups of one pass.

    Each example by itself: a pass that caches every hook and computes logits; dense
    codes and reconstructions; all of it to disk in float32. Then three analyses, each
    of which reads all of an example, as one does where an example is one file. What is
    written is dropped from the system's cache, which no terabytes fit in: published
    runs read them from disk.
    """
    with tempfile.TemporaryDirectory(prefix="paper-") as folder:
        written = [
            _write_example(workload, index, Path(folder) / str(index))
            for index in range(len(workload.examples))
        ]
        stored = _Stored(Path(folder), len(written), workload.size.layers)
        table = _table(
            {
                (layer, group): {
                    "mse": mse,
                    "l0": share * workload.size.features,
                }
                for (layer, group), mse, share in zip(
                    stored.cases(),
                    stored.mean_squared_errors(),
                    stored.sparsities(),
                    strict=True,
                )
            }
        )
        top, _ = stored.strongest_features()
    return Found(table, top, {"written_mb_per_image": np.mean(written) / 1e6})


def probe(workload: Workload, **settings: object) -> Found:
    """`probe_layers`, with its bootstrap and all else that it does."""
    return as_found(run_probe(workload, **settings))


def run_probe(workload: Workload, **settings: object) -> vp.ProbeResult:
    """The probe that all parts measure."""
    return vp.probe_layers(
        workload.model,
        workload.examples,
        groups=GROUPS,
        layers=sorted(workload.model.saes),
        batch_size=workload.size.batch,
        top_k=TOP_K,
        progress=False,
        **settings,
    )


def as_found(result: vp.ProbeResult) -> Found:
    """A probe's tables in the form that is compared."""
    table = result.layers.set_index(["layer", "group"]).sort_index()
    top: dict[tuple[int, str, int], dict[int, float]] = {}
    for row in result.top_features.itertuples():
        case = (row.layer, row.group, row.image)
        top.setdefault(case, {})[row.feature] = row.value
    return Found(table[[*VALUES, "l0"]], top)


def encodings() -> tuple[str, ...]:
    """The ways of encoding that `probe_layers` offers; none where it has but one."""
    offered = any(field.name == "encoding" for field in fields(vp.ProbeSettings))
    return ("dense", "screened") if offered else ()


def _add(
    sums: dict[str, Tensor | float], x: Tensor, x_hat: Tensor, features: Tensor
) -> None:
    """Adds a batch to one layer's and group's sums, over tokens in float64."""
    x, x_hat = x.flatten(0, 1).double(), x_hat.flatten(0, 1).double()
    error, square = (x - x_hat).square().sum(1), x.square().sum(1)
    for name, value in {
        "n": len(x),
        "error": error.sum(),
        "square": square.sum(),
        "vector": x.sum(0),
        "nmse": (error / square).sum(),
        "cosine": torch.cosine_similarity(x, x_hat, dim=1).sum(),
        "l0": (features != 0).sum(),
        "norm": square.sqrt().sum(),
    }.items():
        sums[name] = sums.get(name, 0) + value


def _metrics(s: dict) -> dict[str, float]:
    n, d_model = s["n"], len(s["vector"])
    spread = s["square"] - s["vector"].square().sum() / n
    return {
        "mse": float(s["error"] / (n * d_model)),
        "fvu": float(s["error"] / spread),
        "nmse": float(s["nmse"] / n),
        "cosine": float(s["cosine"] / n),
        "l0": float(s["l0"] / n),
        "norm": float(s["norm"] / n),
    }


def _table(rows: dict[tuple[int, str], dict[str, float]]) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(rows, names=["layer", "group"])
    return pd.DataFrame(list(rows.values()), index=index).sort_index()


def _fired(features: Tensor, values: Tensor) -> dict[int, float]:
    """Features with their values, without those that did not fire."""
    pairs = zip(features.tolist(), values.tolist(), strict=True)
    return {feature: value for feature, value in pairs if value > 0}


_ARRAYS = ("activations", "features", "reconstructions")


def _write_example(workload: Workload, index: int, folder: Path) -> int:
    """Writes all dense arrays of an example and says how many bytes they are."""
    folder.mkdir()
    model = workload.model
    batch = workload.batch([workload.examples[index]])
    with model.language.hooked.hooks([("hook_embed", batch.put)]):
        _, cache = model.language.hooked.run_with_cache(batch.tokens)
    written = 0
    for layer in range(workload.size.layers):
        sae = model.saes[layer].sae
        for group, where in zip(GROUPS, (batch.image, batch.text), strict=True):
            x = cache["resid_post", layer][0, where]
            features = sae.encode(x)
            arrays = (x, features, sae.decode(features))
            for name, array in zip(_ARRAYS, arrays, strict=True):
                file = folder / f"{layer}-{group}-{name}.npy"
                np.save(file, array.cpu().numpy())
                _drop_from_cache(file)
                written += file.stat().st_size
    return written


def _drop_from_cache(file: Path) -> None:
    """Has a file read from disk the next time, where the system can be told to."""
    if not hasattr(os, "posix_fadvise"):
        return
    opened = os.open(file, os.O_RDONLY)
    try:
        os.fsync(opened)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(opened)


class _Stored:
    """Examples on disk, and what is computed from them."""

    def __init__(self, folder: Path, n_examples: int, n_layers: int) -> None:
        self.folder, self.n_examples, self.n_layers = folder, n_examples, n_layers

    def cases(self) -> list[tuple[int, str]]:
        """Layers and groups, in the order of every analysis."""
        return [(layer, group) for layer in range(self.n_layers) for group in GROUPS]

    def read(self, example: int, layer: int, group: str) -> tuple[Tensor, ...]:
        """Activations, features and reconstructions."""
        folder = self.folder / str(example)
        files = (folder / f"{layer}-{group}-{name}.npy" for name in _ARRAYS)
        arrays = tuple(torch.from_numpy(np.load(file)) for file in files)
        for name in _ARRAYS:
            _drop_from_cache(folder / f"{layer}-{group}-{name}.npy")
        return arrays

    def mean_squared_errors(self) -> list[float]:
        """The mean over examples of each one's mean."""
        return self._means(lambda x, _, x_hat: (x_hat - x).pow(2).mean().item())

    def sparsities(self) -> list[float]:
        """The share of features that are not zero, likewise."""
        return self._means(
            lambda _, features, __: (features != 0).float().mean().item()
        )

    def strongest_features(
        self,
    ) -> tuple[dict[tuple[int, str, int], dict[int, float]], dict]:
        """Strongest features by example, all and without the frequent ones.

        Of few examples no feature is rare enough, so that only all can be compared.
        """
        everything, fires, peaks = {}, {}, {}
        for example in range(self.n_examples):
            for layer, group in self.cases():
                _, features, _ = self.read(example, layer, group)
                peak = features.amax(0)
                fires[layer, group] = fires.get((layer, group), 0) + (peak > 0).int()
                strongest = peak.topk(TOP_K)
                case = (layer, group, example)
                everything[case] = _fired(strongest.indices, strongest.values)
                peaks[case] = peak
        rare = {}
        for (layer, group, example), peak in peaks.items():
            often = fires[layer, group] > _FREQUENT * self.n_examples
            strongest = peak.masked_fill(often, 0).topk(TOP_K)
            rare[layer, group, example] = _fired(strongest.indices, strongest.values)
        return everything, rare

    def _means(self, one: Callable[[Tensor, Tensor, Tensor], float]) -> list[float]:
        """The mean over examples by case, reading each example once."""
        values = [
            [one(*self.read(example, layer, group)) for layer, group in self.cases()]
            for example in range(self.n_examples)
        ]
        return np.mean(values, axis=0).tolist()
