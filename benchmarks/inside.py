"""Where the time of a probe goes: by stage, and what tracing costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import contenders
from benchmarks.compare import DisagreementError
from benchmarks.contenders import Look
from benchmarks.measure import measured, say, summary, take_turns
from benchmarks.workload import Batch, Size, Workload, make_workload


def stages(size: Size, images: int, device: str) -> Iterator[dict[str, object]]:
    """One line for each stage that a result's `timing` names, and one for the rest."""
    workload = make_workload(size, images, device)
    once = measured(partial(contenders.run_probe, workload), device)
    timing = getattr(once.result, "timing", {})
    seconds = dict(timing.get("stages", {}))
    if not seconds:
        say("this probe_layers does not tell its stages")
    seconds["not in a stage"] = once.seconds - sum(seconds.values())
    for name, took in seconds.items():
        yield {
            "contender": f"stage {name}",
            "seconds": took,
            "share": took / once.seconds,
            "peak_mb": once.peak_mb,
            "images": images,
        }


def trace(size: Size, rounds: int, device: str) -> Iterator[dict[str, object]]:
    """One batch through the package's traced pass, and through plain hooks.

    Both do the work of `limit` and have the same attention mask.

    Raises:
        DisagreementError: The two passes give other products.
    """
    workload = make_workload(size, size.batch, device)
    batches = [workload.batch(workload.examples)]
    run: dict[str, Callable[..., None]] = {
        "trace hooks": partial(contenders.limit, workload, batches, masked=True),
        "trace nnsight": partial(_traced, workload, batches[0]),
    }
    _check(run)
    times = take_turns(run, rounds, device)
    best = {name: min(once.seconds for once in turns) for name, turns in times.items()}
    for name, turns in times.items():
        yield {
            "contender": name,
            **summary(turns),
            "ratio_to_hooks": best[name] / best["trace hooks"],
            "images": size.batch,
        }


def _traced(workload: Workload, batch: Batch, *, look: Look | None = None) -> None:
    model = workload.model

    def visit(layer: int, residual: Tensor) -> None:
        x = residual[:, batch.counted].flatten(0, 1)
        product = x @ model.saes[layer].sae.W_enc
        if look is not None:
            look(layer, product)

    prompts = [
        model.language.chat.image_prompt(example.prompt, batch.vectors.shape[1])
        for example in workload.examples
    ]
    model.language.read(prompts, batch.vectors, sorted(model.saes), visit)


def _check(run: dict[str, Callable[..., None]]) -> None:
    sizes: dict[str, list[float]] = {name: [] for name in run}
    for name, once in run.items():

        def look(_: int, product: Tensor, found: list[float] = sizes[name]) -> None:
            found.append(torch.linalg.vector_norm(product).item())

        once(look=look)
    first, *others = sizes.items()
    for name, found in others:
        pairs = zip(first[1], found, strict=True)
        if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in pairs):
            raise DisagreementError(
                f"norms of products by layer: {first[0]} has {first[1]}, {name} {found}"
            )
