"""Arithmetic on LoRA vectors w_VK: soup, interpolation, distances on raw factors and on dW = BA (Sec. 4.1, 4.4).

Two factor pairs can differ and give the same weights, (B, A) ~ (BR, R^-1 A), so novelty is measured on the product too.
Inner products of products, <B1 A1, B2 A2> = tr((B2^T B1)(A1 A2^T)), need no matrix of the size of the base model.
Everything is plain torch on the device that its inputs lie on, and accumulates in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from cpdiff_core.config import UserError

# Float64 scratch of one chunk, in elements: 32 MiB.
_CHUNK = 2**22


class FactorSpan(Protocol):
    """Where one adapted module lies in w_K: A is rank x in_features, B is out_features x rank, both row by row."""

    @property
    def a_start(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def b_start(self) -> int: ...
    @property
    def out_features(self) -> int: ...


def soup(w_NK: torch.Tensor) -> torch.Tensor:
    """Model soup, w_1K: the mean of the vectors, so of the factors A and B, not of dW (our reading of Sec. 4.1)."""
    return w_NK.mean(dim=0, keepdim=True, dtype=torch.float64).to(w_NK.dtype)


def interpolate(a: torch.Tensor, b: torch.Tensor, lam: float) -> torch.Tensor:
    """(1 - lam) a + lam b (Sec. 4.4), exactly a at 0 and exactly b at 1."""
    return torch.lerp(a, b, lam)


def evenly_spaced(num_checkpoints: int, num: int) -> tuple[int, ...]:
    """`num` of the indices 0 .. num_checkpoints - 1, equally far apart, the last one always among them.

    Raises UserError if more are asked for than there are.
    """
    if not 1 <= num <= num_checkpoints:
        raise UserError(
            f"checkpoints to take {num}: must be 1 to {num_checkpoints}, the number harvested; harvest more"
        )
    return tuple((i + 1) * num_checkpoints // num - 1 for i in range(num))


def min_l2(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """Distance of each row of a_MK to its nearest row of b_NK on raw factors: [M], float64, exactly 0 for a copy."""
    return _factor_distance(a_MK, b_NK[_squared_distances(a_MK, b_NK).argmin(dim=1)])


def leave_one_out_min_l2(w_NK: torch.Tensor) -> torch.Tensor:
    """Distance of each row to its nearest *other* row on raw factors: [N], float64; infinite if N = 1."""
    return _without_itself(w_NK, _squared_distances(w_NK, w_NK), _factor_distance)


def min_l2_product(
    a_MK: torch.Tensor, b_NK: torch.Tensor, factors: Sequence[FactorSpan], scaling: float
) -> torch.Tensor:
    """As `min_l2`, on dW = scaling * BA over all `factors`, Frobenius norm. scaling: lora_alpha / rank."""
    nearest = _squared_product_distances(a_MK, b_NK, factors).argmin(dim=1)
    return scaling * _product_distance(a_MK, b_NK[nearest], factors)


def leave_one_out_min_l2_product(w_NK: torch.Tensor, factors: Sequence[FactorSpan], scaling: float) -> torch.Tensor:
    """As `leave_one_out_min_l2`, on dW = scaling * BA."""
    squared_NN = _squared_product_distances(w_NK, w_NK, factors)
    return scaling * _without_itself(w_NK, squared_NN, lambda a_VK, b_VK: _product_distance(a_VK, b_VK, factors))


def _without_itself(
    w_NK: torch.Tensor, squared_NN: torch.Tensor, distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    if len(w_NK) == 1:
        return torch.full((1,), math.inf, dtype=torch.float64, device=w_NK.device)
    return distance(w_NK, w_NK[squared_NN.fill_diagonal_(math.inf).argmin(dim=1)])


def _squared_distances(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """[M, N] by |a|^2 + |b|^2 - 2ab. Finds the nearest row; its distance is then taken without cancellation."""
    squared = torch.zeros(len(a_MK), len(b_NK), dtype=torch.float64, device=a_MK.device)
    width = max(1, _CHUNK // (len(a_MK) + len(b_NK)))
    for a, b in zip(a_MK.split(width, dim=1), b_NK.split(width, dim=1), strict=True):
        # Rows near each other and far from 0 are the rule here: what all share is taken away before squaring.
        centre = b.mean(dim=0, dtype=torch.float64)
        a, b = a - centre, b - centre
        squared += a.square().sum(1)[:, None] + b.square().sum(1) - 2.0 * (a @ b.T)
    return squared


def _factor_distance(a_VK: torch.Tensor, b_VK: torch.Tensor) -> torch.Tensor:
    """[V] between rows of the same index."""
    width = max(1, _CHUNK // len(a_VK))
    chunks = zip(a_VK.split(width, dim=1), b_VK.split(width, dim=1), strict=True)
    return torch.stack([(a.double() - b.double()).square().sum(1) for a, b in chunks]).sum(0).sqrt()


def _factor_pair(w_VK: torch.Tensor, span: FactorSpan) -> tuple[torch.Tensor, torch.Tensor]:
    """(A as [V, rank, in], B transposed as [V, rank, out]) of one module, float64."""
    a = w_VK[:, span.a_start : span.a_start + span.rank * span.in_features].double()
    b = w_VK[:, span.b_start : span.b_start + span.out_features * span.rank].double()
    return a.unflatten(1, (span.rank, span.in_features)), b.unflatten(1, (span.out_features, span.rank)).mT


def _squared_product_distances(a_MK: torch.Tensor, b_NK: torch.Tensor, factors: Sequence[FactorSpan]) -> torch.Tensor:
    """[M, N] of |B1 A1 - B2 A2|^2, unscaled, by inner products; for finding the nearest row."""
    inner = torch.zeros(len(a_MK), len(b_NK), dtype=torch.float64, device=a_MK.device)
    norm_M, norm_N = inner.new_zeros(len(a_MK)), inner.new_zeros(len(b_NK))
    for span in factors:
        (a1, b1), (a2, b2) = _factor_pair(a_MK, span), _factor_pair(b_NK, span)
        norm_M += ((a1 @ a1.mT) * (b1 @ b1.mT)).sum((1, 2))
        norm_N += ((a2 @ a2.mT) * (b2 @ b2.mT)).sum((1, 2))
        columns_a, columns_b = a2.flatten(0, 1).T, b2.flatten(0, 1).T
        rows = max(1, _CHUNK // (span.rank**2 * len(b_NK)))
        for start in range(0, len(a_MK), rows):
            part = slice(start, start + rows)
            # Entry (m r, n s) of both: row r of A1[m] with row s of A2[n], column r of B1[m] with column s of B2[n].
            gram = (a1[part].flatten(0, 1) @ columns_a).mul_(b1[part].flatten(0, 1) @ columns_b)
            inner[part] += gram.unflatten(1, (-1, span.rank)).sum(2).unflatten(0, (-1, span.rank)).sum(1)
    return norm_M[:, None] + norm_N - 2.0 * inner


def _product_distance(a_VK: torch.Tensor, b_VK: torch.Tensor, factors: Sequence[FactorSpan]) -> torch.Tensor:
    """[V] of |B1 A1 - B2 A2| between rows of the same index, unscaled.

    B1 A1 - B2 A2 = [B1 - B2, B2] [A1; A1 - A2]: every term of the norm is small when the difference is, so nothing
    cancels and a copy is at distance exactly 0.
    """
    squared = torch.zeros(len(a_VK), dtype=torch.float64, device=a_VK.device)
    for span in factors:
        (a1, b1), (a2, b2) = _factor_pair(a_VK, span), _factor_pair(b_VK, span)
        left, right = torch.cat([b1 - b2, b2], dim=1), torch.cat([a1, a1 - a2], dim=1)
        squared += ((left @ left.mT) * (right @ right.mT)).sum((1, 2))
    return squared.clamp_(min=0.0).sqrt()
