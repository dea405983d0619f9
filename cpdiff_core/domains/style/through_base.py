"""The generator trained on what its adapters do: the styles' own diffusion loss, through the frozen base (ours).

The network is that of Eq. 8 and it is sampled in the same way; only the loss is another. Eq. 8 asks for the latents of
harvested checkpoints, which says nothing about conditions that have none. Here the latent that the network predicts is
decoded and de-normalised to a LoRA vector, the vector joins the frozen base, and the loss is the base's denoising error
on images of the style whose image was the condition. No harvested vector is a target; the decoder's start is all that
is taken from them.

In sampling the network sees its own latents, noised, so it is trained on them: from pure noise it predicts a latent,
which is noised again to a random t and, without a gradient through the first pass, predicted anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from cpdiff_core.artifacts import ResumeState
from cpdiff_core.config import Config, RuntimeConfig
from cpdiff_core.domains.style.denoising import DenoisingLoss
from cpdiff_core.generator.autoencoder import ParameterAutoencoder
from cpdiff_core.generator.conditions import StyleImageCondition
from cpdiff_core.generator.diffusion import DiffusionConfig, LatentDiffusion, build_scheduler
from cpdiff_core.generator.normalization import Normalizer
from cpdiff_core.generator.training import TrainingConfig, train


class WeightObjective(Config):
    """Eq. 8: the noise in the latents of harvested checkpoints (paper)."""

    kind: Literal["weights"] = "weights"


class ThroughBaseObjective(Config):
    """The diffusion loss of the styles' images, through the decoder and the frozen base."""

    kind: Literal["through_base"] = "through_base"
    images_per_adapter: int = Field(16, ge=1, description="Images of its style that each adapter of a step is tried on.")
    from_noise: float = Field(0.5, ge=0, le=1, description="Share of adapters predicted from pure noise, at t = T - 1.")
    train_decoder: bool = Field(True, description="Also train the decoder; it starts as the autoencoder's.")
    training: TrainingConfig = Field(
        TrainingConfig(steps=2000, batch_size=16, learning_rate=5e-4, ema_decay=0.995),
        description="Optimisation; batch_size is adapters per step. It stands in the place of diffusion.training.",
    )


Objective = Annotated[WeightObjective | ThroughBaseObjective, Field(discriminator="kind")]


