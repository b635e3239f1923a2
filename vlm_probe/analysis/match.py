"""How often a chosen feature's description describes the picture it was chosen for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlm_probe.analysis.chance import Counting, rates
from vlm_probe.analysis.judges.interface import Estimate, Judge
from vlm_probe.analysis.pairing import Describes, Plan, plan

TABLES = ("rates", "judgements", "answers")

CHANCE_PAIRS = 4
"""Other pictures that each picture's descriptions are judged on by a judge that costs
something: five times the questions of the match rate alone."""

_AT_ONCE = 200_000
"""Questions put to a judge that costs nothing at once: some ten megabytes."""


@dataclass(frozen=True)
class MatchResult:
    """Match rates, and every answer they are made of."""

    rates: pd.DataFrame
    """One row per layer, group and condition. `n_images`; `n_features`, those with a
    description, and `n_undescribed`, those without; `n_unanswered`, of those that the
    judge had no usable answer to: neither yes nor no; `n_matches`.

    `rate`: matches per answered feature. Its bounds `rate_low`, `rate_high` redraw
    pictures, since the features of one picture are not independent (they say nothing at
    0 and at 1); Wilson's `rate_wilson_low`, `rate_wilson_high` take features to be
    independent and are too narrow. `any_rate`: the share of pictures that any of their
    features describes, among the `n_any_images` where that is known, with Wilson's
    bounds `any_rate_low`, `any_rate_high`.

    Both have a chance level, the rate of the same features on other pictures
    (`rate_chance`); the bounds within which the rate falls after pictures are exchanged
    at random (`rate_chance_low`, `rate_chance_high`), and the share of exchanges that
    reach it (`rate_p`), a one-sided p-value. `any_rate_chance` and so on likewise.
    What could not be told is a missing value."""
    judgements: pd.DataFrame
    """One row per case, picture and chosen feature: the columns of the table given,
    `description` (missing if there is none), `block` (which pictures it was exchanged
    with) and `verdict` (missing without description, or without a usable answer)."""
    answers: pd.DataFrame
    """One row per question: `image`, `description`, `verdict`; of a picture's own
    descriptions and of those of others. With `judgements` it gives `rates` again."""
    meta: dict[str, Any]
    """Judge, source of descriptions, and settings."""

    def save(self, folder: str | Path) -> Path:
        """Writes the tables as parquet and `meta.json` to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            getattr(self, name).to_parquet(folder / f"{name}.parquet", index=False)
        (folder / "meta.json").write_text(json.dumps(self.meta, indent=1))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> MatchResult:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: Names the files that are not there.
        """
        folder = Path(folder)
        files = [*(folder / f"{name}.parquet" for name in TABLES), folder / "meta.json"]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"no whole match result in {folder}: {', '.join(missing)} missing; "
                "expected a folder written by MatchResult.save"
            )
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES}
        return cls(**tables, meta=json.loads((folder / "meta.json").read_text()))


def show(estimate: Estimate) -> None:
    """Says on the standard error what is about to be asked, if it costs anything."""
    if estimate.n_requests:
        sys.stderr.write(f"{estimate}\n")


def match_rate(
    chosen: pd.DataFrame,
    descriptions: Describes,
    judge: Judge,
    examples: Iterable,
    *,
    k: int = 3,
    permutations: int = 1000,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    chance_pairs: int | None = None,
    ties: str = "conservative",
    before: Callable[[Estimate], object] = show,
) -> MatchResult:
    """Asks the judge about each picture's features, and about those of others.

    Args:
        chosen: Rows of a result's `top_features`, chosen already.
        descriptions: What features mean: anything with a `name` and a method `of`.
        judge: Who says whether a description describes a picture.
        examples: Those of the run, in its order.
        k: Features of a picture that are judged, those of the best ranks. One without
            description is one of them, counted and not made up for.
        permutations: Random exchanges of pictures, behind p-values.
        replicates: Redrawings of pictures, behind the bounds of `rate`.
        seed: Of all that is random. The same seed asks the same questions.
        level: Confidence of all bounds.
        chance_pairs: How many other pictures, at least, each picture's descriptions are
            judged on. If None, all of them where the judge costs nothing, else 4; the
            number of examples means all.
        ties: "conservative": an exchange that reaches the same rate counts as one that
            exceeds it, so that p-values may be too large, never too small. "random":
            it counts by chance, so that they are uniform if nothing is to be found.
        before: Called with what asking will take, before the first question; what it
            raises stops all.

    Raises:
        ValueError: The table is not of these examples, or a setting is out of range.
    """
    counting = Counting(permutations, replicates, seed, level, ties)
    pairs = CHANCE_PAIRS if chance_pairs is None and not judge.free else chance_pairs
    planned = plan(chosen, descriptions, examples, k=k, chance_pairs=pairs, seed=seed)
    answers = _asked(planned, judge, before)
    judgements = planned.judgements.merge(
        answers, on=["image", "description"], how="left", validate="many_to_one"
    )
    return MatchResult(
        rates=rates(judgements, answers, counting),
        judgements=judgements,
        answers=answers,
        meta={
            "judge": judge.settings(),
            "descriptions": descriptions.name,
            "settings": {"k": k, "chance_pairs": pairs, **asdict(counting)},
            "n_images": len(planned.images),
            "n_questions": len(answers),
            "n_unanswered": int(answers["verdict"].isna().sum()),
        },
    )


def _asked(
    planned: Plan, judge: Judge, before: Callable[[Estimate], object]
) -> pd.DataFrame:
    """The table of all answers."""
    n = len(planned.pairs)
    if judge.free:
        # An estimate would hold all questions at once, and they may be millions.
        before(Estimate(n_questions=n))
        starts, step = range(0, n, _AT_ONCE), _AT_ONCE
    else:
        before(judge.estimate(planned.examples, planned.questions()))
        starts, step = range(0, min(n, 1)), n
    verdicts: list[bool | None] = []
    for start in starts:
        some = planned.questions(start, start + step)
        said = judge.ask(planned.examples, some)
        if len(said) != len(some):
            raise ValueError(
                f"the judge {judge.name} gave {len(said)} answers to {len(some)} "
                "questions; expected one each, None where it has none"
            )
        verdicts.extend(said)
    image, description = planned.indices()
    words = np.array(planned.descriptions, dtype=object)
    return pd.DataFrame(
        {
            "image": planned.images[image],
            "description": pd.array(words[description], dtype="str"),
            "verdict": pd.array(verdicts, dtype="boolean"),
        }
    )
