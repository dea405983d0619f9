"""Questions put to a trained generator: does the condition matter, and how do samples approach the weights (Sec. 4.4).

`change_condition` gives the conditions of the causality test: another task's, the right one with its entries shuffled
(a meaningless one of the same size), and none (the mean of all training prompts, which the projection maps to zero).
`trajectory` follows samples through the reverse process.
"""

from __future__ import annotations

from typing import Literal

import torch

from cpdiff_core.config import Config
from cpdiff_core.generator.autoencoder import ParameterAutoencoder
from cpdiff_core.generator.diffusion import LatentDiffusion, SamplingConfig
from cpdiff_core.generator.normalization import Normalizer
from cpdiff_core.lora.vectors import min_l2

Change = Literal["another task's condition", "a shuffled condition", "an empty condition", "another task's statistics"]
CHANGES: tuple[Change, ...] = (
    "another task's condition", "a shuffled condition", "an empty condition", "another task's statistics",
)  # fmt: skip


def telling_changes(num_tasks: int, kind: str, own_statistics: bool) -> tuple[Change, ...]:
    """The changes that change something. A task alone has no other one to take from, a one-hot vector in another order is
    another task's or its own, and statistics that are not each task's own are nobody else's. kind: of the condition."""
    shuffled = kind not in ("one_hot", "learned")
    tells = (num_tasks > 1, shuffled, True, num_tasks > 1 and own_statistics)
    return tuple(change for change, told in zip(CHANGES, tells, strict=True) if told)


def change_condition(y_QE: torch.Tensor, q: int, change: Change, empty_E: torch.Tensor, seed: int) -> torch.Tensor:
    """The condition to use in place of task q's, y_E. empty_E: what the model maps to no condition."""
    if change == "another task's condition":
        return y_QE[(q + 1) % len(y_QE)]
    if change == "a shuffled condition":
        generator = torch.Generator().manual_seed(seed)
        return y_QE[q][torch.randperm(y_QE.shape[1], generator=generator)]
    return empty_E if change == "an empty condition" else y_QE[q]


class Trajectory(Config):
    """steps: t of each reverse step. distance: task -> step -> median distance of the decoded x_t to the nearest
    training vector, on raw factors; predicted: the same of the weights that the model predicts at that step."""

    steps: tuple[int, ...]
    distance: dict[str, tuple[float, ...]]
    predicted: dict[str, tuple[float, ...]]


@torch.no_grad()
def trajectory(
    diffusion: LatentDiffusion, autoencoder: ParameterAutoencoder, normalizer: Normalizer, w_NK_by_task: dict[str, torch.Tensor],
    y_QE: torch.Tensor, sampling: SamplingConfig, num: int, seed: int,
) -> Trajectory:  # fmt: skip
    """Sample `num` vectors of every task and record how far from its training vectors they are at every step."""
    device = diffusion.no_condition_D.device
    training = {task: w_NK.to(device) for task, w_NK in w_NK_by_task.items()}
    steps: list[int] = []
    noised: dict[str, list[float]] = {task: [] for task in training}
    clean: dict[str, list[float]] = {task: [] for task in training}

    def median_distance(task: str, z_MCL: torch.Tensor) -> float:
        w_MK = normalizer.invert(task, autoencoder.decode(z_MCL))
        return float(min_l2(w_MK, training[task]).median())

    def look(t: int, x_BMCL: torch.Tensor, z_BMCL: torch.Tensor) -> None:
        steps.append(t)
        for q, task in enumerate(training):
            noised[task].append(median_distance(task, x_BMCL[q]))
            clean[task].append(median_distance(task, z_BMCL[q]))

    final_BMCL = diffusion.sample(y_QE, num, seed, sampling, look)
    steps.append(0)
    for q, task in enumerate(training):
        noised[task].append(median_distance(task, final_BMCL[q]))
        clean[task].append(noised[task][-1])
    return Trajectory(
        steps=tuple(steps),
        distance={task: tuple(values) for task, values in noised.items()},
        predicted={task: tuple(values) for task, values in clean.items()},
    )
