"""Trivial generators: new LoRA vectors without learning anything.

Each family is a function (w_NK, num, seed, scale) -> w_MK of one task's training vectors; the same seed draws the same
noise at every scale, so distance is a smooth function of scale. At scale 0 a family collapses to what it starts from
(checkpoints, or their mean), at 1 it has the spread of the training vectors. `match_distance` finds the scale at which
a family is as far from the training vectors as a generated set is: only there are their scores comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
from pydantic import Field

from cpdiff_core.config import Config
from cpdiff_core.lora.vectors import soup

_SEARCH_TOLERANCE = 0.01
_REACHED_TOLERANCE = 0.05

Generate = Callable[[torch.Tensor, int, int, float], torch.Tensor]


@dataclass(frozen=True)
class TrivialFamily:
    """A trivial generator and the largest scale at which it still is what its name says."""

    name: str
    generate: Generate
    max_scale: float = math.inf


def checkpoint_noise(w_NK: torch.Tensor, num: int, seed: int, scale: float) -> torch.Tensor:
    """A random checkpoint plus isotropic noise, `scale` times the spread of the checkpoints."""
    rng = torch.Generator().manual_seed(seed)
    start_MK = w_NK[_pick(rng, num, len(w_NK), w_NK)]
    return start_MK + scale * _spread(w_NK) * _normal(rng, num, w_NK)


def soup_noise(w_NK: torch.Tensor, num: int, seed: int, scale: float) -> torch.Tensor:
    """The model soup plus isotropic noise, `scale` times the spread of the checkpoints."""
    rng = torch.Generator().manual_seed(seed)
    return soup(w_NK) + scale * _spread(w_NK) * _normal(rng, num, w_NK)


def coordinate_gaussian(w_NK: torch.Tensor, num: int, seed: int, scale: float) -> torch.Tensor:
    """A Gaussian of each coordinate alone, with the checkpoints' mean and `scale` times their standard deviation."""
    rng = torch.Generator().manual_seed(seed)
    return soup(w_NK) + scale * w_NK.std(dim=0, correction=0) * _normal(rng, num, w_NK)


def pca_gaussian(w_NK: torch.Tensor, num: int, seed: int, scale: float, num_components: int = 16) -> torch.Tensor:
    """A Gaussian on the first principal components of the checkpoints (fewer than 16 if N is small)."""
    rng = torch.Generator().manual_seed(seed)
    centred_NK = w_NK - soup(w_NK)
    # eigh sorts upwards. Component j is u_j^T X / s_j with standard deviation s_j / sqrt(N), so s_j cancels.
    u_NJ = torch.linalg.eigh((centred_NK @ centred_NK.T).double()).eigenvectors[:, -num_components:]
    draw_MJ = torch.randn(num, u_NJ.shape[1], generator=rng, dtype=torch.float64).to(w_NK.device)
    mix_MN = (draw_MJ @ u_NJ.T / math.sqrt(len(w_NK))).to(w_NK.dtype)
    return soup(w_NK) + scale * (mix_MN @ centred_NK)


def pair_interpolation(w_NK: torch.Tensor, num: int, seed: int, scale: float) -> torch.Tensor:
    """A point between two random checkpoints, at a uniform share of up to `scale` / 2 of the way.

    At scale 1 that is uniform interpolation: the pair has no order, so the near half is the whole segment.
    """
    rng = torch.Generator().manual_seed(seed)
    first, second = _pick(rng, num, len(w_NK), w_NK), _pick(rng, num, len(w_NK), w_NK)
    share_M1 = 0.5 * scale * torch.rand(num, 1, generator=rng).to(w_NK)
    return torch.lerp(w_NK[first], w_NK[second], share_M1)


