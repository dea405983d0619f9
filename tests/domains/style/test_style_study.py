"""Interpolation and trajectories of generated styles, on a generator trained for a few steps."""

from __future__ import annotations

import pytest
import torch

from cpdiff_core.config import RuntimeConfig
from cpdiff_core.evaluation.style_study import interpolated_conditions, interpolated_weights, trajectory_plane
from cpdiff_core.generator.autoencoder import ConvAutoencoderConfig, fit_autoencoder
from cpdiff_core.generator.conditions import StyleImageCondition
from cpdiff_core.generator.diffusion import DiffusionConfig, SamplingConfig, fit_diffusion
from cpdiff_core.generator.normalization import NormalizationConfig, Normalizer
from cpdiff_core.generator.training import TrainingConfig
from cpdiff_core.generator.unet1d import UNetConfig

QUIET, SAMPLING = RuntimeConfig(progress=False), SamplingConfig(num_inference_steps=4, num_candidates=2)
Parts = tuple  # diffusion, autoencoder, normalizer, vectors of each style, y_QE


@pytest.fixture(scope="module")
def parts() -> Parts:
    torch.manual_seed(0)
    harvests = {name: torch.randn(1, 64) + 0.1 * torch.randn(12, 64) + 3 * q for q, name in enumerate(("ink", "oil"))}
    normalizer = Normalizer.fit(NormalizationConfig(), harvests)
    w_VK = torch.cat([normalizer.normalize(name, w_NK) for name, w_NK in harvests.items()])
    task_V, y_QPE = torch.arange(2).repeat_interleave(12), torch.randn(2, 5, 20)
    options = {"seed": 0, "device": "cpu", "runtime": QUIET}
    training = TrainingConfig(steps=5, batch_size=8)
    config = ConvAutoencoderConfig(channels=4, length=4, training=training)
    autoencoder, _ = fit_autoencoder(config, w_VK, task_V, **options)  # type: ignore[arg-type]
    diffusion, _ = fit_diffusion(
        DiffusionConfig(unet=UNetConfig(width=16, multipliers=(1,), time_width=16), training=training),
        StyleImageCondition(width=8), autoencoder.encode(w_VK), task_V, y_QPE, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return diffusion, autoencoder, normalizer, harvests, y_QPE[:, 0]


def test_weights_are_interpolated_from_end_to_end_exactly() -> None:
    a, b = torch.randn(9), torch.randn(9)
    w_LK = interpolated_weights(a, b)
    assert torch.equal(w_LK[0], a)
    assert torch.equal(w_LK[-1], b)
    torch.testing.assert_close(w_LK[1], 0.75 * a + 0.25 * b)


def test_ends_of_the_interpolated_condition_are_the_candidates_of_both_styles(parts: Parts) -> None:
    diffusion, autoencoder, normalizer, _, y_QE = parts
    w_LK = interpolated_conditions(diffusion, autoencoder, normalizer, ("ink", "oil"), y_QE, SAMPLING, seed=3)
    for row, q, name in ((0, 0, "ink"), (-1, 1, "oil")):
        z_1CL = diffusion.sample(y_QE[q : q + 1], 1, 3, SAMPLING)[0]
        expected = normalizer.invert(name, autoencoder.decode(z_1CL))[0]
        torch.testing.assert_close(w_LK[row], expected, atol=1e-5, rtol=1e-5)
    steps = (w_LK[1:] - w_LK[:-1]).norm(dim=1)
    assert steps.min() > 1e-3


def test_trajectory_ends_at_the_samples_and_measures_their_distance(parts: Parts) -> None:
    diffusion, autoencoder, normalizer, harvests, y_QE = parts
    found = trajectory_plane(diffusion, autoencoder, normalizer, "oil", harvests["oil"], y_QE[1], SAMPLING, 5, 0)
    assert found["paths"].shape == (5, 5, 2)
    assert found["originals"].shape == (12, 2)
    assert found["soup"].shape == (1, 2)
    assert found["t"].tolist()[-1] == 0
    z_MCL = diffusion.sample(y_QE[1:], 5, 0, SAMPLING)[0]
    w_MK = normalizer.invert("oil", autoencoder.decode(z_MCL))
    expected = torch.cdist(w_MK.double(), harvests["oil"].double()).min(1).values
    torch.testing.assert_close(found["distance"][:, -1], expected, atol=1e-4, rtol=1e-4)
