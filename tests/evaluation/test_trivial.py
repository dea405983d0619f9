"""Trivial generators have the moments their names promise; distance matching finds the scale or says it cannot."""

import pytest
import torch

from cpdiff_core.evaluation import trivial
from cpdiff_core.evaluation.trivial import TRIVIAL_FAMILIES, match_distance
from cpdiff_core.lora.vectors import min_l2

N, K = 40, 300


@pytest.fixture
def w_NK():
    rng = torch.Generator().manual_seed(0)
    return 2.0 + torch.linspace(0.1, 1.0, K) * torch.randn(N, K, generator=rng)


def test_gaussians_have_the_checkpoints_mean_and_spread(w_NK):
    drawn = trivial.coordinate_gaussian(w_NK, 4000, 1, 1.0)
    torch.testing.assert_close(drawn.mean(0), w_NK.mean(0), atol=0.08, rtol=0)
    torch.testing.assert_close(drawn.std(0), w_NK.std(0, correction=0), atol=0.0, rtol=0.08)
    noise = trivial.soup_noise(w_NK, 4000, 1, 2.0) - w_NK.mean(0)
    expected = 2.0 * w_NK.var(0, correction=0).mean().sqrt()
    torch.testing.assert_close(noise.std(0), expected.expand(K), atol=0.0, rtol=0.08)


def test_checkpoint_noise_is_centred_on_checkpoints(w_NK):
    drawn = trivial.checkpoint_noise(w_NK, 50, 1, 1e-3)
    nearest = torch.cdist(drawn, w_NK).argmin(1)
    assert len(set(nearest.tolist())) > 15
    deviation = drawn - w_NK[nearest]
    assert deviation.std() == pytest.approx(1e-3 * w_NK.var(0, correction=0).mean().sqrt().item(), rel=0.03)


def test_pca_gaussian_has_the_covariance_of_the_leading_components(w_NK):
    drawn = trivial.pca_gaussian(w_NK, 20000, 1, 1.0, num_components=3) - w_NK.mean(0)
    _, s, v = torch.linalg.svd(w_NK - w_NK.mean(0), full_matrices=False)
    in_components = drawn @ v.T
    assert in_components[:, 3:].abs().max() < 1e-3
    torch.testing.assert_close(torch.cov(in_components[:, :3].T), torch.diag(s[:3] ** 2 / N), atol=0.4, rtol=0.05)
    assert trivial.pca_gaussian(w_NK[:4], 5, 1, 1.0).isfinite().all()


def test_interpolations_lie_on_segments_and_means_average_sixteen(w_NK):
    drawn = trivial.pair_interpolation(w_NK, 30, 1, 1.0)
    weights = torch.linalg.lstsq(w_NK.T.double(), drawn.T.double()).solution.T
    assert ((weights.abs() > 1e-4).sum(1) <= 2).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(30, dtype=torch.float64), atol=1e-4, rtol=0)
    means = trivial.checkpoint_mean(w_NK, 10, 1, 1.0)
    weights = torch.linalg.lstsq(w_NK.T.double(), means.T.double()).solution.T
    assert ((weights - 1 / 16).abs() < 1e-4).sum(1).tolist() == [16] * 10
    torch.testing.assert_close(trivial.checkpoint_mean(w_NK[:5], 2, 1, 1.0), w_NK[:5].mean(0).expand(2, K))


@pytest.mark.parametrize("family", TRIVIAL_FAMILIES.values(), ids=lambda family: family.name)
def test_every_family_is_a_function_of_its_seed_and_works_from_one_checkpoint(family, w_NK):
    first, again, other = (family.generate(w_NK, 6, seed, 0.7) for seed in (1, 1, 2))
    assert first.shape == (6, K)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert family.generate(w_NK[:1], 3, 0, 1.0).isfinite().all()


@pytest.mark.parametrize("name", ["checkpoint + noise", "soup + noise", "per-coordinate Gaussian", "PCA-16 Gaussian"])
@pytest.mark.parametrize("target", [10.5, 14.0, 60.0])
def test_matched_scale_gives_the_target_distance(name, target, w_NK):
    match = match_distance(TRIVIAL_FAMILIES[name], w_NK, target, lambda w: min_l2(w, w_NK))
    drawn = TRIVIAL_FAMILIES[name].generate(w_NK, 20, 0, match.scale)
    assert match.reached
    assert torch.cdist(drawn, w_NK).min(1).values.median() == pytest.approx(target, rel=0.011)


def test_a_distance_out_of_reach_is_said_to_be(w_NK):
    def matched(name, target):
        return match_distance(TRIVIAL_FAMILIES[name], w_NK, target, lambda w: min_l2(w, w_NK))

    from_soup = torch.cdist(w_NK.mean(0, keepdim=True), w_NK).min().item()
    too_near = matched("soup + noise", 0.5 * from_soup)
    assert not too_near.reached
    assert 0.5 * from_soup < too_near.median_distance <= from_soup * (1 + 1e-4)
    too_far = matched("interpolation of two", 50.0)
    assert (too_far.reached, too_far.scale) == (False, 1.0)
    assert matched("interpolation of two", 2.0).reached
    assert matched("checkpoint + noise", 0.0).reached


def test_where_distance_falls_before_it_rises_the_scale_nearest_to_one_is_taken():
    """A zoo of two runs: the soup lies between them, and spread along their difference brings it nearer to either."""
    rng = torch.Generator().manual_seed(3)
    step = torch.zeros(1, K)
    step[0, 0] = 20.0
    zoo = torch.cat([sign * step + 0.1 * torch.randn(20, K, generator=rng) for sign in (-1.0, 1.0)])
    family = TRIVIAL_FAMILIES["PCA-16 Gaussian"]

    def distance(w_MK):
        return min_l2(w_MK, zoo)

    natural = distance(family.generate(zoo, 20, 0, 1.0)).median().item()
    assert natural < distance(family.generate(zoo, 20, 0, 0.0)).median().item()
    match = match_distance(family, zoo, natural, distance)
    assert match.reached
    assert match.scale == pytest.approx(1.0, abs=0.05)
