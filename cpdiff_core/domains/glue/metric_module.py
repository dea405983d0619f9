"""The GLUE metrics as a metric of the `evaluate` library, defined here because the library fetches its own from a hub.

`evaluate` checks and stores the inputs; the arithmetic is `metrics.metric`. Nothing is written outside a temporary
folder and nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import datasets
import evaluate

from cpdiff_core.domains.glue.metrics import Floats, MetricName, metric


class GlueMetrics(evaluate.Metric):
    """All metrics that one task reports, in points. `config_name` is their names, comma-separated."""

    def __init__(self, task_metrics: Sequence[MetricName], cache_dir: str) -> None:
        self.task_metrics = tuple(task_metrics)
        # A fixed seed: evaluate would otherwise take one from numpy's global state; nothing here draws anything.
        super().__init__(config_name=",".join(task_metrics), keep_in_memory=True, cache_dir=cache_dir, seed=0)

    @classmethod
    def of(cls, task_metrics: tuple[MetricName, ...]) -> GlueMetrics:
        """A module whose folder is temporary: evaluate makes one even when it keeps everything in memory."""
        with tempfile.TemporaryDirectory(prefix="cpdiff-metrics-") as folder:
            return cls(task_metrics, folder)

    def _info(self) -> evaluate.MetricInfo:
        # Class numbers are floats too, so that a vector whose logits are not finite can be marked by NaN.
        rows = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="The metrics of one GLUE task, in points (100 times the usual value).",
            citation="Wang et al., GLUE, ICLR 2019.",
            inputs_description="predictions and references: one row of class numbers or of values per scored vector.",
            features=datasets.Features({"predictions": rows, "references": rows}),
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[MetricName, Floats]:
        names: tuple[MetricName, ...] = self.task_metrics
        if len(names) > 1:
            names = (*names, "combined_score")
        return {name: metric(name, predictions, references, self.task_metrics) for name in names}
