"""Fréchet distance and KID against pytorch_fid, sklearn's kernel and closed forms; the bootstrap; the classifier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from sklearn.metrics.pairwise import polynomial_kernel

from cpdiff_core.config import UserError
from cpdiff_core.domains.style.distances import (
    ResampledDistance,
    fit_style_classifier,
    frechet_distance,
    kernel_distance,
    resampled_distance,
)


def draw(num: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(7).normal(size=(width, width)) / width**0.5
    return torch.from_numpy(rng.normal(size=(num, width)) @ mix + shift)


@pytest.mark.parametrize(("n", "m"), [(200, 300), (300, 120), (20, 30)])
def test_frechet_distance_equals_pytorch_fid(n: int, m: int) -> None:
    x, y = draw(n, 40, 0), draw(m, 40, 1, 0.3)
    moments = [(part.numpy().mean(0), np.cov(part.numpy(), rowvar=False)) for part in (x, y)]
    expected = calculate_frechet_distance(*moments[0], *moments[1])
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_of_a_shift_is_its_square() -> None:
    x = draw(50, 8, 0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + 2.0) == pytest.approx(8 * 4.0, rel=1e-6)


def test_kernel_distance_equals_its_definition() -> None:
    x, y = draw(30, 10, 0), draw(40, 10, 1, 0.2)
    k = [polynomial_kernel(a, b, degree=3, gamma=0.1, coef0=1) for a, b in ((x, x), (y, y), (x, y))]
    within = [(m.sum() - np.trace(m)) / (len(m) * (len(m) - 1)) for m in k[:2]]
    assert kernel_distance(x, y) == pytest.approx(sum(within) - 2 * k[2].mean(), rel=1e-9)


def test_kernel_distance_is_unbiased_where_frechet_distance_is_not() -> None:
    pairs = [(draw(20, 30, seed), draw(20, 30, 100 + seed)) for seed in range(200)]
    kid = np.array([kernel_distance(x, y) for x, y in pairs])
    assert abs(kid.mean()) < 3 * kid.std() / len(kid) ** 0.5
    assert np.mean([frechet_distance(x, y) for x, y in pairs]) > 5


def test_single_image_is_refused() -> None:
    with pytest.raises(UserError, match="1 and 5 images"):
        frechet_distance(draw(1, 4, 0), draw(5, 4, 1))


def test_bootstrap_spread_is_that_of_fresh_samples() -> None:
    """At n well above the width the bootstrap's standard deviation agrees with drawing new data."""
    fresh = np.std([frechet_distance(draw(200, 4, 2 * s, 0.5), draw(200, 4, 2 * s + 1)) for s in range(100)])
    pairs = [(draw(200, 4, 9000 + 2 * s, 0.5), draw(200, 4, 9001 + 2 * s)) for s in range(8)]
    found = np.mean([resampled_distance(x, y, "x", 60).spread.std for x, y in pairs])
    assert found == pytest.approx(fresh, rel=0.25)


def test_differences_are_paired() -> None:
    reference, x = draw(80, 6, 0), draw(60, 6, 1, 1.0)
    near = x + 0.01 * draw(60, 6, 2)
    a, b = (resampled_distance(part, reference, "style") for part in (x, near))
    assert (a - b).spread.std < 0.1 * a.spread.std
    assert (a - b).estimate == pytest.approx(a.estimate - b.estimate)
    mean = ResampledDistance.mean([a, b])
    assert mean.estimate == pytest.approx((a.estimate + b.estimate) / 2)


def test_style_classifier_learns_three_styles_and_judges_unseen_images() -> None:
    train = {name: draw(60, 12, i, 2.0 * i) for i, name in enumerate("abc")}
    probe = fit_style_classifier(train)
    for i, name in enumerate("abc"):
        assert probe.accepts(draw(100, 12, 50 + i, 2.0 * i), name).mean() > 0.8
        assert probe.accepts(draw(100, 12, 60 + i, 2.0 * ((i + 1) % 3)), name).mean() < 0.2


def test_style_classifier_works_for_two_styles() -> None:
    probe = fit_style_classifier({"a": draw(60, 12, 0), "b": draw(60, 12, 1, 2.0)})
    assert probe.accepts(draw(100, 12, 2, 2.0), "b").mean() > 0.9
    assert probe.accepts(draw(100, 12, 3), "b").mean() < 0.1
