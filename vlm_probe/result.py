"""What a probe found: tables, and where they came from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_probe.tokens import CONDITIONS, GROUPS, METRICS, check_names

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from vlm_probe.analysis.judges import Judge
    from vlm_probe.analysis.match import MatchResult
    from vlm_probe.analysis.pairing import Describes
    from vlm_probe.analysis.selection import Frequency

TABLES = ("layers", "features", "top_features", "failures")


@dataclass(frozen=True)
class ProbeResult:
    """Tables of a probe, tidy: one row a case, one column a variable.

    What was not measured is a missing row, never a zero.
    """

    layers: pd.DataFrame
    """One row per layer, group and condition: `n_tokens`, `n_images`, and each metric
    with its 95 % bounds (`fvu`, `fvu_low`, `fvu_high`, ...)."""
    features: pd.DataFrame
    """One row per layer, group, condition and feature that fired: `n_tokens` and
    `n_images` it fired in, `rate` (share of the group's tokens), `mean` of its value
    where it fired, `max`; `reference_rate`, its rate on texts and pictures that are
    the same for all groups (missing unless a ranking by selectivity was asked)."""
    top_features: pd.DataFrame
    """The strongest features of each image, per layer, group and condition: `by` which
    ranking, `rank` in it from 1, `feature`, `value`, the `score` of the ranking, and
    the place: `position` in the prompt, `token` (the word there; missing for image
    vectors) and `patch_row`, `patch_column` (missing for words). `left`, `top`,
    `right`, `bottom` are the patch's box in the row's own picture as a person sees it,
    in pixels (missing for words, and where `meta["patch_boxes"]` says why)."""
    failures: pd.DataFrame
    """Images that could not be read: their index, id and `error`."""
    meta: dict[str, Any]
    """Versions, model and SAE identities with digests, settings and counts;
    `partial` says how far the run came if it was stopped."""
    timing: dict[str, Any] = field(default_factory=dict)
    """When the run `started`, the `seconds` it took since it was last started, and
    those of its `stages`. Not of what was found: no two runs take the same."""

    @property
    def partial(self) -> bool:
        """Whether the run was stopped before it had seen all images."""
        return bool(self.meta.get("partial"))

    def table(
        self,
        metrics: Sequence[str] = ("mse", "fvu", "cosine", "l0"),
        *,
        groups: Sequence[str] = GROUPS,
        conditions: Sequence[str] = CONDITIONS,
    ) -> pd.DataFrame:
        """Rows of `layers` for some metrics, without bounds, in reading order.

        Raises:
            ValueError: An unknown metric, group or condition; lists the valid ones.
        """
        check_names("metric", metrics, tuple(METRICS))
        check_names("group", groups, GROUPS)
        check_names("condition", conditions, CONDITIONS)
        chosen = self.layers
        chosen = chosen[chosen.group.isin(groups) & chosen.condition.isin(conditions)]
        return chosen[
            ["layer", "group", "condition", "n_tokens", *metrics]
        ].reset_index(drop=True)

    def beside(self, metrics: Sequence[str] = ("fvu", "cosine", "l0")) -> pd.DataFrame:
        """The model's numbers beside those of its control arms.

        Returns:
            Rows by group and layer; columns by metric, then condition.
        """
        check_names("metric", metrics, tuple(METRICS))
        measured = [c for c in CONDITIONS if c in set(self.layers.condition)]
        wide = self.layers.pivot(
            index=["group", "layer"], columns="condition", values=list(metrics)
        )
        wide = wide.reindex(columns=pd.MultiIndex.from_product([metrics, measured]))
        return wide.reindex([g for g in GROUPS if g in wide.index], level="group")

    def plot(
        self,
        metrics: Sequence[str] = ("fvu", "cosine", "l0"),
        *,
        groups: Sequence[str] | None = None,
        conditions: Sequence[str] | None = None,
        log: Sequence[str] | None = None,
    ) -> Figure:
        """Curves over layers; see `vlm_probe.plots.layer_curves`."""
        from vlm_probe.plots import layer_curves

        return layer_curves(
            self, metrics, groups=groups, conditions=conditions, log=log
        )

    def report(self, path: str | Path) -> Path:
        """One offline HTML page with curves and tables; gives back its path."""
        from vlm_probe.report import write_report

        return write_report(self, path)

    def best_features(
        self,
        *,
        by: str = "activation",
        k: int = 3,
        layer: int | None = None,
        group: str | None = None,
        image: int | str | None = None,
        condition: str = "model",
        **changes: object,
    ) -> pd.DataFrame:
        """The strongest features that do not fire too often.

        See `vlm_probe.analysis.selection.best_features`, where all options are.
        """
        from vlm_probe.analysis.selection import best_features

        return best_features(
            self,
            by=by,
            k=k,
            layer=layer,
            group=group,
            image=image,
            condition=condition,
            **changes,
        )

    def match(
        self,
        examples: Iterable,
        descriptions: Describes,
        judge: Judge,
        *,
        by: str = "activation",
        k: int = 3,
        layer: int | None = None,
        group: str | None = None,
        condition: str = "model",
        frequency: Frequency | None = None,
        density: Mapping[int, Mapping[int, float]] | None = None,
        **options: object,
    ) -> MatchResult:
        """How often the best features' descriptions describe their pictures.

        The features are those of `best_features`, which the first options choose; see
        `vlm_probe.analysis.match.match_rate`, where all others are, and chance levels.
        """
        from vlm_probe.analysis.match import match_rate

        chosen = self.best_features(
            by=by,
            k=k,
            layer=layer,
            group=group,
            condition=condition,
            frequency=frequency,
            density=density,
        )
        return match_rate(chosen, descriptions, judge, examples, k=k, **options)

    def shared_features(self, **options: object) -> pd.DataFrame:
        """How much an image's features are its caption's, layer by layer.

        See `vlm_probe.analysis.shared.shared_features`, where all options are.
        """
        from vlm_probe.analysis.shared import shared_features

        return shared_features(self, **options)

    def save(self, folder: str | Path) -> Path:
        """Writes the tables as parquet, `meta.json` and `timing.json` to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            getattr(self, name).to_parquet(folder / f"{name}.parquet", index=False)
        for name in ("meta", "timing"):
            (folder / f"{name}.json").write_text(
                json.dumps(getattr(self, name), indent=1)
            )
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> ProbeResult:
        """Reads what `save` wrote, and what it wrote before tables had all columns.

        Raises:
            FileNotFoundError: Names the files that are not there.
        """
        folder = Path(folder)
        files = [*(folder / f"{name}.parquet" for name in TABLES), folder / "meta.json"]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"no whole result in {folder}: {', '.join(missing)} missing; expected "
                "a folder written by ProbeResult.save"
            )
        tables = {n: pd.read_parquet(folder / f"{n}.parquet") for n in TABLES}
        _complete(tables)
        timing = folder / "timing.json"
        return cls(
            **tables,
            meta=json.loads((folder / "meta.json").read_text()),
            timing=json.loads(timing.read_text()) if timing.is_file() else {},
        )


def _complete(tables: dict[str, pd.DataFrame]) -> None:
    """Gives tables of an older version the columns that came later."""
    top, features = tables["top_features"], tables["features"]
    if "by" not in top:
        # There was one ranking; where patches lie was not written down.
        top.insert(
            top.columns.get_loc("rank"),
            "by",
            pd.array(["activation"] * len(top), dtype="str"),
        )
        top.insert(top.columns.get_loc("value") + 1, "score", top["value"])
        top[["left", "top", "right", "bottom"]] = math.nan
    if "reference_rate" not in features:
        features["reference_rate"] = math.nan
