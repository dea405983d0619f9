"""The autoencoder against PCA (scikit-learn) on trajectories that look like harvests: few tasks, smooth drift."""

from pathlib import Path

import pytest
import torch
from sklearn.decomposition import PCA

from cpdiff_core.artifacts import seal
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.generator.autoencoder import (
    ConvAutoencoderConfig,
    IdentityAutoencoderConfig,
    ParameterAutoencoder,
    fit_autoencoder,
    pca_within_task_variance_explained,
    within_task_variance_explained,
)
from cpdiff_core.generator.normalization import NormalizationConfig, Normalizer
from cpdiff_core.generator.training import TrainingConfig

RUNTIME = RuntimeConfig(progress=False)
FEW_STEPS = TrainingConfig(steps=30, batch_size=32, learning_rate=3e-4)


def trajectories(num_tasks: int = 4, num_checkpoints: int = 60, size: int = 1500) -> dict[str, torch.Tensor]:
    """Checkpoints of one training run per task: a common start, a mean of its own, a smooth random walk around it."""
    generator = torch.Generator().manual_seed(0)
    start_K = 0.05 * torch.randn(size, generator=generator)
    harvests = {}
    for task in range(num_tasks):
        mean_K = 0.02 * torch.randn(size, generator=generator)
        steps_NK = torch.randn(num_checkpoints, size, generator=generator)
        momentum_NK = torch.stack([steps_NK[max(0, i - 9) : i + 1].mean(0) for i in range(num_checkpoints)])
        harvests[f"task {task}"] = start_K + mean_K + 0.002 * momentum_NK.cumsum(0)
    return harvests


