"""Contenders run in turn on the same inputs, and their results are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks import contenders
from benchmarks.compare import Found, agree, same_count
from benchmarks.measure import fast_bfloat16, say, summary, take_turns
from benchmarks.workload import Size, Workload, make_workload

_LIMIT, _REUSED, _REFERENCE = "limit", "limit (reused buffer)", "library"


def race(
    size: Size, images: int, rounds: int, device: str, *, screened: bool
) -> Iterator[dict[str, object]]:
    """One line a contender.

    Args:
        size: Shape of the workload.
        images: Pictures that each contender goes through.
        rounds: How often each does.
        device: Where.
        screened: Whether the screened encoding runs where bfloat16 is slow, too.

    Raises:
        DisagreementError: A contender found other numbers than the library.
    """
    say("making the model")
    workload = make_workload(size, images, device)
    batches = [workload.batch(examples) for examples in workload.pictures()]
    found: dict[str, Found] = {}

    def check(name: str, result: Found | None) -> None:
        if result is None:
            return
        found[name] = result
        agree(name, result, _REFERENCE, found[_REFERENCE])

    runs: dict[str, Callable[[], Found | None]] = {
        _LIMIT: partial(contenders.limit, workload, batches),
        _REUSED: partial(contenders.limit, workload, batches, reuse=True),
        _REFERENCE: partial(contenders.library, workload),
        "paper": partial(contenders.paper, workload),
        **_probes(workload, screened or fast_bfloat16(device)),
    }
    times = take_turns(runs, rounds, device, check=check)
    reference = found[_REFERENCE]
    count = contenders.values_over_threshold(workload, batches)
    same_count(_LIMIT, count, _REFERENCE, _mean_l0(workload, reference))
    best = {name: min(once.seconds for once in turns) for name, turns in times.items()}
    # Shares of a busy processor differ from turn to turn; what was computed does not.
    cpu = {name: min(o.cpu_seconds for o in turns) for name, turns in times.items()}
    l0 = {
        f"l0_{group}": round(float(reference.l0(group).mean()), 2)
        for group in contenders.GROUPS
    }
    for name, turns in times.items():
        yield {
            "contender": name,
            **summary(turns),
            "ratio_to_limit": best[name] / best[_LIMIT],
            "ratio_to_limit_reused": best[name] / best[_REUSED],
            "cpu_ratio_to_limit": cpu[name] / cpu[_LIMIT],
            "images": images,
            "images_per_second": images / best[name],
            **l0,
            **(found[name].more if name in found else {}),
        }


def _probes(
    workload: Workload, screened: bool
) -> dict[str, Callable[[], Found | None]]:
    """`probe_layers` in each of its encodings that is worth running here."""
    found = {}
    for encoding in contenders.encodings():
        if encoding != "screened" or screened:
            found[f"probe_layers {encoding}"] = partial(
                contenders.probe, workload, encoding=encoding
            )
    return found or {"probe_layers": partial(contenders.probe, workload)}


def _mean_l0(workload: Workload, found: Found) -> float:
    """Active features a token over all groups and layers."""
    tokens = dict(
        zip(
            contenders.GROUPS,
            (workload.size.patches, workload.size.words),
            strict=True,
        )
    )
    total = sum(found.l0(group).mean() * n for group, n in tokens.items())
    return float(total / sum(tokens.values()))
