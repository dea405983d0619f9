"""The part of a page in which every vector can be looked at: what its table prints and what its plots draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cpdiff_core.evaluation.trivial import TRIVIAL_FAMILIES
from cpdiff_core.reports.vectors import CANDIDATE, CHECKPOINT, LAST, NO_LORA, SOUP, TaskVectors


@dataclass(frozen=True)
class Series:
    """How one kind of vector is drawn. colour: a number of page.css; off: not shown at first; many: its vectors are told
    apart by their numbers."""

    name: str
    shape: str
    colour: int
    hollow: bool = False
    size: float = 1.0
    off: bool = False
    many: bool = True

    @property
    def candidate(self) -> bool:
        return self.name == CANDIDATE


_SHAPES = ("square", "triangle", "diamond", "down", "hexagon", "plus")
SERIES: tuple[Series, ...] = (
    Series(CANDIDATE, "star", 0, size=1.25),
    Series(CHECKPOINT, "circle", 1, hollow=True, size=0.85),
    Series(LAST, "circle", 1),
    Series(SOUP, "cross", 2, size=1.15, many=False),
    Series(NO_LORA, "square", 2, off=True, many=False),
    *(Series(name, shape, 3 + i, size=0.9) for i, (name, shape) in enumerate(zip(TRIVIAL_FAMILIES, _SHAPES, strict=True))),
    Series("annealed", "triangle", 2, hollow=True),
    Series("soup fine-tuned", "diamond", 2, hollow=True, many=False),
)


@dataclass(frozen=True)
class Reading:
    """How the numbers of one page are called. splits: key in `Vector` -> name, in the order of the columns; ylabels: of
    the plot, where they do not follow from metric and split."""

    splits: Mapping[str, str]
    columns: Mapping[str, str]
    decimals: Mapping[str, int]
    xlabel: str
    distance_name: str
    note: str
    ylabels: Mapping[str, str] = field(default_factory=dict)
    good: Literal["high", "low"] = "high"

    def ylabel(self, split: str, metric: str) -> str:
        return self.ylabels.get(split) or f"{metric.replace('_', ' ')} on {self.splits[split]}, points"


@dataclass(frozen=True)
class Explorer:
    """What the template and the script take."""

    splits: dict[str, str]
    columns: dict[str, str]
    decimals: dict[str, int]
    first_split: str
    seeds: list[int]
    series: list[dict[str, Any]]
    vectors: list[dict[str, Any]]
    map: dict[str, list[tuple[int, tuple[float, float]]]]
    ylabels: dict[str, dict[str, str]]
    xlabel: str
    distance_name: str
    disagreement: str
    reading: str
    good: str
    note: str = "Choose a row: with JavaScript it is shown in the plots too."

    @property
    def has_map(self) -> bool:
        return any(self.map.values()) or any(vector["place"] for vector in self.vectors)

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """Rows of the table, each with `id`, its number among `vectors`."""
        return [
            vector | {"id": number}
            for number, vector in enumerate(self.vectors)
            if self.series[vector["series"]]["name"] == CANDIDATE
        ]

    def data(self) -> dict[str, Any]:
        """What the script reads."""
        names = ("splits", "columns", "decimals", "seeds", "series", "vectors", "map", "ylabels", "xlabel")
        return {name: getattr(self, name) for name in names}


def explorer(found: Sequence[TaskVectors], reading: Reading) -> Explorer | None:
    """None if there is no candidate to look at."""
    every = [vector for one in found for vector in one.vectors]
    if not any(one.candidates for one in found):
        return None
    number = {series.name: i for i, series in enumerate(SERIES)}
    splits = {key: name for key, name in reading.splits.items() if any(getattr(v, key) is not None for v in every)}
    scored = {key: sum(getattr(v, key) is not None for one in found for v in one.candidates) for key in splits}
    compared = list(dict.fromkeys(one.compared_on for one in found if one.compared_on))
    return Explorer(
        splits=splits, columns=dict(reading.columns), decimals=dict(reading.decimals),
        first_split=max(splits, key=lambda key: (scored[key], key == "report")),
        seeds=list(dict.fromkeys(vector.seed for vector in every)),
        series=[asdict(series) | {"candidate": series.candidate} for series in SERIES],
        vectors=[asdict(vector) | {"series": number[vector.series]} for vector in every],
        map={one.task: [(number[series], place) for series, place in one.map_of] for one in found},
        ylabels={one.task: {key: reading.ylabel(key, one.metric) for key in splits} for one in found},
        xlabel=reading.xlabel, distance_name=reading.distance_name,
        disagreement=f"share of {compared[0] if len(compared) == 1 else 'the examples of its task'}" if compared else "",
        reading=reading.note, good=reading.good,
    )  # fmt: skip
