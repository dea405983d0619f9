"""Conditional latent diffusion (Sec. 3.3, Eq. 2-5 and 8): conditions to latents of LoRA vectors.

The noise process and every sampler are diffusers schedulers, so a sampler is a setting. Each sample of a batch has
its own time step and x_t is never clamped (the released code does neither). p_t of Eq. 8 is read as the noised
latent. Random draws: see `training`; in sampling, candidate m of a seed is the same whatever else is in the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, TypeAdapter
from torch import nn

from cpdiff_core.artifacts import ResumeState, read_json, read_tensors, write_json, write_tensors
from cpdiff_core.config import MAX_CANDIDATES, Config, RuntimeConfig, UserError, first_line
from cpdiff_core.generator.conditions import ConditionConfig, ConditionProjection
from cpdiff_core.generator.training import TrainingConfig, generator_for, train
from cpdiff_core.generator.unet1d import UNet1d, UNetConfig

_SHORT_NAMES = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler"}


class DiffusionConfig(Config):
    """The noise process, the network and its training (Eq. 8)."""

    kind: Literal["diffusion"] = "diffusion"
    num_train_timesteps: int = Field(1000, ge=1, description="T (paper).")
    beta_start: float = Field(1e-4, gt=0, lt=1, description="First variance of the noise (paper).")
    beta_end: float = Field(2e-2, gt=0, lt=1, description="Last variance of the noise (paper).")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        "linear", description="diffusers' name of the schedule (paper: linear)."
    )
    prediction_type: Literal["epsilon", "v_prediction"] = Field(
        "epsilon", description="What the network predicts: the noise (paper), or v (Salimans & Ho, 2022)."
    )
    condition_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of samples trained without their condition, for guidance (ours: off)."
    )
    unet: UNetConfig = Field(UNetConfig(), description="The network.")
    training: TrainingConfig = Field(
        TrainingConfig(steps=4000, batch_size=256, learning_rate=2e-3, ema_decay=0.999),
        description="Optimisation (ours: AdamW, cosine, EMA).",
    )


class SamplingConfig(Config):
    """How candidates are drawn from a trained diffusion model."""

    scheduler: str = Field("ddim", description="ddpm, ddim, dpmsolver++ or the name of a diffusers scheduler class.")
    num_inference_steps: int = Field(50, ge=1, description="Reverse steps (ours: 50; the released code runs all T).")
    guidance_scale: float = Field(1.0, ge=0, description="Classifier-free guidance; 1 is off (ours).")
    eta: float = Field(0.0, ge=0, le=1, description="DDIM's share of fresh noise: 0 deterministic, 1 as DDPM.")
    temperature: float = Field(1.0, ge=0, description="Factor on the initial noise; 1 is the model's own (ours).")
    num_candidates: int = Field(20, ge=1, le=MAX_CANDIDATES, description="M (paper).")


class LatentDiffusion(nn.Module):
    """The noise predictor of Eq. 8 with the projection of its condition."""

    def __init__(
        self, config: DiffusionConfig, condition: ConditionConfig, channels: int, length: int, raw_width: int
    ) -> None:
        super().__init__()
        self.config, self.condition = config, condition
        self.channels, self.length, self.raw_width = channels, length, raw_width
        self.projection = ConditionProjection(condition, raw_width)
        self.unet = UNet1d(config.unet, channels, length, self.projection.width)
        self.no_condition_D = nn.Parameter(
            torch.zeros(self.projection.width), requires_grad=config.condition_dropout > 0
        )

    def forward(
        self, x_BCL: torch.Tensor, t_B: torch.Tensor, y_BE: torch.Tensor, without_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The prediction for x_t. without_B marks the samples whose condition is replaced by "none"."""
        y_BD = self.projection(y_BE)
        if without_B is not None:
            y_BD = torch.where(without_B.unsqueeze(1), self.no_condition_D, y_BD)
        return self.unet(x_BCL, t_B, y_BD)  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample(
        self,
        y_BE: torch.Tensor,
        num: int,
        seed: int,
        sampling: SamplingConfig,
        on_step: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Draw `num` latents for each of B conditions. Returns z_BMCL in units of the autoencoder's latents.

        y_BE: conditions as given to `fit_diffusion`. Candidate m depends on (seed, m) and its own condition only, so
        it is the same for any B and M up to rounding. on_step(t, x_BMCL, z_BMCL) sees the noised latents and the
        latents predicted from them, before each reverse step (trajectories). Raises UserError for an unknown
        scheduler, and for what `check_sampling` refuses.
        """
        check_sampling(self.config, sampling)
        scheduler = build_scheduler(self.config, sampling.scheduler)
        device = self.no_condition_D.device
        scheduler.set_timesteps(sampling.num_inference_steps, device=device)
        generators = [generator_for(torch.device("cpu"), "sampling", seed, m) for m in range(num)]
        noise_MCL = torch.stack([torch.randn(self.channels, self.length, generator=g) for g in generators])
        count = len(y_BE)
        x_VCL = noise_MCL.to(device).repeat(count, 1, 1) * sampling.temperature * scheduler.init_noise_sigma
        y_VE = y_BE.to(device).float().repeat_interleave(num, 0)
        options = _step_options(scheduler, sampling, seed, count, num)
        for t in scheduler.timesteps:
            input_VCL = scheduler.scale_model_input(x_VCL, t)
            output_VCL = self._guided(input_VCL, t.expand(len(x_VCL)), y_VE, sampling.guidance_scale)
            if on_step is not None:
                shape = (count, num, self.channels, self.length)
                clean_VCL = _clean(self.config, scheduler, t, input_VCL, output_VCL)
                on_step(int(t), x_VCL.reshape(shape), clean_VCL.reshape(shape))
            x_VCL = scheduler.step(output_VCL, t, x_VCL, **options).prev_sample
        return x_VCL.reshape(count, num, self.channels, self.length)

    def _guided(self, x_VCL: torch.Tensor, t_V: torch.Tensor, y_VE: torch.Tensor, scale: float) -> torch.Tensor:
        if scale == 1:
            return self(x_VCL, t_V, y_VE)  # type: ignore[no-any-return]
        without_V = torch.ones(len(x_VCL), dtype=torch.bool, device=x_VCL.device)
        plain_VCL = self(x_VCL, t_V, y_VE, without_V)
        return plain_VCL + scale * (self(x_VCL, t_V, y_VE) - plain_VCL)  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        """Write `diffusion.safetensors` and `diffusion.json`."""
        write_tensors(folder / "diffusion.safetensors", self.state_dict())
        write_json(
            folder / "diffusion.json",
            {
                "config": self.config.model_dump(mode="json"),
                "condition": self.condition.model_dump(mode="json"),
                "shape": {"channels": self.channels, "length": self.length, "raw_width": self.raw_width},
            },
        )

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> LatentDiffusion:
        """Read what `save` wrote in a sealed artifact. Raises UserError for a damaged file."""
        value = read_json(folder, "diffusion.json")
        condition = TypeAdapter(ConditionConfig).validate_python(value["condition"])
        with torch.device("meta"):
            model = cls(DiffusionConfig.model_validate(value["config"]), condition, **value["shape"])
        model.load_state_dict(read_tensors(folder, "diffusion.safetensors", device), assign=True)
        return model.eval().requires_grad_(False)


def fit_diffusion(
    config: DiffusionConfig,
    condition: ConditionConfig,
    z_VCL: torch.Tensor,
    task_V: torch.Tensor,
    y_QPE: torch.Tensor,
    *,
    seed: int,
    device: torch.device | str,
    runtime: RuntimeConfig,
    resume: ResumeState | None = None,
) -> tuple[LatentDiffusion, torch.Tensor]:
    """Train the conditional noise predictor (Eq. 8). Returns the model and its loss at every step.

    z_VCL: latents of all tasks, standardised; task_V: index into y_QPE of the task of each; y_QPE: P prompts of each
    of Q tasks, of which every sample of a step draws one. Raises UserError for a loss that is not finite, and
    ValueError for indices outside y_QPE.
    """
    if len(z_VCL) != len(task_V) or int(task_V.max()) >= len(y_QPE):
        raise ValueError(f"{len(z_VCL)} latents, {len(task_V)} task indices, {len(y_QPE)} conditions do not match")
    device = torch.device(device)
    z_VCL, task_V, y_QPE = z_VCL.to(device).float(), task_V.to(device), y_QPE.to(device).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LatentDiffusion(config, condition, z_VCL.shape[1], z_VCL.shape[2], y_QPE.shape[2])
    model.to(device)
    model.projection.fit_statistics(y_QPE)
    process = build_scheduler(config, "ddpm")
    process.alphas_cumprod = process.alphas_cumprod.to(device)
    size = config.training.batch_size
    stratum_B = torch.arange(size, device=device)

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        row_B = torch.randint(len(z_VCL), (size,), generator=generator, device=device)
        prompt_B = torch.randint(y_QPE.shape[1], (size,), generator=generator, device=device)
        # One t per sample, spread evenly over 0..T-1: each is uniform, and the loss of a batch varies less.
        uniform_B = (stratum_B + torch.rand(size, generator=generator, device=device)) / size
        t_B = (uniform_B * config.num_train_timesteps).long().clamp_max(config.num_train_timesteps - 1)
        without_B = torch.rand(size, generator=generator, device=device) < config.condition_dropout
        noise_BCL = torch.randn(size, model.channels, model.length, generator=generator, device=device)
        return row_B, prompt_B, t_B, without_B, noise_BCL

    def loss_of(
        row_B: torch.Tensor, prompt_B: torch.Tensor, t_B: torch.Tensor, without_B: torch.Tensor, noise_BCL: torch.Tensor
    ) -> torch.Tensor:
        z_BCL, y_BE = z_VCL[row_B], y_QPE[task_V[row_B], prompt_B]
        x_BCL = process.add_noise(z_BCL, noise_BCL, t_B)  # Eq. 2
        target_BCL = noise_BCL
        if config.prediction_type == "v_prediction":
            target_BCL = process.get_velocity(z_BCL, noise_BCL, t_B)
        prediction_BCL = model(x_BCL, t_B, y_BE, without_B if config.condition_dropout > 0 else None)
        return F.mse_loss(prediction_BCL.float(), target_BCL)  # Eq. 8

    options: dict[str, Any] = {"seed": seed, "device": device, "runtime": runtime, "resume": resume}
    losses = train("diffusion", model, loss_of, draw, config.training, **options)
    return model.eval().requires_grad_(False), losses


@lru_cache(maxsize=64)
def check_sampling(config: DiffusionConfig, sampling: SamplingConfig) -> None:
    """Whether a model with this noise process can be sampled so; known before anything is trained.

    Raises UserError for guidance of a model trained without condition dropout, for more reverse steps than T, and for
    a scheduler that is unknown, is not for this process, fails, or does not lead back to a single number.
    """
    if sampling.guidance_scale != 1 and config.condition_dropout == 0:
        raise UserError(
            f"guidance_scale {sampling.guidance_scale:g}: the model is trained with condition_dropout 0; "
            "train with e.g. 0.1 or set guidance_scale to 1"
        )
    if sampling.num_inference_steps > config.num_train_timesteps:
        raise UserError(
            f"num_inference_steps {sampling.num_inference_steps}: is more than num_train_timesteps "
            f"{config.num_train_timesteps}; use at most as many"
        )
    if sampling.scheduler in _SHORT_NAMES:
        return
    try:
        end = _end_of_a_point(config, sampling)
    except UserError:
        raise
    except Exception as error:  # each scheduler has its own faults, and none of them is of our making
        raise UserError(
            f"scheduler {sampling.scheduler!r}: cannot take {sampling.num_inference_steps} steps here ({first_line(error)}); "
            f"use {', '.join(_SHORT_NAMES)}"
        ) from error
    # Some stop at the first step of the noise and leave what it added.
    if not abs(end - 1) < max(0.02, 2 * config.beta_start**0.5):
        raise UserError(
            f"scheduler {sampling.scheduler!r}: its {sampling.num_inference_steps} steps do not undo this noise: where all data "
            f"is 1 they lead to {end:.3g}; use more steps, or {', '.join(_SHORT_NAMES)}"
        )


@torch.no_grad()
def _end_of_a_point(config: DiffusionConfig, sampling: SamplingConfig) -> float:
    """What the sampler draws where all data is the number 1 and each prediction is the true one: about 1, if it is a
    sampler of this process."""
    scheduler = build_scheduler(config, sampling.scheduler)
    scheduler.set_timesteps(sampling.num_inference_steps)
    alpha_bars = build_scheduler(config, "ddpm").alphas_cumprod
    options = _step_options(scheduler, sampling, 0, 1, 1)
    x_VCL = torch.ones(1, 1, 1) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        input_VCL = scheduler.scale_model_input(x_VCL, t)
        alpha_bar = alpha_bars[t.round().long().clamp(0, len(alpha_bars) - 1)]
        output_VCL = (input_VCL - alpha_bar.sqrt()) / (1 - alpha_bar).clamp_min(1e-12).sqrt()
        if config.prediction_type == "v_prediction":
            output_VCL = alpha_bar.sqrt() * output_VCL - (1 - alpha_bar).sqrt()
        x_VCL = scheduler.step(output_VCL, t, x_VCL, **options).prev_sample
    return float(x_VCL)


def build_scheduler(config: DiffusionConfig, name: str) -> Any:
    """The diffusers scheduler `name` for the noise process of `config`. Raises UserError for an unknown or unfit one."""
    import diffusers  # takes a second, which a run whose every stage is cached is spared

    scheduler = getattr(diffusers, _SHORT_NAMES.get(name, name), None)
    if not (inspect.isclass(scheduler) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise UserError(
            f"scheduler {name!r}: unknown; use {', '.join(_SHORT_NAMES)} or a diffusers class such as 'DDIMScheduler'"
        )
    wanted = {
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "prediction_type": config.prediction_type,
        "clip_sample": False,
        "timestep_spacing": "trailing",  # the first reverse step must be at pure noise, t = T - 1
    }
    known = inspect.signature(scheduler.__init__).parameters
    if not {"beta_start", "beta_end", "beta_schedule", "prediction_type"} <= known.keys():
        raise UserError(
            f"scheduler {name!r}: is for another noise process than one of betas (Eq. 2); use {', '.join(_SHORT_NAMES)}"
        )
    try:
        return scheduler(**{key: value for key, value in wanted.items() if key in known})
    except Exception as error:  # each has its own demands
        raise UserError(f"scheduler {name!r}: cannot be made ({first_line(error)}); use {', '.join(_SHORT_NAMES)}") from error


def _clean(
    config: DiffusionConfig, scheduler: Any, t: torch.Tensor, x_VCL: torch.Tensor, output_VCL: torch.Tensor
) -> torch.Tensor:
    """The latent that a prediction at step t implies."""
    alpha_bar = scheduler.alphas_cumprod.to(x_VCL.device)[t.long()]
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if config.prediction_type == "epsilon":
        return (x_VCL - noise * output_VCL) / signal
    return signal * x_VCL - noise * output_VCL


def _step_options(scheduler: Any, sampling: SamplingConfig, seed: int, count: int, num: int) -> dict[str, Any]:
    """What this scheduler's `step` takes of eta and generators. Every candidate has a generator of its own."""
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {}
    if "eta" in known:
        options["eta"] = sampling.eta
    if "generator" in known:
        cpu = torch.device("cpu")
        options["generator"] = [generator_for(cpu, "reverse", seed, m) for _ in range(count) for m in range(num)]
    return options
