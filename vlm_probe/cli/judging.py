"""What a saved run is judged with: descriptions, its pictures again, and a judge."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_probe.cli.app import examples_of

if TYPE_CHECKING:
    from vlm_probe.analysis.descriptions import Descriptions, SaeIdentity
    from vlm_probe.analysis.judges import Judge
    from vlm_probe.analysis.pairing import Plan
    from vlm_probe.examples import Example
    from vlm_probe.result import ProbeResult

FALSE_POSITIVES = 0.05
"""Share of other pictures' captions that a text model may find similar enough."""


def descriptions_of(result: ProbeResult, source: str | None) -> Descriptions | None:
    """The descriptions that were asked for; those of the toy for a run of the toy.

    Raises:
        ValueError: They are not of the SAEs of the run, or the run does not say which
            SAEs it had.
    """
    from vlm_probe.analysis.descriptions import open_descriptions, read_descriptions

    if source in (None, "toy"):
        found = _toy_descriptions(result)
        if found is None and source is not None:
            raise ValueError(
                "this run is not of the embedded toy model as it is now (its SAEs have "
                "other weights), and the toy's descriptions are of no other; probe "
                "again, or give others as --descriptions"
            )
        return found
    if Path(source).suffix in (".csv", ".json") and not result.meta.get("saes"):
        return read_descriptions(source)  # unchecked, and nothing else is needed
    return open_descriptions(source, _identities(result))


def _identities(result: ProbeResult) -> dict[int, SaeIdentity]:
    """Which SAEs the run had."""
    from vlm_probe.analysis.descriptions import SaeIdentity

    saes = result.meta.get("saes")
    if not saes:
        raise ValueError(
            "this run does not say which SAEs it had (it was saved by an older "
            "version), so nothing tells whose descriptions fit; probe again, or give "
            "a table in CSV or JSON as --descriptions"
        )
    return {int(n): SaeIdentity(layer=int(n), **told) for n, told in saes.items()}


def _toy_descriptions(result: ProbeResult) -> Descriptions | None:
    """The toy's labels, if the run's SAEs are the very ones that they are of."""
    from vlm_probe.analysis.descriptions import DescriptionTable
    from vlm_probe.toy.labels import toy_labels

    parts = result.meta.get("parts", {})
    labels = toy_labels()
    for layer in result.meta.get("layers", []):
        sae = parts.get(f"sae of layer {layer}", {}).get("sha256")
        if layer not in labels or labels[layer].sae != sae:
            return None
    return DescriptionTable(
        {layer: of.concepts() for layer, of in labels.items()},
        name="toy labels",
        widths={layer: of.width for layer, of in labels.items()},
    )


def pictures_of(result: ProbeResult, examples: Sequence[Path]) -> list[Example]:
    """The examples of the run, in its order.

    Args:
        result: Of the run.
        examples: Their files; toy pictures are made again from their ids if not given.

    Raises:
        ValueError: No files, and some of the run's pictures are not of the toy world.
    """
    from vlm_probe.examples import Example
    from vlm_probe.toy.examples import examples_named

    if examples:
        return list(examples_of(examples))
    ids = result.top_features.drop_duplicates("image").set_index("image")["id"]
    try:
        made = dict(zip(ids.index, examples_named(ids), strict=True))
    except ValueError as error:
        raise ValueError(
            f"{error}. Pictures of other worlds are given with --examples: those of "
            "the run in its order, or its conversation file"
        ) from error
    # What stands between them could not be read, and nothing was chosen for it.
    return [made.get(n, Example(None)) for n in range(int(ids.index.max()) + 1)]


def opened_judge(
    judge: str,
    planned: Plan,
    *,
    model: str | None,
    base_url: str | None,
    threshold: float | None,
    price: tuple[float, float] | None,
    cache: Path,
) -> Judge:
    """The judge that was asked for.

    Raises:
        ValueError: It needs something that was not given, or does not take it.
    """
    from vlm_probe.analysis.judges import EmbeddingJudge, EndpointJudge, TruthJudge
    from vlm_probe.toy.truth import describes

    given = {
        "--judge-model": model,
        "--base-url": base_url,
        "--threshold": threshold,
        "--price": price,
    }
    takes = {
        "truth": (),
        "embedding": ("--judge-model", "--threshold"),
        "endpoint": ("--judge-model", "--base-url", "--price"),
    }[judge]
    if unused := [n for n, v in given.items() if v is not None and n not in takes]:
        raise ValueError(
            f"the judge {judge!r} does not take {', '.join(unused)}; --judge embedding "
            "and --judge endpoint do"
        )
    if judge == "truth":
        return TruthJudge(describes, name="the toy world's truth")
    if model is None or (judge == "endpoint" and base_url is None):
        raise ValueError(
            f"the judge {judge!r} needs "
            + ("--judge-model" if judge == "embedding" else "--judge-model and ")
            + ("" if judge == "embedding" else "--base-url")
            + "; see docs/features.md"
        )
    if judge == "endpoint":
        return EndpointJudge(model, base_url=str(base_url), cache=cache, price=price)
    if threshold is not None:
        return EmbeddingJudge(model, threshold=threshold)
    return _calibrated(model, planned)


def _calibrated(model: str, planned: Plan) -> Judge:
    """A text model with a threshold by the run's own pictures."""
    from vlm_probe.analysis.judges import EmbeddingJudge, Question

    described = planned.judgements.dropna(subset="description")
    own = [
        Question(planned.keys[int(image)], words)
        for image, words in zip(
            described["image"], described["description"], strict=True
        )
    ]
    judge = EmbeddingJudge.calibrated(
        model, planned.examples, own, false_positives=FALSE_POSITIVES
    )
    print(
        f"threshold {judge.threshold:.3f}: {FALSE_POSITIVES:.0%} of descriptions match "
        "other pictures, by design, so the chance level is about that",
        file=sys.stderr,
    )
    return judge
