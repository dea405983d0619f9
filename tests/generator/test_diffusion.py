"""Latent diffusion against closed forms: Gaussians that a sampler must give back, and diffusers' own steps."""

from pathlib import Path

import diffusers
import pytest
import torch

from cpdiff_core.artifacts import ResumeState, seal
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.domains.glue.text_tasks import excerpt
from cpdiff_core.experiments import ExperimentConfig
from cpdiff_core.generator.conditions import LearnedCondition, OneHotCondition, TaskInfoCondition, one_hot_conditions
from cpdiff_core.generator.diffusion import (
    DiffusionConfig,
    LatentDiffusion,
    SamplingConfig,
    build_scheduler,
    check_sampling,
    fit_diffusion,
)
from cpdiff_core.generator.training import TrainingConfig
from cpdiff_core.generator.unet1d import UNetConfig
from cpdiff_core.zoo_folder import ZooGeneratorConfig

RUNTIME = RuntimeConfig(progress=False)
SMALL = UNetConfig(width=32, multipliers=(1, 1), time_width=32)
CHANNELS, LENGTH = 4, 4


def two_tasks() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents of two tasks, means -0.8 and +0.8, spread 0.6: unit variance in all, as the autoencoder gives them.

    The spread has one direction only: all coordinates of a vector move together.
    """
    spread_V11 = 0.6 * torch.randn(256, 1, 1, generator=torch.Generator().manual_seed(0))
    task_V = torch.arange(256) % 2
    mean_V11 = (task_V.float() * 1.6 - 0.8)[:, None, None]
    return (mean_V11 + spread_V11).expand(-1, CHANNELS, LENGTH).contiguous(), task_V, one_hot_conditions(2)


def fit(config: DiffusionConfig, condition=OneHotCondition(), y_QPE=None, seed: int = 0, **options):  # type: ignore[no-untyped-def]
    z_VCL, task_V, one_hot_QPE = two_tasks()
    y_QPE = one_hot_QPE if y_QPE is None else y_QPE
    return fit_diffusion(config, condition, z_VCL, task_V, y_QPE, seed=seed, device="cpu", runtime=RUNTIME, **options)


def quick(prediction_type: str = "epsilon", steps: int = 500, **fields) -> DiffusionConfig:  # type: ignore[no-untyped-def]
    training = TrainingConfig(steps=steps, batch_size=64, learning_rate=3e-3, ema_decay=0.98)
    return DiffusionConfig(unet=SMALL, training=training, prediction_type=prediction_type, **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fitted() -> dict[str, LatentDiffusion]:
    return {
        "epsilon": fit(quick("epsilon"))[0],
        "v_prediction": fit(quick("v_prediction", condition_dropout=0.2))[0],
    }


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_samples_have_the_mean_the_spread_and_the_correlation_of_their_task(
    fitted: dict[str, LatentDiffusion], prediction_type: str, scheduler: str
) -> None:
    steps = 200 if scheduler == "ddpm" else 30
    sampling = SamplingConfig(scheduler=scheduler, num_inference_steps=steps)
    z_BMCL = fitted[prediction_type].sample(torch.eye(2), 128, 5, sampling)
    z_VCL, task_V, _ = two_tasks()
    for task in range(2):
        own = z_VCL[task_V == task]
        # 128 draws of spread 0.6: the standard error of the mean is 0.05, of the spread 0.04
        assert float(z_BMCL[task].mean()) == pytest.approx(float(own.mean()), abs=0.25)
        assert float(z_BMCL[task].mean(dim=(1, 2)).std()) == pytest.approx(0.6, abs=0.2)
    apart = z_BMCL - z_BMCL.mean(dim=(2, 3), keepdim=True)
    assert float(apart.std()) < 0.25  # coordinates of one vector agree, as in the data


def test_ddim_with_the_true_noise_predictor_gives_the_gaussian_back() -> None:
    """diffusers' steps as we call them, without a network: the exact predictor of N(0.5, 0.2^2) is known."""
    config = DiffusionConfig()
    scheduler = build_scheduler(config, "ddim")
    scheduler.set_timesteps(200)
    x_V = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[t]
        variance = alpha_bar * 0.04 + 1 - alpha_bar
        epsilon_V = (1 - alpha_bar).sqrt() / variance * (x_V - alpha_bar.sqrt() * 0.5)
        x_V = scheduler.step(epsilon_V, t, x_V).prev_sample
    assert float(x_V.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(x_V.std()) == pytest.approx(0.2, abs=0.02)


def test_noise_process_is_the_papers() -> None:
    scheduler = build_scheduler(DiffusionConfig(), "ddpm")
    torch.testing.assert_close(scheduler.betas, torch.linspace(1e-4, 2e-2, 1000))
    assert scheduler.config.clip_sample is False
    scheduler.set_timesteps(50)
    assert int(scheduler.timesteps[0]) == 999


def test_condition_and_not_chance_decides_the_task(fitted: dict[str, LatentDiffusion]) -> None:
    sampling = SamplingConfig(num_inference_steps=20)
    right = fitted["epsilon"].sample(torch.eye(2), 16, 0, sampling).mean(dim=(1, 2, 3))
    swapped = fitted["epsilon"].sample(torch.eye(2).flip(0), 16, 0, sampling).mean(dim=(1, 2, 3))
    torch.testing.assert_close(right, swapped.flip(0), atol=1e-4, rtol=1e-4)
    assert float(right[1] - right[0]) > 1.0


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_a_candidate_does_not_depend_on_how_many_or_what_else_is_drawn(
    fitted: dict[str, LatentDiffusion], scheduler: str
) -> None:
    sampling = SamplingConfig(scheduler=scheduler, num_inference_steps=10, eta=0.5)
    together = fitted["epsilon"].sample(torch.eye(2), 6, 3, sampling)
    alone = fitted["epsilon"].sample(torch.eye(2)[1:], 4, 3, sampling)
    torch.testing.assert_close(together[1:, :4], alone, atol=1e-4, rtol=1e-3)
    assert torch.equal(alone, fitted["epsilon"].sample(torch.eye(2)[1:], 4, 3, sampling))
    assert float((together[1, 0] - together[1, 1]).abs().max()) > 1e-2
    assert not torch.allclose(alone, fitted["epsilon"].sample(torch.eye(2)[1:], 4, 4, sampling), atol=1e-2)


def test_temperature_zero_draws_one_vector_and_one_draws_many(fitted: dict[str, LatentDiffusion]) -> None:
    cold = fitted["epsilon"].sample(torch.eye(2), 3, 0, SamplingConfig(num_inference_steps=10, temperature=0.0))
    assert float((cold - cold[:, :1]).abs().max()) < 1e-5


def test_guidance_moves_away_from_no_condition_and_needs_dropout(fitted: dict[str, LatentDiffusion]) -> None:
    means = [
        fitted["v_prediction"].sample(torch.eye(2), 32, 0, SamplingConfig(num_inference_steps=20, guidance_scale=scale))
        .mean(dim=(1, 2, 3)) for scale in (0.0, 1.0, 1.5)
    ]  # fmt: skip
    apart = [float(mean[1] - mean[0]) for mean in means]
    assert abs(apart[0]) < 1e-4  # scale 0 ignores the condition
    assert apart[2] > apart[1] > 1.0
    with pytest.raises(UserError, match=r"condition_dropout"):
        fitted["epsilon"].sample(torch.eye(2), 1, 0, SamplingConfig(guidance_scale=2.0))


def test_trajectory_ends_at_the_sample_and_its_prediction_sharpens(fitted: dict[str, LatentDiffusion]) -> None:
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    sampling = SamplingConfig(num_inference_steps=25)
    z_BMCL = fitted["epsilon"].sample(
        torch.eye(2), 4, 0, sampling, on_step=lambda t, x, clean: seen.append((t, x, clean))
    )
    assert [t for t, _, _ in seen] == sorted((t for t, _, _ in seen), reverse=True)
    assert seen[0][0] == 999
    assert seen[0][1].shape == z_BMCL.shape
    distances = [float((clean - z_BMCL).norm()) for _, _, clean in seen]
    assert distances[-1] < 1e-4  # the last DDIM step returns the predicted latent itself
    assert distances[0] > 10 * distances[-3]


def test_killed_training_ends_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = quick(steps=110)
    expected, expected_losses = fit(config)
    resume = ResumeState(tmp_path / "resume", every_seconds=0.0)
    saves = 0

    class DyingState(ResumeState):
        def save(self, tensors, numbers) -> None:  # type: ignore[no-untyped-def]
            nonlocal saves
            saves += 1
            if saves == 2:
                raise KeyboardInterrupt
            super().save(tensors, numbers)

    with pytest.raises(KeyboardInterrupt):
        fit(config, resume=DyingState(tmp_path / "resume", every_seconds=0.0))
    again, losses = fit(config, resume=resume)
    assert torch.equal(losses, expected_losses)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capture needs a GPU")
@pytest.mark.parametrize("compiled", [None, True])
def test_captured_training_equals_eager_training(compiled: bool | None) -> None:
    z_VCL, task_V, y_QPE = two_tasks()
    fits = [
        fit_diffusion(quick(steps=120, condition_dropout=0.1), OneHotCondition(), z_VCL, task_V, y_QPE, seed=0,
                      device="cuda", runtime=RuntimeConfig(progress=False, compile=compile))
        for compile in (False, compiled)
    ]  # fmt: skip
    (eager, eager_losses), (captured, captured_losses) = fits
    torch.testing.assert_close(captured_losses, eager_losses, atol=1e-3, rtol=1e-2)
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(captured.state_dict()[name], tensor, atol=5e-3, rtol=5e-2)


def test_saved_model_samples_bit_identically(fitted: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    fitted["epsilon"].save(tmp_path)
    seal(tmp_path)
    again = LatentDiffusion.load(tmp_path)
    sampling = SamplingConfig(num_inference_steps=5)
    assert again.config == fitted["epsilon"].config
    expected = fitted["epsilon"].sample(torch.eye(2), 3, 0, sampling)
    assert torch.equal(again.sample(torch.eye(2), 3, 0, sampling), expected)


@pytest.mark.parametrize("condition", [OneHotCondition(), LearnedCondition(width=8), TaskInfoCondition(width=8)])
def test_every_kind_of_condition_trains_its_projection_or_has_none(condition) -> None:  # type: ignore[no-untyped-def]
    y_QPE = one_hot_conditions(2)
    if condition.kind == "task_info":
        y_QPE = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    before = LatentDiffusion(quick(steps=20), condition, CHANNELS, LENGTH, y_QPE.shape[2]).projection
    model, losses = fit(quick(steps=20), condition, y_QPE)
    assert len(list(model.projection.parameters())) == len(list(before.parameters()))
    assert losses.shape == (20,)
    assert bool(losses.isfinite().all())
    sample = model.sample(y_QPE[:, 0], 2, 0, SamplingConfig(num_inference_steps=3))
    assert sample.shape == (2, 2, CHANNELS, LENGTH)


def test_scheduler_is_found_by_class_name_and_refused_by_a_wrong_one() -> None:
    assert isinstance(build_scheduler(DiffusionConfig(), "UniPCMultistepScheduler"), diffusers.UniPCMultistepScheduler)
    for name in ("dpm", "UNet2DModel", "__version__"):
        with pytest.raises(UserError, match=f"scheduler '{name}': unknown; use ddpm, ddim"):
            build_scheduler(DiffusionConfig(), name)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"num_inference_steps": 1001}, "num_inference_steps 1001: is more than num_train_timesteps 1000"),
        ({"guidance_scale": 2.0}, "guidance_scale 2: .*condition_dropout 0"),
        ({"scheduler": "dpm"}, "scheduler 'dpm': unknown"),
        ({"scheduler": "SchedulerMixin"}, "'SchedulerMixin': is for another noise process"),
        ({"scheduler": "EDMEulerScheduler"}, "'EDMEulerScheduler': is for another noise process"),
        ({"scheduler": "UnCLIPScheduler"}, "'UnCLIPScheduler': (is for another|cannot be made)"),
        ({"scheduler": "CogVideoXDPMScheduler"}, "'CogVideoXDPMScheduler': cannot take 50 steps here .*; use ddpm, ddim"),
        ({"scheduler": "PNDMScheduler", "num_inference_steps": 3}, "'PNDMScheduler': cannot take 3 steps here"),
        ({"scheduler": "DDIMInverseScheduler"}, r"its 50 steps do not undo this noise: where all data is 1 they lead to 0\.2"),
        ({"scheduler": "CogVideoXDDIMScheduler", "num_inference_steps": 5}, "its 5 steps do not undo this noise"),
    ],
)
def test_sampling_that_cannot_be_is_refused_before_anything_is_trained(sampling, message) -> None:
    config = SamplingConfig(**sampling)
    with pytest.raises(UserError, match=message):
        check_sampling(DiffusionConfig(), config)
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(tasks=(excerpt("sst2"),), sampling=config)
    with pytest.raises(ValueError, match=message):
        ZooGeneratorConfig(sampling=config)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["Euler", "EulerAncestral", "Heun", "UniPCMultistep", "DEISMultistep", "LCM", "TCD"])
def test_samplers_of_this_process_are_taken_with_few_steps(name: str, prediction_type) -> None:
    full = next(found for found in (f"{name}DiscreteScheduler", f"{name}Scheduler") if hasattr(diffusers, found))
    for beta_start in (1e-7, 1e-4, 1e-3):
        config = DiffusionConfig(prediction_type=prediction_type, beta_start=beta_start)
        check_sampling(config, SamplingConfig(scheduler=full, num_inference_steps=3))


def test_sampler_that_explodes_on_another_schedule_of_the_noise_is_refused() -> None:
    config = DiffusionConfig(beta_schedule="squaredcos_cap_v2")
    with pytest.raises(UserError, match="'PNDMScheduler': its 10 steps do not undo this noise"):
        check_sampling(config, SamplingConfig(scheduler="PNDMScheduler", num_inference_steps=10))
