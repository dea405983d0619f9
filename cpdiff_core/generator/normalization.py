"""Normalisation of LoRA vectors before the autoencoder (Sec. 3.2, Tab. 4a).

Two choices: over which vectors statistics are taken (`scope`), and over which axis (`axis`). The paper ablates the
scope; its released code uses the coordinate axis. With task + coordinate a zero decodes to the model soup, so the
generator need learn nothing of a task; with task + vector it must produce the weights itself, which is our default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, assert_never

import torch
from pydantic import Field

from cpdiff_core.config import Config, UserError

_ALL = "all"
_Pair = tuple[torch.Tensor, torch.Tensor]
_ROUNDING = torch.finfo(torch.float32).eps


class NormalizationConfig(Config):
    """Which statistics bring the vectors of a task to zero mean and unit variance."""

    scope: Literal["none", "batch", "task"] = Field(
        "task", description="none; batch: one set of statistics over all tasks; task: each task its own (paper)."
    )
    axis: Literal["coordinate", "vector"] = Field(
        "vector",
        description="coordinate: mean and std of every parameter over the checkpoints (released code); "
        "vector: one mean and one std for all parameters (ours: the generator must then produce the weights itself).",
    )


class Normalizer:
    """Affine map between weights and normalised units, one per task (or one for all)."""

    def __init__(self, config: NormalizationConfig, tasks: Sequence[str], statistics: Mapping[str, _Pair]) -> None:
        self.config = config
        self.tasks = tuple(tasks)
        self._statistics = dict(statistics)

    @classmethod
    def fit(cls, config: NormalizationConfig, w_NK_by_task: Mapping[str, torch.Tensor]) -> Normalizer:
        """Take the statistics of harvests (Sec. 3.2).

        w_NK_by_task: task -> its harvest in weights; N may differ between tasks, K may not, N = 1 is allowed.
        A constant coordinate gets std 1: it normalises to 0 and inverts to itself. Raises UserError for no harvest,
        unequal K or values that are not finite.
        """
        if not w_NK_by_task:
            raise UserError("harvests: none given; at least one task is needed to fit a normalisation")
        sizes = {task: w_NK.shape[1] for task, w_NK in w_NK_by_task.items()}
        if len(set(sizes.values())) != 1:
            raise UserError(f"harvests: vectors differ in size between tasks ({sizes}); use one base, rank and blocks")
        for task, w_NK in w_NK_by_task.items():
            if not bool(w_NK.isfinite().all()):
                raise UserError(f"harvest of task {task!r}: holds values that are not finite; lower the learning rate")
        tasks = tuple(w_NK_by_task)
        if config.scope == "none":
            return cls(config, tasks, {_ALL: (torch.zeros(1), torch.ones(1))})
        if config.scope == "batch":
            return cls(config, tasks, {_ALL: _mean_and_std(list(w_NK_by_task.values()), config.axis)})
        if config.scope == "task":
            return cls(config, tasks, {task: _mean_and_std([w_NK], config.axis) for task, w_NK in w_NK_by_task.items()})
        assert_never(config.scope)

    def normalize(self, task: str, w_VK: torch.Tensor) -> torch.Tensor:
        """Weights to normalised units, same shape. Raises UserError for a task without statistics."""
        mean, std = self._of(task, w_VK)
        return (w_VK - mean) / std

    def invert(self, task: str, w_VK: torch.Tensor) -> torch.Tensor:
        """Normalised units back to weights, same shape. Raises as `normalize`."""
        mean, std = self._of(task, w_VK)
        return w_VK * std + mean

    def tensors(self) -> dict[str, torch.Tensor]:
        """The statistics by name (`<task>/mean`, `<task>/std`), for `write_tensors`."""
        return {
            f"{name}/{kind}": tensor
            for name, pair in self._statistics.items()
            for kind, tensor in zip(("mean", "std"), pair, strict=True)
        }

    @classmethod
    def from_tensors(
        cls, config: NormalizationConfig, tasks: Sequence[str], tensors: Mapping[str, torch.Tensor]
    ) -> Normalizer:
        """The inverse of `tensors`."""
        names = tuple(tasks) if config.scope == "task" else (_ALL,)
        return cls(config, tasks, {name: (tensors[f"{name}/mean"], tensors[f"{name}/std"]) for name in names})

    def _of(self, task: str, w_VK: torch.Tensor) -> _Pair:
        name = task if self.config.scope == "task" else _ALL
        if name not in self._statistics:
            raise UserError(f"task {task!r}: has no normalisation statistics; known tasks are {sorted(self.tasks)}")
        mean, std = self._statistics[name]
        if mean.numel() not in (1, w_VK.shape[-1]):
            raise ValueError(
                f"vectors of shape {tuple(w_VK.shape)} do not match statistics of shape {tuple(mean.shape)}: "
                "fit the normalisation on harvests of the same layout"
            )
        return mean.to(w_VK.device), std.to(w_VK.device)


def _mean_and_std(parts: list[torch.Tensor], axis: Literal["coordinate", "vector"]) -> _Pair:
    """Population mean and std over rows (coordinate) or over everything (vector), accumulated in float64."""
    total = sum(part.sum(0, dtype=torch.float64) for part in parts)
    count = sum(part.shape[0] for part in parts)
    assert isinstance(total, torch.Tensor)
    mean_K = total / count
    if axis == "vector":
        mean_K = mean_K.mean().expand_as(mean_K)
    square_K = torch.zeros_like(mean_K)
    for part in parts:
        for row_K in part:  # one row at a time: a float64 copy of a whole harvest can be tens of gigabytes
            square_K += (row_K.double() - mean_K) ** 2
    variance = square_K / count
    mean = mean_K[:1] if axis == "vector" else mean_K
    std = (variance.mean().reshape(1) if axis == "vector" else variance).sqrt()
    # Below float32's resolution a spread is rounding, not variance: dividing by it would blow rounding up.
    constant = std <= _ROUNDING * mean.abs()
    return mean.float(), torch.where(constant, torch.ones_like(std), std).float()
