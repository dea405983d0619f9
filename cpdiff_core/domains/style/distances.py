"""Distances between sets of images by their features (Sec. 4.2, Table 2: FID).

Fréchet distance of two Gaussians, |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2). With centred rows X, Y and
S = X^T X / (n - 1) the last trace is the nuclear norm of X Y^T / sqrt((n1 - 1)(n2 - 1)), an n1 x n2 matrix, which is
smaller than the D x D one and needs no matrix root. It is biased upwards when n is not much larger than D: every
table shows the real-against-real floor at the same n. KID (polynomial MMD^2, Bińkowski et al. 2018) is unbiased.

A bootstrap with replacement lowers the rank of the covariances and so shifts the Fréchet distance up: its standard
deviation is used and its percentiles are not.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from cpdiff_core.config import Config, UserError

NUM_RESAMPLES = 100
_CHUNK = 2**22
"""Numbers of one batch of resamples, float64: 32 MiB."""


class Spread(Config):
    """A distance or a difference of two, with the standard deviation of its bootstrap."""

    estimate: float
    std: float = Field(ge=0)

    @property
    def low(self) -> float:
        return self.estimate - 1.96 * self.std

    @property
    def high(self) -> float:
        return self.estimate + 1.96 * self.std

    def __str__(self) -> str:
        return f"{self.estimate:.4g} ± {self.std:.2g}"


def frechet_distance(x_ND: torch.Tensor, y_ND: torch.Tensor) -> float:
    """Between the Gaussians of two sets of features, float64. Raises UserError for fewer than two rows."""
    every = [torch.arange(len(part), device=part.device)[None] for part in (x_ND, y_ND)]
    return float(_Pair(x_ND, y_ND).frechet(*every))


def kernel_distance(x_ND: torch.Tensor, y_ND: torch.Tensor) -> float:
    """KID: unbiased MMD^2 with the kernel (x.y / D + 1)^3. Can be slightly negative."""
    return float(_Pair(x_ND, y_ND).kernel())


class _Pair:
    """The inner products of a set with the reference, from which both distances follow for every resample."""

    def __init__(self, x_ND: torch.Tensor, y_ND: torch.Tensor) -> None:
        if min(len(x_ND), len(y_ND)) < 2:
            raise UserError(f"{len(x_ND)} and {len(y_ND)} images: a distance needs at least two on either side")
        self.x, self.y = x_ND.double(), y_ND.double()
        self.xy = self.x @ self.y.T

    def frechet(self, i_RN: torch.Tensor, j_RM: torch.Tensor) -> torch.Tensor:
        """[R]: of the rows i of x and j of y, both with repetitions, for every one of R resamples."""
        n, m = i_RN.shape[1], j_RM.shape[1]
        cross = self.xy[i_RN.unsqueeze(2), j_RM.unsqueeze(1)]
        cross = cross - cross.mean(1, keepdim=True) - cross.mean(2, keepdim=True) + cross.mean((1, 2), keepdim=True)
        square = cross @ cross.mT if n <= m else cross.mT @ cross
        root = torch.linalg.eigvalsh(square).clamp_min(0).sqrt().sum(1)
        means, traces = [], []
        for part, rows, count in ((self.x, i_RN, n), (self.y, j_RM, m)):
            weight = torch.zeros(len(rows), len(part), dtype=part.dtype, device=part.device)
            weight.scatter_add_(1, rows, torch.ones_like(rows, dtype=part.dtype))
            means.append(weight @ part / count)
            traces.append((weight @ part.square().sum(1) - count * means[-1].square().sum(1)) / (count - 1))
        distance = (means[0] - means[1]).square().sum(1)
        return distance + traces[0] + traces[1] - 2 * root / ((n - 1) * (m - 1)) ** 0.5  # type: ignore[no-any-return]

    def kernel(self) -> torch.Tensor:
        width = self.x.shape[1]
        k_xx, k_yy, k_xy = ((gram / width + 1) ** 3 for gram in (self.x @ self.x.T, self.y @ self.y.T, self.xy))
        n, m = len(k_xx), len(k_yy)
        within_x = (k_xx.sum() - k_xx.diagonal().sum()) / (n * (n - 1))
        within_y = (k_yy.sum() - k_yy.diagonal().sum()) / (m * (m - 1))
        return within_x + within_y - 2 * k_xy.mean()


class ResampledDistance:
    """The Fréchet distance of one arm on all images and on every resample of them.

    Arms of one style meet the same resamples of the reference, and, since image k of every arm has the same prompt and
    noise, of the images too: differences are paired.
    """

    def __init__(self, estimate: float, resampled: NDArray[np.float64]) -> None:
        self.estimate, self.resampled = estimate, resampled

    @property
    def spread(self) -> Spread:
        return Spread(estimate=self.estimate, std=float(self.resampled.std(ddof=1)))

    def __sub__(self, other: ResampledDistance) -> ResampledDistance:
        return ResampledDistance(self.estimate - other.estimate, self.resampled - other.resampled)

    @staticmethod
    def mean(parts: Sequence[ResampledDistance]) -> ResampledDistance:
        """Of several vectors (the mean over candidates), not of their pooled images."""
        return ResampledDistance(float(np.mean([p.estimate for p in parts])), np.mean([p.resampled for p in parts], axis=0))


def resampled_distance(
    x_ND: torch.Tensor, y_ND: torch.Tensor, style: str, num_resamples: int = NUM_RESAMPLES
) -> ResampledDistance:
    """The distance of x to the reference y and its bootstrap, whose draws depend on the style and the sizes alone."""
    pair = _Pair(x_ND, y_ND)
    rng = np.random.default_rng([zlib.crc32(style.encode()), len(x_ND), len(y_ND)])
    i_RN, j_RM = (torch.from_numpy(rng.integers(count, size=(num_resamples, count))) for count in (len(x_ND), len(y_ND)))
    size = max(1, _CHUNK // (len(x_ND) * len(y_ND)))
    with few_threads():
        values = [pair.frechet(i, j) for i, j in zip(i_RN.split(size), j_RM.split(size), strict=True)]
    return ResampledDistance(frechet_distance(x_ND, y_ND), torch.cat(values).numpy())


@contextmanager
def few_threads() -> Iterator[None]:
    """At most 4 threads: on a machine of 32 cores, 32 threads took more than 90 s for what 4 did in 4 s, the eigenvalues
    of a hundred matrices of 512 x 512."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 4))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class StyleClassifier(Config):
    """A linear probe on features that tells styles apart; its share of accepted images is a score (ours)."""

    styles: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weight: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    def accepts(self, x_ND: torch.Tensor, style: str) -> NDArray[np.bool_]:
        """[n]: which images it takes for `style`."""
        x = (x_ND.double().numpy() - np.array(self.mean)) / np.array(self.scale)
        return (x @ np.array(self.weight).T + np.array(self.bias)).argmax(1) == self.styles.index(style)


def fit_style_classifier(features: Mapping[str, torch.Tensor]) -> StyleClassifier:
    """Multinomial logistic regression on the training images of all styles, each style with the same weight."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x = torch.cat(list(features.values())).double().numpy()
    labels = np.repeat(np.arange(len(features)), [len(part) for part in features.values()])
    scaler = StandardScaler().fit(x)
    probe = LogisticRegression(C=0.01, max_iter=200, class_weight="balanced").fit(scaler.transform(x), labels)
    weight, bias = probe.coef_, probe.intercept_
    if len(weight) == 1:  # two styles: scikit-learn keeps the second one's logit only
        weight, bias = np.concatenate([np.zeros_like(weight), weight]), np.concatenate([np.zeros_like(bias), bias])
    return StyleClassifier(
        styles=tuple(features), mean=tuple(scaler.mean_), scale=tuple(scaler.scale_),
        weight=tuple(map(tuple, weight)), bias=tuple(bias),
    )  # fmt: skip
