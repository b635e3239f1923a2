"""Neuronpedia's exports on disk.

Read are `v1/{model}/{source}/explanations/batch-*.jsonl.gz`, and the folders beside it
such as `explanations-gpt-4o-mini`, each by another explainer; and the older JSON files:
those of 128 features each in a folder `{source}`, and all explanations of a source in
`explanations-only/{model}_{source}.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_probe.analysis.descriptions.index import (
    DescriptionIndex,
    Indexed,
    index_beside,
)
from vlm_probe.analysis.descriptions.interface import (
    Descriptions,
    SaeIdentity,
    Saes,
    check_features,
    identities,
)
from vlm_probe.analysis.descriptions.sources import Source, known_source

_OTHER_PARTS = ("features", "activations", "config")
"""Folders of an export that hold no explanations."""


@dataclass(frozen=True)
class ExportReport:
    """What an export has for the SAEs it was opened for, counted over layers."""

    n_features: int
    """Features of the SAEs whose layers have a source."""
    n_described: int
    """Of these, how many have a description."""
    n_missing: int
    """Of these, how many have none."""
    n_duplicates: int
    """Explanations that repeat feature and explainer of an earlier one."""
    n_contradictions: int
    """Of these, how many say something else."""
    sources: dict[int, str]
    """Name of the source of each layer."""
    missing_layers: tuple[int, ...]
    """Layers with an SAE and without a source."""
    unconfirmed: tuple[str, ...]
    """Sources taken because model, layer, place and width agree: the SAE does not say
    its Neuronpedia id, and sets that differ in sparsity alone cannot be told apart."""
    not_read: tuple[str, ...]
    """JSON files in the folder that are no export of Neuronpedia."""


class NeuronpediaExport(Descriptions):
    """Descriptions from a folder that was downloaded from Neuronpedia."""

    def __init__(
        self, folder: str | Path, saes: Saes, *, index: str | Path | None = None
    ) -> None:
        """Finds the source of each SAE, and indexes those that are not yet.

        Args:
            folder: With one or many sources anywhere in it; or one file of an export.
            saes: The SAEs that are to be described, by layer.
            index: Where the index of this export is kept; if not given, in the folder,
                or among the caches if the folder cannot be written.

        Raises:
            FileNotFoundError: There is no such folder, or no export in it.
            ValueError: A source is of another model, layer, place or width than the
                SAE, it is not clear which one is meant, or a file is damaged.
        """
        folder = Path(folder)
        if not folder.exists():
            raise FileNotFoundError(f"no export at {folder}: there is no such folder")
        root = folder if folder.is_dir() else folder.parent
        self._saes = identities(saes)
        self._index = DescriptionIndex(
            Path(index) if index is not None else index_beside(root), root
        )
        self.name = f"Neuronpedia export {folder.name or folder}"
        found, not_read = self._look_into(folder)
        if not found:
            raise FileNotFoundError(
                f"no export of Neuronpedia in {folder}: expected "
                "v1/{model}/{source}/explanations/batch-*.jsonl.gz, or JSON files of "
                "features or explanations"
            )
        self._sources = _matched(folder, list(found), self._saes)
        indexed = {
            layer: self._index.take(source, found[source])
            for layer, source in self._sources.items()
        }
        for layer, counts in indexed.items():
            sae, source = self._saes[layer], self._sources[layer]
            if counts.highest >= sae.n_features:
                raise ValueError(
                    f"{_wrong(folder, source, sae)}: it names feature "
                    f"{counts.highest}, the SAE has {sae.n_features} features"
                )
        self.report = self._reported(indexed, not_read)

    def of(self, layer: int, features: Sequence[int]) -> dict[int, str | None]:
        """See `Descriptions.of`."""
        if layer not in self._sources:
            return dict.fromkeys(int(f) for f in features)
        asked = check_features(layer, features, self._saes[layer].n_features)
        found = self._index.of(self._sources[layer], asked)
        return {feature: found.get(feature) for feature in asked}

    def layers(self) -> tuple[int, ...]:
        """The layers that have a source."""
        return tuple(self._sources)

    def described(self, layer: int) -> tuple[int, ...]:
        """See `Descriptions.described`."""
        source = self._sources.get(layer)
        return () if source is None else self._index.described(source)

    def _look_into(
        self, folder: Path
    ) -> tuple[dict[Source, list[Path]], tuple[str, ...]]:
        """The files of each source, and those that are of none."""
        found: dict[Source, list[Path]] = {}
        not_read: list[str] = []
        for group in _groups(folder):
            # A batch may be empty; all that is in a group is of one source.
            told = (self._index.source_of(file) for file in group)
            source = next((each for each in told if each is not None), None)
            if source is None:
                not_read += [str(file) for file in group]
                continue
            same = next((known for known in found if known.same_as(source)), source)
            found.setdefault(same, []).extend(group)
        return found, tuple(not_read)

    def _reported(
        self, indexed: Mapping[int, Indexed], not_read: tuple[str, ...]
    ) -> ExportReport:
        n_features = sum(self._saes[layer].n_features for layer in indexed)
        n_described = sum(counts.n_described for counts in indexed.values())
        return ExportReport(
            n_features=n_features,
            n_described=n_described,
            n_missing=n_features - n_described,
            n_duplicates=sum(c.n_duplicates for c in indexed.values()),
            n_contradictions=sum(c.n_contradictions for c in indexed.values()),
            sources={layer: str(s) for layer, s in self._sources.items()},
            missing_layers=tuple(n for n in self._saes if n not in indexed),
            unconfirmed=tuple(
                str(source)
                for layer, source in self._sources.items()
                if known_source(self._saes[layer]) is None
            ),
            not_read=not_read,
        )


def _matched(
    folder: Path, found: Sequence[Source], saes: Mapping[int, SaeIdentity]
) -> dict[int, Source]:
    """The source of each SAE that has one.

    A layer without any source has no descriptions. One whose sources are all of other
    SAEs is refused: whoever gives them takes them for those of this SAE.
    """
    matched: dict[int, Source] = {}
    for layer, sae in saes.items():
        fitting = [source for source in found if not source.differences(sae)]
        if len(fitting) > 1:
            names = ", ".join(str(source) for source in sorted(fitting))
            raise ValueError(
                f"{folder} has {len(fitting)} sources that may be of the SAE of layer "
                f"{layer}: {names}; give the folder of one of them"
            )
        if fitting:
            matched[layer] = fitting[0]
            continue
        for source in found:
            if source.layer in (None, layer):
                told = "; ".join(source.differences(sae))
                raise ValueError(f"{_wrong(folder, source, sae)}: {told}")
    if not matched:
        source, sae = found[0], next(iter(saes.values()))
        told = "; ".join(source.differences(sae))
        raise ValueError(f"{_wrong(folder, source, sae)}: {told}")
    return matched


def _wrong(folder: Path, source: Source, sae: SaeIdentity) -> str:
    name = sae.neuronpedia_id or f"{sae.model_name or 'unknown model'}, no id"
    return (
        f"source {source} in {folder} does not describe the SAE of layer {sae.layer} "
        f"({name})"
    )


def _groups(folder: Path) -> Iterator[list[Path]]:
    """Files that may be of an export; those that must be of one source together."""
    if folder.is_file():
        yield [folder]
        return
    groups: dict[Path, list[Path]] = {}
    for file in sorted(folder.rglob("*.json*"), key=_in_order):
        inside = file.relative_to(folder).parts
        named = re.fullmatch(r"(batch-.*)\.jsonl(\.gz)?|.+\.json(\.gz)?", file.name)
        hidden = any(part.startswith(".") for part in inside)
        home = file.absolute().parent.name
        if not named or hidden or home in _OTHER_PARTS or not file.is_file():
            continue
        together = named[1] is not None or re.match(r"\d+-", home)
        groups.setdefault(file.parent if together else file, []).append(file)
    yield from groups.values()


def _in_order(file: Path) -> list[tuple[int, str]]:
    """A key by which batch-2 comes before batch-10."""
    parts = re.split(r"(\d+)", file.as_posix())
    return [(int(p), "") if p.isdecimal() else (0, p) for p in parts]
