"""Commands that say what the features of a saved run mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlm_probe.cli.app import app
from vlm_probe.cli.judging import descriptions_of, opened_judge, pictures_of
from vlm_probe.cli.printing import (
    feature_table,
    noted,
    printable,
    rate_table,
    shared_table,
    with_descriptions,
)

if TYPE_CHECKING:
    from vlm_probe.result import ProbeResult

Run = Annotated[Path, tyro.conf.Positional]
Group = Literal["image", "text_after_image", "text_only"]
Ranking = Literal["activation", "selectivity"]


@app.command
def features(
    run: Run,
    *,
    layer: int | None = None,
    image: str | None = None,
    group: Group | None = None,
    by: Ranking = "activation",
    k: int = 3,
    condition: str = "model",
    convention: Literal["pooled", "paper"] = "pooled",
    descriptions: str | None = None,
    rows: int = 60,
    out: Path | None = None,
) -> None:
    """Print the strongest features of images: where they fire, and what they mean.

    Args:
        run: Folder of a saved result, such as `vlm-probe demo` writes.
        layer: Only of this layer.
        image: Only of this image, by its id, or its place in the run.
        group: Only of this group.
        by: Which ranking: activation, or selectivity if the run has it.
        k: Features of each layer, group and image.
        condition: Of the model, or of a control arm of the run.
        convention: Which features fire too often: pooled, by the rate per token; paper,
            as arXiv 2506.11976 does.
        descriptions: neuronpedia, a folder of its exports, a table in CSV or JSON, or
            toy; toy for a run of the embedded toy model, else none.
        rows: How many are printed.
        out: CSV file for all of them.
    """
    from vlm_probe.result import ProbeResult

    result = ProbeResult.load(run)
    source = descriptions_of(result, descriptions)
    with noted():
        chosen = result.best_features(
            by=by,
            k=k,
            layer=layer,
            group=group,
            image=_image(result, image),
            condition=condition,
            convention=convention,
        )
    chosen = with_descriptions(chosen, source)
    shown = feature_table(chosen.head(rows))
    print(shown.to_string(index=False, float_format="%.2f"))
    if len(chosen) > rows:
        print(
            f"... {len(chosen) - rows} more rows: choose with --layer, --image and "
            "--group, print more with --rows, or write all with --out"
        )
    if source is not None:
        named = int(chosen["description"].notna().sum())
        print(f"{named} of {len(chosen)} described by: {printable(source.name)}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        chosen.to_csv(out, index=False)
        print(f"all {len(chosen)} rows: {out}")


@app.command
def match(
    run: Run,
    *,
    examples: tuple[Path, ...] = (),
    descriptions: str | None = None,
    judge: Literal["truth", "embedding", "endpoint"] = "truth",
    judge_model: str | None = None,
    base_url: str | None = None,
    threshold: float | None = None,
    price: tuple[float, float] | None = None,
    cache: Path | None = None,
    layer: int | None = None,
    group: Group | None = None,
    by: Ranking = "activation",
    k: int = 3,
    condition: str = "model",
    convention: Literal["pooled", "paper"] = "pooled",
    chance_pairs: int | None = None,
    seed: int = 0,
    dry_run: bool = False,
    out: Path | None = None,
) -> None:
    """Measure how often features' descriptions describe their images, against chance.

    Args:
        run: Folder of a saved result.
        examples: The run's pictures in their order, or its conversation file (.json);
            toy pictures are made again from their ids.
        descriptions: neuronpedia, a folder of its exports, a table in CSV or JSON, or
            toy; toy for a run of the embedded toy model.
        judge: truth, what is known of toy pictures; embedding, a text model that
            compares with captions; endpoint, a vision model of an OpenAI-compatible
            server.
        judge_model: Name of the text or vision model.
        base_url: Of the endpoint, such as http://localhost:8000/v1. Its key is read
            from OPENAI_API_KEY.
        threshold: The cosine from which on the text model says yes; if not given, it is
            set so that 5 % of descriptions match other pictures than their own.
        price: What a million tokens cost, sent and received, for the estimate.
        cache: File in which the endpoint's answers are kept; answers.sqlite in the
            run's folder if not given.
        layer: Only of this layer.
        group: Only of this group.
        by: Which ranking: activation, or selectivity if the run has it.
        k: Features of each layer, group and image.
        condition: Of the model, or of a control arm of the run.
        convention: Which features fire too often: pooled or paper.
        chance_pairs: Other pictures that each picture's descriptions are judged on, at
            least; all of them if the judge costs nothing, else 4.
        seed: Of what is random. The same seed asks the same questions.
        dry_run: Say what asking would take and cost, and ask nothing.
        out: Folder for rates, judgements and answers.
    """
    from vlm_probe.analysis.match import CHANCE_PAIRS, match_rate
    from vlm_probe.analysis.pairing import plan
    from vlm_probe.result import ProbeResult

    result = ProbeResult.load(run)
    source = descriptions_of(result, descriptions)
    if source is None:
        raise ValueError(
            f"the model of {run} has no descriptions of its own; give --descriptions: "
            "neuronpedia, a folder of its exports, or a table in CSV or JSON"
        )
    with noted():
        chosen = result.best_features(
            by=by,
            k=k,
            layer=layer,
            group=group,
            condition=condition,
            convention=convention,
        )
    pictures = pictures_of(result, examples)
    if judge == "endpoint" and chance_pairs is None:
        chance_pairs = CHANCE_PAIRS
    planned = plan(chosen, source, pictures, k=k, chance_pairs=chance_pairs, seed=seed)
    opened = opened_judge(
        judge,
        planned,
        model=judge_model,
        base_url=base_url,
        threshold=threshold,
        price=price,
        cache=cache or run / "answers.sqlite",
    )
    if dry_run:
        print(opened.estimate(planned.examples, planned.questions()))
        return
    found = match_rate(
        chosen, source, opened, pictures, k=k, chance_pairs=chance_pairs, seed=seed
    )
    print(rate_table(found.rates).to_string(index=False))
    print(_MATCH_WORDS.format(k=k, source=printable(source.name), judge=opened.name))
    if out is not None:
        print(f"rates, judgements and answers: {found.save(out)}")


_MATCH_WORDS = """
described: how many of the chosen features have a description.
rate: how many of those describe their image, with 95 % bounds.
any: how many images are described by any of their {k}.
chance: the same features on other images, and where 95 % of random exchanges fall.
p: share of exchanges that reach the rate.
Descriptions: {source}. Judge: {judge}."""


@app.command
def shared(
    run: Run,
    *,
    by: Ranking = "activation",
    weights: Literal["value", "score", "equal"] = "value",
    out: Path | None = None,
) -> None:
    """Measure how much images' features are those of their captions, against chance.

    Args:
        run: Folder of a saved result of pictures with captions, with the groups image
            and text_only.
        by: Which ranking: activation, or selectivity if the run has it.
        weights: Of a feature: value, its activation; score, that of the ranking; equal,
            the same for all.
        out: CSV file for the table.
    """
    from vlm_probe.result import ProbeResult

    found = ProbeResult.load(run).shared_features(by=by, weights=weights)
    print(shared_table(found).to_string(index=False))
    print(_SHARED_WORDS)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        found.to_csv(out, index=False)


_SHARED_WORDS = """
overlap: weighted Jaccard index of an image's features and its own caption's, with 95 %
bounds; shuffled: with other images' captions; p: share of random pairings with as much.
to caption: how often the own caption is the nearest of all; to image: the own image."""


def _image(result: ProbeResult, image: str | None) -> int | str | None:
    """An id if there is such a one, else a place in the run."""
    if image is None or image in set(result.top_features["id"]):
        return image
    return int(image) if image.isdecimal() else image