def pooled(axis: str = "vector", **options: int) -> tuple[torch.Tensor, torch.Tensor]:
    harvests = trajectories(**options)
    normalizer = Normalizer.fit(NormalizationConfig(axis=axis), harvests)  # type: ignore[arg-type]
    w_VK = torch.cat([normalizer.normalize(task, w_NK) for task, w_NK in harvests.items()])
    return w_VK, torch.arange(len(harvests)).repeat_interleave(len(w_VK) // len(harvests))


def fit(config, w_VK, task_V, **options):  # type: ignore[no-untyped-def]
    return fit_autoencoder(config, w_VK, task_V, seed=0, device="cpu", runtime=RUNTIME, **options)


@pytest.mark.parametrize("axis", ["vector", "coordinate"])
def test_conv_explains_at_least_the_within_task_variance_of_a_pca_of_16_components(axis: str) -> None:
    w_VK, task_V = pooled(axis)
    model, _ = fit(ConvAutoencoderConfig(channels=32, length=8, training=FEW_STEPS), w_VK, task_V)
    ours = within_task_variance_explained(w_VK, model.decode(model.encode(w_VK)), task_V)
    pca = PCA(16, svd_solver="full").fit(w_VK.numpy())
    reference = torch.tensor(pca.inverse_transform(pca.transform(w_VK.numpy())))
    assert ours >= within_task_variance_explained(w_VK, reference, task_V)


def test_pca_reference_equals_scikit_learn() -> None:
    w_VK, task_V = pooled()
    pca = PCA(16, svd_solver="full").fit(w_VK.double().numpy())
    reference = torch.tensor(pca.inverse_transform(pca.transform(w_VK.double().numpy())))
    expected = within_task_variance_explained(w_VK, reference, task_V)
    assert pca_within_task_variance_explained(w_VK, task_V, 16) == pytest.approx(expected, abs=1e-5)


def test_explained_variance_is_zero_for_task_means_one_for_copies_and_half_for_half_the_deviation() -> None:
    w_VK, task_V = pooled()
    mean_VK = torch.stack([w_VK[task_V == task].mean(0) for task in task_V])
    assert within_task_variance_explained(w_VK, mean_VK, task_V) == pytest.approx(0.0, abs=1e-6)
    assert within_task_variance_explained(w_VK, w_VK, task_V) == 1.0
    halfway_VK = mean_VK + 0.5 * (w_VK - mean_VK)
    assert within_task_variance_explained(w_VK, halfway_VK, task_V) == pytest.approx(0.75, abs=1e-4)
    assert within_task_variance_explained(w_VK, mean_VK + 1.0, task_V) < 0.0


@pytest.mark.filterwarnings("error:std")
@pytest.mark.parametrize("num_vectors", [1, 8])
@pytest.mark.parametrize("size", [1500, 1499])
def test_conv_overfits_few_vectors(num_vectors: int, size: int) -> None:
    w_VK = torch.randn(num_vectors, size, generator=torch.Generator().manual_seed(1))
    model, _ = fit(ConvAutoencoderConfig(channels=16, length=8, training=FEW_STEPS), w_VK, torch.zeros(num_vectors))
    error = (model.decode(model.encode(w_VK)) - w_VK).square().mean() / w_VK.square().mean()
    assert float(error) < 1e-4
    assert bool(model.encode(w_VK).isfinite().all())


def test_training_lowers_the_loss_that_the_components_leave_under_latent_noise() -> None:
    """The components are the best linear start without noise only: gradient descent must improve on them with it."""
    w_VK, task_V = pooled()
    training = TrainingConfig(steps=200, batch_size=64, learning_rate=3e-3)
    config = ConvAutoencoderConfig(channels=16, length=8, latent_noise_std=0.3, training=training)
    _, losses = fit(config, w_VK, task_V)
    assert float(losses[-20:].mean()) < 0.7 * float(losses[0])


@pytest.mark.parametrize("config", [ConvAutoencoderConfig(channels=16, length=8, training=FEW_STEPS),
                                    IdentityAutoencoderConfig(length=8)], ids=["conv", "identity"])  # fmt: skip
def test_latents_have_zero_mean_and_unit_variance(config) -> None:  # type: ignore[no-untyped-def]
    w_VK, task_V = pooled()
    model, _ = fit(config, w_VK, task_V)
    z_VCL = model.encode(w_VK)
    assert z_VCL.shape == (len(w_VK), model.channels, model.length)
    torch.testing.assert_close(z_VCL.mean(0), torch.zeros_like(z_VCL[0]), atol=1e-3, rtol=0)
    used = z_VCL.std(0, correction=0) > 0.5  # padded coordinates of `identity` have no variance
    torch.testing.assert_close(
        z_VCL.std(0, correction=0)[used], torch.ones_like(z_VCL[0])[used], atol=1e-3, rtol=0
    )
    assert int((~used).sum()) == max(0, model.channels * model.length - 1500 if config.kind == "identity" else 0)


def test_a_channel_means_the_same_at_every_position() -> None:
    """What moves the whole vector moves each channel alike along L: a convolution presumes it."""
    w_VK, task_V = pooled()
    model, _ = fit(ConvAutoencoderConfig(channels=16, length=8, training=FEW_STEPS), w_VK, task_V)
    z_VCL = model.encode(w_VK)
    shared_C = z_VCL.mean(2).var(0) / z_VCL.var(0).mean(1)
    assert float(shared_C[:8].min()) > 0.8  # 1/8 if positions were independent


def test_identity_reconstructs_exactly() -> None:
    w_VK, task_V = pooled(size=1499)
    model, losses = fit(IdentityAutoencoderConfig(length=8), w_VK, task_V)
    torch.testing.assert_close(model.decode(model.encode(w_VK)), w_VK, atol=1e-5, rtol=1e-4)
    assert losses.numel() == 0


def test_reconstruction_does_not_depend_on_the_scale_of_the_vectors() -> None:
    w_VK, task_V = pooled()
    config = ConvAutoencoderConfig(channels=16, length=8, training=FEW_STEPS)
    explained = []
    for scale in (1e-3, 1.0):
        model, _ = fit(config, scale * w_VK, task_V)
        explained.append(within_task_variance_explained(scale * w_VK, model.decode(model.encode(scale * w_VK)), task_V))
    assert explained[0] == pytest.approx(explained[1], abs=2e-3)


def test_channels_shrink_to_the_parameter_limit() -> None:
    model = ParameterAutoencoder(ConvAutoencoderConfig(channels=64, length=8, max_parameters=60_000), 1500)
    maps = sum(layer.weight.numel() for layer in (model.into, model.out_of))
    assert model.channels == 19
    assert maps <= 60_000


def test_saved_autoencoder_encodes_and_decodes_bit_identically(tmp_path: Path) -> None:
    w_VK, task_V = pooled()
    model, _ = fit(ConvAutoencoderConfig(channels=16, length=8, training=FEW_STEPS), w_VK, task_V)
    model.save(tmp_path)
    seal(tmp_path)
    again = ParameterAutoencoder.load(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.encode(w_VK), model.encode(w_VK))
    assert torch.equal(again.decode(again.encode(w_VK)), model.decode(model.encode(w_VK)))


def test_wrong_shapes_are_refused_with_both_shapes() -> None:
    w_VK, task_V = pooled()
    model, _ = fit(IdentityAutoencoderConfig(length=8), w_VK, task_V)
    with pytest.raises(ValueError, match=r"1400.*1500"):
        model.encode(w_VK[:, :1400])
    with pytest.raises(ValueError, match=r"\(1, 3, 8\).*188, 8"):
        model.decode(torch.zeros(1, 3, 8))
    with pytest.raises(UserError, match=r"one per vector"):
        fit(IdentityAutoencoderConfig(), w_VK, task_V[:-1])
