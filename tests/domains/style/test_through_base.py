"""The generator's objective through the base: its gradient against PEFT and autograd, what it trains, resumption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from style_bases import encoded_style, injected, saved_tiny_base

from cpdiff_core.artifacts import ResumeState
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.style.denoising import DenoisingLoss
from cpdiff_core.domains.style.stack import initial_adapter
from cpdiff_core.domains.style.through_base import (
    ThroughBase,
    ThroughBaseObjective,
    fit_through_base,
    stacked_statistics,
)
from cpdiff_core.generator.autoencoder import ConvAutoencoderConfig, ParameterAutoencoder, fit_autoencoder
from cpdiff_core.generator.conditions import StyleImageCondition
from cpdiff_core.generator.diffusion import DiffusionConfig, LatentDiffusion, SamplingConfig
from cpdiff_core.generator.normalization import NormalizationConfig, Normalizer
from cpdiff_core.generator.training import TrainingConfig
from cpdiff_core.generator.unet1d import UNetConfig
from cpdiff_core.lora.layout import LoraSpec

CPU, QUIET = torch.device("cpu"), RuntimeConfig(device="cpu", progress=False)
LORA = LoraSpec(rank=2, lora_alpha=6.0)
NAMES = ("ink", "oil", "chalk")
CONFIG = DiffusionConfig(
    prediction_type="v_prediction", unet=UNetConfig(width=16, multipliers=(1, 2), time_width=16),
)  # fmt: skip


class Setting:
    """A random base, three styles of random images, an autoencoder fitted on random vectors near PEFT's start."""

    def __init__(self, root: Path) -> None:
        (root / "base").mkdir()
        self.base, _ = saved_tiny_base(root / "base")
        artifacts = [encoded_style(root, name, num=6 + q, seed=q) for q, name in enumerate(NAMES)]
        self.data = DenoisingLoss(self.base, root, LORA, artifacts, CPU, "fp32")
        w_K, _ = initial_adapter(self.base, Path(), LORA, 0)
        torch.manual_seed(0)
        harvests = {name: w_K + 0.1 * torch.randn(6, len(w_K)) + 0.1 * torch.randn(len(w_K)) for name in NAMES}
        normalizer = Normalizer.fit(NormalizationConfig(), harvests)
        self.statistics = stacked_statistics(normalizer, NAMES)
        w_VK = torch.cat([normalizer.normalize(name, w_NK) for name, w_NK in harvests.items()])
        config = ConvAutoencoderConfig(channels=4, length=8, training=TrainingConfig(steps=2, batch_size=8))
        self.autoencoder, _ = fit_autoencoder(
            config, w_VK, torch.arange(3).repeat_interleave(6), seed=0, device=CPU, runtime=QUIET
        )
        self.normalizer, self.y_QPE = normalizer, torch.randn(3, 2, 20)

    def fit(
        self, objective: ThroughBaseObjective, **options: object
    ) -> tuple[LatentDiffusion, ParameterAutoencoder, torch.Tensor]:
        own = ParameterAutoencoder(self.autoencoder.config, self.autoencoder.num_parameters)
        own.load_state_dict(self.autoencoder.state_dict())
        values = {"config": CONFIG, "y_QPE": self.y_QPE} | options
        resume = values.pop("resume", None)
        return fit_through_base(
            objective, values["config"], StyleImageCondition(width=8), own.requires_grad_(False), self.statistics,
            self.data, values["y_QPE"], seed=0, device=CPU, runtime=QUIET, resume=resume,
        )  # type: ignore[arg-type]  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("through_base"))


def objective(steps: int = 3, **changes: object) -> ThroughBaseObjective:
    training = TrainingConfig(steps=steps, batch_size=4, learning_rate=1e-2)
    return ThroughBaseObjective(**({"images_per_adapter": 3, "training": training} | changes))