def stacked_statistics(normalizer: Normalizer, styles: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) of every style, [Q, 1 or K], as `Normalizer.invert` uses them."""
    tensors = normalizer.tensors()
    names = [style if f"{style}/mean" in tensors else "all" for style in styles]
    mean, std = (torch.stack([tensors[f"{name}/{kind}"] for name in names]) for kind in ("mean", "std"))
    return mean, std


class ThroughBase:
    """The objective: adapters of S conditions by the generator, and their losses on images."""

    def __init__(
        self, objective: ThroughBaseObjective, model: LatentDiffusion, autoencoder: ParameterAutoencoder,
        statistics: tuple[torch.Tensor, torch.Tensor], data: DenoisingLoss, y_QPE: torch.Tensor,
    ) -> None:  # fmt: skip
        self.objective, self.model, self.autoencoder, self.data = objective, model, autoencoder, data
        self.device = y_QPE.device
        self.y_QPE = y_QPE
        self.mean, self.std = (part.to(self.device) for part in statistics)
        self.process = build_scheduler(model.config, "ddpm")
        self.process.alphas_cumprod = self.process.alphas_cumprod.to(self.device)
        self.count_Q = torch.tensor(data.counts, device=self.device)
        self.first_Q = torch.tensor(data.first_row, device=self.device)

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Style, prompt, noise and t of S adapters, then row, flip, t and noise of S x B images."""
        num, each = self.objective.training.batch_size, self.objective.images_per_adapter
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        style_S = torch.randint(len(self.y_QPE), (num,), **options)
        prompt_S = torch.randint(self.y_QPE.shape[1], (num,), **options)
        noise_2SCL = torch.randn(2, num, self.model.channels, self.model.length, **options)
        t_S = torch.randint(self.model.config.num_train_timesteps, (num,), **options)
        chance_2S = torch.rand(2, num, **options)
        from_noise_S = chance_2S[0] < self.objective.from_noise
        without_S = chance_2S[1] < self.model.config.condition_dropout
        uniform_3SB = torch.rand(3, num, each, **options)
        rows_SB = self.first_Q[style_S, None] + (uniform_3SB[0] * self.count_Q[style_S, None]).long()
        steps = self.data.num_train_timesteps
        stratum_SB = torch.arange(each, device=self.device).expand(num, each)
        times_SB = ((stratum_SB + uniform_3SB[1]) / each * steps).long().clamp_max(steps - 1)
        noise_VCHW = torch.randn(num * each, *self.data.images.shape[1:], **options)
        return (
            style_S, prompt_S, noise_2SCL, t_S, from_noise_S, without_S, rows_SB.flatten(),
            (uniform_3SB[2] < 0.5).flatten(), times_SB.flatten(), noise_VCHW,
        )  # fmt: skip

    def vectors(
        self, style_S: torch.Tensor, prompt_S: torch.Tensor, noise_2SCL: torch.Tensor, t_S: torch.Tensor,
        from_noise_S: torch.Tensor, without_S: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The adapters w_SK that the generator makes of the conditions."""
        y_SE = self.y_QPE[style_S, prompt_S]
        dropped_S = without_S if self.model.config.condition_dropout > 0 else None
        last_S = torch.full_like(t_S, self.model.config.num_train_timesteps - 1)
        first_SCL = self._clean(noise_2SCL[0], last_S, y_SE, dropped_S)
        x_SCL = self.process.add_noise(first_SCL.detach(), noise_2SCL[1], t_S)
        z_SCL = torch.where(from_noise_S[:, None, None], first_SCL, self._clean(x_SCL, t_S, y_SE, dropped_S))
        return self.autoencoder.decoder(z_SCL) * self.std[style_S] + self.mean[style_S]

    def loss(
        self, style_S: torch.Tensor, prompt_S: torch.Tensor, noise_2SCL: torch.Tensor, t_S: torch.Tensor,
        from_noise_S: torch.Tensor, without_S: torch.Tensor, rows: torch.Tensor, flips: torch.Tensor,
        times: torch.Tensor, noise: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The mean over adapters of their diffusion loss, a scalar."""
        w_SK = self.vectors(style_S, prompt_S, noise_2SCL, t_S, from_noise_S, without_S)
        return self.data.losses(w_SK, rows, flips, times, noise).mean()

    def _clean(
        self, x_SCL: torch.Tensor, t_S: torch.Tensor, y_SE: torch.Tensor, without_S: torch.Tensor | None
    ) -> torch.Tensor:
        """The latent that the predicted velocity implies: sqrt(a) x_t - sqrt(1 - a) v."""
        alpha_S11 = self.process.alphas_cumprod[t_S].view(-1, 1, 1)
        v_SCL = self.model(x_SCL, t_S, y_SE, without_S).float()
        return alpha_S11.sqrt() * x_SCL - (1 - alpha_S11).sqrt() * v_SCL  # type: ignore[no-any-return]


def fit_through_base(
    objective: ThroughBaseObjective, config: DiffusionConfig, condition: StyleImageCondition,
    autoencoder: ParameterAutoencoder, statistics: tuple[torch.Tensor, torch.Tensor], data: DenoisingLoss,
    y_QPE: torch.Tensor, *, seed: int, device: torch.device, runtime: RuntimeConfig, resume: ResumeState | None = None,
) -> tuple[LatentDiffusion, ParameterAutoencoder, torch.Tensor]:  # fmt: skip
    """Train the generator from random weights. Returns it, the autoencoder with its decoder, and the loss of each step.

    autoencoder: on `device`; its decoder is trained in place. statistics: of the Q styles of y_QPE, whose images are
    those of `data`. Raises ValueError for a network that predicts noise: at t = T - 1 the latent is noise divided by
    nearly nothing.
    """
    if config.prediction_type != "v_prediction":
        raise ValueError("the objective through_base needs diffusion.prediction_type 'v_prediction'")
    if not len(data.counts) == len(y_QPE) == len(statistics[0]):
        raise ValueError(f"{len(data.counts)} styles with images, {len(y_QPE)} with conditions: they must be the same")
    y_QPE = y_QPE.to(device).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LatentDiffusion(config, condition, autoencoder.channels, autoencoder.length, y_QPE.shape[2])
    model.to(device)
    model.projection.fit_statistics(y_QPE)
    trained = nn.ModuleList([model])
    if objective.train_decoder and autoencoder.config.kind == "conv":
        trained += [autoencoder.decoder_blocks, autoencoder.out_of]
        trained[1:].requires_grad_(True)
    whole = ThroughBase(objective, model, autoencoder, statistics, data, y_QPE)
    options: dict[str, Any] = {"seed": seed, "device": device, "runtime": runtime, "resume": resume}
    losses = train("generator through the base", trained, whole.loss, whole.draw, objective.training, **options)
    autoencoder.eval().requires_grad_(False)
    return model.eval().requires_grad_(False), autoencoder, losses
