"""Every scored vector of a report by itself: its scores, how far it is from the training vectors, where it lies.

The table shows arms; this shows what they are made of. Which vectors a score artifact is of stands in its own
configuration, so nothing is computed again but distances and the map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from cpdiff_core.artifacts import Artifact, read_json
from cpdiff_core.domains.blocks import adapter_layout
from cpdiff_core.evaluation.arms import TaskArms
from cpdiff_core.evaluation.audit import REGRESSION_THRESHOLD
from cpdiff_core.evaluation.geometry import embed
from cpdiff_core.evaluation.scores import SCORE_FILE, load_predictions
from cpdiff_core.evaluation.trivial import TRIVIAL_FAMILIES
from cpdiff_core.experiment_config import ExperimentConfig
from cpdiff_core.lora.layout import ParameterLayout
from cpdiff_core.lora.vectors import evenly_spaced, leave_one_out_min_l2_product, min_l2_product, soup
from cpdiff_core.lora.zoo import TaskHarvests, VectorSet, Zoo
from cpdiff_core.reports.inputs import ReportInputs, SeedInputs

CANDIDATE, CHECKPOINT, LAST, SOUP, NO_LORA = "candidate", "checkpoint", "last checkpoint", "model soup", "no-LoRA"
MAPPED = 99
"""Training vectors on a map, at most; `embed` takes 100, the soup among them."""
_CANDIDATE_STAGES = ("generate_candidates", "fill_blocks")


@dataclass(frozen=True)
class Vector:
    """One vector. series: what it is; row: its number there, from 0.

    selection, report: its score on either split, in points, higher is better (styles: a distance, lower is better).
    distance: to the nearest training vector, itself excepted; relative: over the training vectors' own median.
    disagreement: share of examples on which it differs from another candidate, mean over those.
    place: on the map of the first seed.
    """

    task: str
    seed: int
    series: str
    row: int
    selection: float | None = None
    report: float | None = None
    distance: float | None = None
    relative: float | None = None
    disagreement: float | None = None
    place: tuple[float, float] | None = None
    chosen: bool = False


@dataclass
class TaskVectors:
    """All vectors of one task, every seed. unit: the length that `relative` counts in, of each seed.

    compared_on: the examples behind `disagreement`; map_of: (series, place) of what is on the map and not scored.
    """

    task: str
    metric: str
    vectors: list[Vector] = field(default_factory=list)
    units: dict[int, float] = field(default_factory=dict)
    compared_on: str = ""
    map_of: list[tuple[str, tuple[float, float]]] = field(default_factory=list)

    @property
    def candidates(self) -> list[Vector]:
        return [vector for vector in self.vectors if vector.series == CANDIDATE]


def collect_vectors(config: ExperimentConfig, inputs: ReportInputs, root: Path) -> dict[str, TaskVectors]:
    """task -> its vectors."""
    found = {entry.task.name: TaskVectors(entry.task.name, entry.task.task.primary_metric) for entry in inputs.seeds[0].arms}
    layout = adapter_layout(inputs.base, config.lora)
    for number, seed in enumerate(inputs.seeds):
        for entry in seed.arms:
            one = _TaskOfSeed(config, seed, entry, layout, root)
            one.add_to(found[entry.task.name], with_map=number == 0)
    return found


class _TaskOfSeed:
    """The vectors of one task of one seed, put together from its score artifacts."""

    def __init__(
        self, config: ExperimentConfig, seed: SeedInputs, entry: TaskArms, layout: ParameterLayout, root: Path
    ) -> None:
        self.config, self.seed, self.entry, self.root = config, seed, entry, root
        self.factors = layout.factors
        self.task = entry.task.task
        self.w_NK = training_of(seed.zoo, self.task.name, root)
        self.rows: dict[tuple[str, int], Vector] = {}
        self.w_K: dict[tuple[str, int], torch.Tensor] = {}
        self.compared: tuple[np.ndarray, str] | None = None

    def add_to(self, found: TaskVectors, with_map: bool) -> None:
        for artifact in self._scored():
            self._read(artifact)
        unit = self._measure()
        if with_map:
            found.map_of = self._map()
        self._mark()
        if self.compared is not None:
            disagreement, found.compared_on = mean_disagreement(self.compared[0], self.task.labels is None), self.compared[1]
            for row, value in enumerate(disagreement):
                if (CANDIDATE, row) in self.rows:
                    self._set((CANDIDATE, row), disagreement=value)
        found.units[self.seed.seed] = unit
        found.vectors += self.rows.values()

    def _scored(self) -> list[Artifact]:
        """The score artifacts behind the table, in its order, each once; then those that chose."""
        audit = self.entry.audit
        arms = [*self.entry.arms, *(audit.trivial_arms if audit is not None else ())]
        chose = [artifact for artifact in self.entry.used if artifact.stage == "score_selection"]
        return [*dict.fromkeys(arm.scores for arm in arms if arm.scores.stage == "score_report"), *chose]

    def _read(self, artifact: Artifact) -> None:
        folder = artifact.under(self.root)
        vectors = VectorSet.model_validate(read_json(folder, "config.json")["inputs"]["vectors"])
        split = "report" if artifact.stage == "score_report" else "selection"
        scores = read_json(folder, SCORE_FILE)["scores"][self.task.primary_metric]
        keys = self._keys(vectors, len(scores))
        w_VK = vectors.load(self.root, self.w_NK.shape[1])
        for key, score, w_K in zip(keys, scores, w_VK, strict=True):
            self.rows.setdefault(key, Vector(self.task.name, self.seed.seed, *key))
            self._set(key, **{split: score})
            self.w_K[key] = w_K
        whole = self.config.sampling.num_candidates
        if keys[0][0] == CANDIDATE and len(keys) == whole and (split == "report" or self.compared is None):
            predicted, labels = load_predictions(folder, self.task)
            examples = "validation examples" if split == "report" else "examples to choose on"
            self.compared = (predicted, f"{len(labels)} {examples}")

    def _keys(self, vectors: VectorSet, num: int) -> list[tuple[str, int]]:
        """(series, row) of each of `num` vectors of a set."""
        if vectors.kind in ("zeros", "soup"):
            return [(NO_LORA if vectors.kind == "zeros" else SOUP, 0)]
        rows = vectors.rows if vectors.rows is not None else tuple(range(num))
        if vectors.kind == "checkpoints":
            each = self.seed.zoo.num_checkpoints
            return [(LAST if row % each == each - 1 else CHECKPOINT, row) for row in rows]
        (source,) = vectors.sources
        if source.stage in _CANDIDATE_STAGES:
            return [(CANDIDATE, row) for row in rows]
        audit = self.entry.audit
        if audit is not None and source == audit.trivial:
            each, families = num // len(TRIVIAL_FAMILIES), list(TRIVIAL_FAMILIES)
            return [(families[row // each], row % each) for row in rows]
        # A pass trains the vectors of all tasks on: only this task's are in its set.
        name = next(arm.name for arm in self.entry.arms if self._is_of(arm.scores, vectors))
        return [(name, row) for row in range(num)]

    def _is_of(self, scores: Artifact, vectors: VectorSet) -> bool:
        value = read_json(scores.under(self.root), "config.json")["inputs"].get("vectors")
        return value is not None and VectorSet.model_validate(value) == vectors

    def _measure(self) -> float:
        """Distances on dW to the nearest training vector, and the training vectors' own median, which is returned."""
        novelty = None
        if self.entry.audit is not None:
            novelty = read_json(self.entry.audit.audit.under(self.root), "audit.json")["novelty"]
            training = torch.tensor(novelty["product"]["training"], dtype=torch.float64)
            unit = float(novelty["copy_distance"])
        else:
            training = self._training_distances()
            unit = float(training.median()) if len(training) else self._copy_of_one()
        others = [key for key in self.rows if key[0] not in (CHECKPOINT, LAST)]
        if others:
            w_VK = torch.stack([self.w_K[key] for key in others])
            distances = min_l2_product(w_VK, self.w_NK, self.factors, self.config.lora.scaling).tolist()
            for key, distance in zip(others, distances, strict=True):
                self._set(key, distance=distance, relative=distance / unit if unit else None)
        for key in self.rows.keys() - set(others):
            if len(training):
                distance = float(training[key[1]])
                self._set(key, distance=distance, relative=distance / unit if unit else None)
        return unit

    def _training_distances(self) -> torch.Tensor:
        if len(self.w_NK) == 1:
            return torch.empty(0, dtype=torch.float64)
        return leave_one_out_min_l2_product(self.w_NK, self.factors, self.config.lora.scaling)

    def _copy_of_one(self) -> float:
        """As `audit.novelty`: of a single training vector, 1 % of its norm."""
        zero = torch.zeros_like(self.w_NK)
        return 0.01 * float(min_l2_product(zero, self.w_NK, self.factors, self.config.lora.scaling))

    def _map(self) -> list[tuple[str, tuple[float, float]]]:
        """t-SNE of candidates, checkpoints and soup. Places of scored vectors go to them, the others are returned."""
        candidates = [key for key in self.rows if key[0] == CANDIDATE]
        scored = {key[1]: key for key in self.rows if key[0] in (CHECKPOINT, LAST)}
        if len(candidates) + len(self.w_NK) < 4 or not candidates:
            return []
        spread = evenly_spaced(len(self.w_NK), min(len(self.w_NK), MAPPED))
        rows = sorted({*scored, *spread}) if len({*scored, *spread}) <= MAPPED else list(spread)
        w_MK = torch.stack([self.w_K[key] for key in candidates])
        places, candidate_places, soup_place = embed_task(self.w_NK, rows, w_MK, self.config.seed)
        for key, place in zip(candidates, candidate_places, strict=True):
            self._set(key, place=place)
        rest = []
        for row, place in zip(rows, places, strict=True):
            if row in scored:
                self._set(scored[row], place=place)
            else:
                rest.append((CHECKPOINT, place))
        if (SOUP, 0) in self.rows:
            self._set((SOUP, 0), place=soup_place)
        else:
            rest.append((SOUP, soup_place))
        return rest

    def _mark(self) -> None:
        """Which candidate was chosen: the row of the arm *generated*."""
        arm = next((arm for arm in self.entry.arms if arm.name == "generated"), None)
        if arm is not None:
            vectors = VectorSet.model_validate(read_json(arm.scores.under(self.root), "config.json")["inputs"]["vectors"])
            (row,) = arm.rows
            self._set((CANDIDATE, vectors.rows[row] if vectors.rows is not None else row), chosen=True)

    def _set(self, key: tuple[str, int], **values: object) -> None:
        self.rows[key] = replace(self.rows[key], **values)  # type: ignore[arg-type]