@pytest.mark.parametrize("from_noise", [0.0, 1.0])
def test_gradient_equals_autograd_through_a_plain_peft_model(setting: Setting, from_noise: float) -> None:
    torch.manual_seed(1)
    model = LatentDiffusion(CONFIG, StyleImageCondition(width=8), 4, 8, 20)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))  # an untrained network's output is 0
    model.projection.fit_statistics(setting.y_QPE)
    wanted = objective(from_noise=from_noise, training=TrainingConfig(steps=1, batch_size=1))
    whole = ThroughBase(wanted, model, setting.autoencoder, setting.statistics, setting.data, setting.y_QPE)
    inputs = whole.draw(torch.Generator().manual_seed(3))
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(whole.loss(*inputs), trained)

    # The reference: the same latent by its formula, the vector by the library's own calls, the loss by PEFT alone.
    style, prompt, noise, t, _, _, rows, flips, times, image_noise = inputs
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0).float()
    y = setting.y_QPE[style, prompt]
    a = alphas[-1]
    latent = a.sqrt() * noise[0] - (1 - a).sqrt() * model(noise[0], torch.tensor([999]), y)
    if not from_noise:
        a = alphas[t]
        x = a.sqrt() * latent.detach() + (1 - a).sqrt() * noise[1]
        latent = a.sqrt() * x - (1 - a).sqrt() * model(x, t, y)
    w_1K = setting.normalizer.invert(NAMES[int(style)], setting.autoencoder.decoder(latent))
    peft_model = injected(setting.base, w_1K[0].detach(), LORA)
    data = setting.data
    images = data.images[rows].float() / 127.5 - 1
    images = torch.stack([image.flip(2) if flip else image for image, flip in zip(images, flips, strict=True)])
    a = data.process.alphas_cumprod[times].view(-1, 1, 1, 1)
    captions = data.captions.rows(data.caption_of[rows])
    output = peft_model(
        a.sqrt() * images + (1 - a).sqrt() * image_noise, encoder_hidden_states=captions.states_PTE, timestep=times,
        encoder_attention_mask=captions.mask_PT, added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample  # fmt: skip
    loss = F.mse_loss(output, a.sqrt() * image_noise - (1 - a).sqrt() * images)
    loss.backward()
    gradient_K = torch.cat([p.grad.flatten() for name, p in peft_model.named_parameters() if "lora_" in name])
    expected = torch.autograd.grad(w_1K, trained, gradient_K[None])
    torch.testing.assert_close(whole.loss(*inputs), loss, rtol=1e-4, atol=1e-5)
    largest = max(float(part.abs().max()) for part in expected)
    assert largest > 1e-4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * largest)


def test_every_draw_is_of_images_of_its_own_style(setting: Setting) -> None:
    model = LatentDiffusion(CONFIG, StyleImageCondition(width=8), 4, 8, 20)
    whole = ThroughBase(
        objective(training=TrainingConfig(steps=1, batch_size=64)), model, setting.autoencoder, setting.statistics,
        setting.data, setting.y_QPE,
    )  # fmt: skip
    style_S, _, _, t_S, from_noise_S, _, rows, *_ = whole.draw(torch.Generator().manual_seed(0))
    first = torch.tensor([0, 6, 13, 21])
    rows_SB = rows.view(64, 3)
    assert bool((rows_SB >= first[style_S, None]).all())
    assert bool((rows_SB < first[style_S + 1, None]).all())
    assert rows.unique().numel() > 15
    assert 16 < int(from_noise_S.sum()) < 48
    assert t_S.max() > 800 > 200 > t_S.min()


def test_training_lowers_the_loss_moves_the_decoder_and_leaves_the_encoder(setting: Setting) -> None:
    model, autoencoder, losses = setting.fit(objective(40, from_noise=1.0))
    assert losses[-8:].mean() < losses[:8].mean()
    before, after = setting.autoencoder.state_dict(), autoencoder.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"out_of", "decoder_blocks"}
    z = model.sample(setting.y_QPE[:2, 0], 3, 0, SamplingConfig(num_inference_steps=3))
    assert z.shape == (2, 3, 4, 8)
    assert not any(p.requires_grad for part in (model, autoencoder) for p in part.parameters())
    _, fixed, _ = setting.fit(objective(2, train_decoder=False))
    assert all(torch.equal(value, fixed.state_dict()[name]) for name, value in before.items())


def test_killed_training_ends_bit_for_bit_the_same(setting: Setting, tmp_path: Path) -> None:
    long = objective(60)
    whole, decoder, losses = setting.fit(long)
    state = ResumeState(tmp_path, every_seconds=0.0)
    real_save = state.save

    class Killed(Exception):
        pass

    def save_and_die(*arguments: object) -> None:
        real_save(*arguments)  # type: ignore[arg-type]
        raise Killed

    state.save = save_and_die  # type: ignore[method-assign,assignment]
    with pytest.raises(Killed):
        setting.fit(long, resume=state)
    again, again_decoder, again_losses = setting.fit(long, resume=ResumeState(tmp_path, every_seconds=1e9))
    assert torch.equal(losses, again_losses)
    for one, other in ((whole, again), (decoder, again_decoder)):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_what_cannot_be_trained_is_refused(setting: Setting) -> None:
    with pytest.raises(ValueError, match="v_prediction"):
        setting.fit(objective(), config=DiffusionConfig())
    with pytest.raises(ValueError, match="3 styles with images, 2 with conditions"):
        setting.fit(objective(), y_QPE=setting.y_QPE[:2])