def checkpoint_mean(w_NK: torch.Tensor, num: int, seed: int, scale: float, num_averaged: int = 16) -> torch.Tensor:
    """The mean of 16 random checkpoints at scale 1; below it, that share of the way from one of them to the mean."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num):
        chosen = torch.randperm(len(w_NK), generator=rng)[:num_averaged].to(w_NK.device)
        rows.append(torch.lerp(w_NK[chosen[0]], soup(w_NK[chosen])[0], scale))
    return torch.stack(rows)


TRIVIAL_FAMILIES: Mapping[str, TrivialFamily] = MappingProxyType(
    {
        family.name: family
        for family in (
            TrivialFamily("checkpoint + noise", checkpoint_noise),
            TrivialFamily("soup + noise", soup_noise),
            TrivialFamily("per-coordinate Gaussian", coordinate_gaussian),
            TrivialFamily("PCA-16 Gaussian", pca_gaussian),
            TrivialFamily("interpolation of two", pair_interpolation, max_scale=1.0),
            TrivialFamily("mean of 16", checkpoint_mean, max_scale=1.0),
        )
    }
)


class MatchedDistance(Config):
    """Where a trivial family comes as far from the training vectors as the generated set, if it does."""

    family: str
    reached: bool = Field(description="Whether median_distance is within 5 % of the target.")
    scale: float = Field(description="The scale that comes closest to the target.")
    median_distance: float
    target: float


def match_distance(
    family: TrivialFamily,
    w_NK: torch.Tensor,
    target_median: float,
    distance: Callable[[torch.Tensor], torch.Tensor],
    *,
    num: int = 20,
    seed: int = 0,
    max_evaluations: int = 40,
) -> MatchedDistance:
    """Find the scale at which the median distance of `num` vectors of `family` is `target_median`.

    distance: w_MK -> [M], to the nearest training vector; `min_l2_product` for the tables. Searched to 1 %; within
    5 %, about the error of a median of 20, counts as reached. Distance can fall before it rises (between the runs of a
    zoo, spread brings the soup nearer to them): of several scales that fit, the one nearest to 1 is taken.
    """
    medians: dict[float, float] = {}

    def median_at(scale: float) -> float:
        if scale not in medians:
            medians[scale] = float(distance(family.generate(w_NK, num, seed, scale)).double().median())
        return medians[scale]

    def error(scale: float) -> float:
        return abs(median_at(scale) - target_median)

    grid = [0.0, 0.25, 0.5, 1.0]
    while median_at(grid[-1]) < target_median and grid[-1] < family.max_scale and len(grid) < max_evaluations // 2:
        grid.append(min(2.0 * grid[-1], family.max_scale))
    crossings = [
        (low, high)
        for low, high in pairwise(grid)
        if (median_at(low) - target_median) * (median_at(high) - target_median) <= 0
    ]
    if crossings:
        low, high = min(crossings, key=lambda pair: abs(sum(pair) / 2.0 - 1.0))
        closest = min(low, high, key=error)
        while error(closest) > _SEARCH_TOLERANCE * target_median and len(medians) < max_evaluations:
            # False position, with a bisection every other time so that a curved function cannot stall it.
            share = (target_median - median_at(low)) / (median_at(high) - median_at(low)) if len(medians) % 2 else 0.5
            closest = low + share * (high - low)
            same_side = (median_at(closest) - target_median) * (median_at(low) - target_median) > 0
            low, high = (closest, high) if same_side else (low, closest)
    else:
        closest = min(grid, key=error)
    return MatchedDistance(
        family=family.name,
        reached=error(closest) <= _REACHED_TOLERANCE * target_median,
        scale=closest,
        median_distance=median_at(closest),
        target=target_median,
    )


def _pick(rng: torch.Generator, num: int, among: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randint(among, (num,), generator=rng).to(like.device)


def _normal(rng: torch.Generator, num: int, like_NK: torch.Tensor) -> torch.Tensor:
    return torch.randn(num, like_NK.shape[1], generator=rng).to(like_NK)


def _spread(w_NK: torch.Tensor) -> torch.Tensor:
    """Root mean square over coordinates of the checkpoints' standard deviation; of the values themselves if N = 1."""
    deviation = w_NK - soup(w_NK) if len(w_NK) > 1 else w_NK
    return deviation.square().mean(dtype=torch.float64).sqrt().to(w_NK.dtype)
