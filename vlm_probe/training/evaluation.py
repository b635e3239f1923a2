"""What the language model says with an adapter's pictures, another's, and none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

ARMS = ("true_image", "shuffled_image", "no_image")
"""What stands in the prompt: the example's picture, the nearest other one before it
(for the first, that of the last), or none at all."""

SURE = 0.05


@dataclass(frozen=True)
class AdapterEvaluation:
    """What the language model says with an adapter's pictures, and without."""

    examples: pd.DataFrame
    """One row per example: `id`, `kind` (of the toy's, else empty), `answer`, and for
    each arm what was said (`true_image`, ...), whether that was right
    (`true_image_right`; missing where there is no answer), and the cross-entropy of the
    caption (`true_image_caption`, in nats a token; missing where there is none)."""
    failures: pd.DataFrame
    """Examples that could not be used: `id` and `error`."""

    def summary(self) -> pd.DataFrame:
        """One row per arm.

        Columns:
            `n_answers`, `accuracy` with its 95 % Wilson bounds, `n_captions`,
            `caption_cross_entropy` (mean, nats a token) with 95 % bounds (Student's t).
        """
        return pd.DataFrame([self._arm(arm) for arm in ARMS])

    def by_kind(self) -> pd.DataFrame:
        """Shares of right answers: a row per kind of question and one of all."""
        answered = self.examples.dropna(subset=["answer"])
        right = pd.DataFrame(
            {arm: answered[f"{arm}_right"].astype(float) for arm in ARMS}
        )
        found = right.groupby(answered.kind).mean()
        found.loc["all"] = right.mean()
        return found

    def p_values(self) -> dict[str, float]:
        """How likely such an advantage over the shuffled image is by chance.

        For `answers` McNemar's exact test on the examples that only one arm got right,
        for `captions` Wilcoxon's signed-rank test on the differences; one-sided. What
        was not measured is left out.
        """
        found = {}
        right = self._both("right")
        if len(right):
            won = int((right.true_image & ~right.shuffled_image).sum())
            lost = int((~right.true_image & right.shuffled_image).sum())
            found["answers"] = (
                float(stats.binomtest(won, won + lost, alternative="greater").pvalue)
                if won + lost
                else 1.0
            )
        nats = self._both("caption")
        if len(nats):
            gained = (nats.shuffled_image - nats.true_image).to_numpy(float)
            found["captions"] = (
                float(stats.wilcoxon(gained, alternative="greater").pvalue)
                if gained.any()
                else 1.0
            )
        return found

    @property
    def verdict(self) -> str:
        """Whether the adapter beats the shuffled image, in words."""
        words = []
        for measure, p in self.p_values().items():
            does = "beats" if p < SURE else "does not beat"
            words.append(f"{does} the shuffled image in {measure} (p = {p:.2g})")
        return f"the adapter {' and '.join(words)}"

    def _both(self, what: str) -> pd.DataFrame:
        names = {f"{arm}_{what}": arm for arm in ARMS[:2]}
        found = self.examples[list(names)].rename(columns=names).dropna()
        return found.astype(bool if what == "right" else float)

    def _arm(self, arm: str) -> dict[str, object]:
        right = self.examples[f"{arm}_right"].dropna().astype(bool)
        nats = self.examples[f"{arm}_caption"].dropna().to_numpy(float)
        row: dict[str, object] = {"arm": arm, "n_answers": len(right)}
        for name in ("accuracy", "accuracy_low", "accuracy_high"):
            row[name] = np.nan
        if len(right):
            hits = stats.binomtest(int(right.sum()), len(right))
            bounds = hits.proportion_ci(method="wilson")
            row |= {
                "accuracy": hits.statistic,
                "accuracy_low": bounds.low,
                "accuracy_high": bounds.high,
            }
        row["n_captions"] = len(nats)
        name = "caption_cross_entropy"
        row |= {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
        if len(nats):
            row[name] = nats.mean()
        if len(nats) > 1:
            half = stats.t.ppf(0.975, len(nats) - 1) * stats.sem(nats)
            row |= {
                f"{name}_low": nats.mean() - half,
                f"{name}_high": nats.mean() + half,
            }
        return row