def training_of(zoo: Zoo, task: str, root: Path) -> torch.Tensor:
    """The training vectors of one task, w_NK."""
    entry: TaskHarvests = next(entry for entry in zoo.tasks if entry.task == task)
    return Zoo(tasks=(entry,), num_checkpoints=zoo.num_checkpoints).load(root)[task]


Places = list[tuple[float, float]]


def embed_task(
    w_NK: torch.Tensor, rows: Sequence[int], w_MK: torch.Tensor, seed: int
) -> tuple[Places, Places, tuple[float, float]]:
    """t-SNE of at most 99 training vectors, `rows` of w_NK, of all candidates and of the soup of w_NK: places of each."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # more are no faster for so few points, and wait for each other on a busy machine
        plane = embed({"": torch.cat([w_NK[list(rows)], soup(w_NK)])}, {"": w_MK}, seed)

    def places(x: ArrayLike) -> Places:
        return [(round(float(a), 3), round(float(b), 3)) for a, b in np.asarray(x)]

    return places(plane["/training"][:-1]), places(plane["/generated"]), places(plane["/training"])[-1]


def mean_disagreement(predictions: ArrayLike, regression: bool) -> list[float | None]:
    """Of each of M prediction vectors [M, n]: the share of examples on which it differs from another one, mean over
    the others. Regression: by more than 0.5, as in the audit."""
    predicted_Mn = np.atleast_2d(predictions)
    if len(predicted_Mn) < 2:
        return [None] * len(predicted_Mn)
    a, b = predicted_Mn[:, None], predicted_Mn[None]
    differ_MM = (np.abs(a - b) > REGRESSION_THRESHOLD if regression else a != b).mean(-1)
    np.fill_diagonal(differ_MM, 0.0)  # a prediction that is not a number differs from itself
    return [float(value) for value in differ_MM.sum(1) / (len(predicted_Mn) - 1)]


def candidates_frame(found: Iterable[TaskVectors]) -> pd.DataFrame:
    """Every candidate: task, seed, number, scores in points, distance, the same over the training vectors' median,
    disagreement in percent, whether it was chosen."""
    rows: Sequence[dict[str, object]] = [
        {
            "task": one.task, "seed": vector.seed, "candidate": vector.row, "selection": vector.selection,
            "report": vector.report, "distance": vector.distance, "relative_distance": vector.relative,
            "disagreement_percent": None if vector.disagreement is None else 100 * vector.disagreement,
            "chosen": vector.chosen,
        }
        for one in found
        for vector in one.candidates
    ]  # fmt: skip
    return pd.DataFrame(rows)
