"""LoRA fine-tuning of all styles in one batch, and the harvest of their last checkpoints (Sec. 4.2).

Rows of w_SK are runs; AdamW is elementwise, so a stack equals separate runs (tested against PEFT). Data order, flips,
time steps and noise of a run are functions of (seed, style, run, step), so it does not matter which runs share a pass.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from cpdiff_core.artifacts import Artifact, ResumeState
from cpdiff_core.config import Config, RuntimeConfig, UserError
from cpdiff_core.cuda_graphs import capture, replaying, warm_up
from cpdiff_core.domains.glue.fine_tuning import AdamW, CheckpointHarvest, batch_rows
from cpdiff_core.domains.glue.stacks import Precision, compiles_layers, device_of
from cpdiff_core.domains.style.base import StyleBase
from cpdiff_core.domains.style.denoising import DenoisingLoss
from cpdiff_core.domains.style.stack import initial_adapter
from cpdiff_core.generator.training import generator_for
from cpdiff_core.lora.layout import LoraSpec
from cpdiff_core.progress import track

READ_EVERY = 25
"""Steps between two looks at the losses on a GPU: each waits for the device."""


class StyleFineTuneConfig(Config):
    """Hyper-parameters of LoRA on a style (ours, but for the harvest: the paper states nothing else)."""

    learning_rate: float = Field(1e-3, gt=0, description="Of AdamW, constant after the warm-up (ours).")
    num_steps: int = Field(1000, ge=1, description="Optimiser steps (ours).")
    batch_size: int = Field(64, ge=1, description="Images per style and step (ours).")
    warmup_steps: int = Field(50, ge=0, description="Linear warm-up (ours).")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled (ours).")
    max_grad_norm: float = Field(1.0, gt=0, description="Each run's gradient is clipped to this norm (ours).")
    flip: bool = Field(True, description="Half of the images are mirrored (ours).")
    precision: Precision = Field("fp32", description="Of the frozen base; LoRA master weights are always float32.")
    num_harvest: int = Field(64, ge=1, description="Checkpoints kept: the last ones (paper: 64).")
    harvest_every: int = Field(10, ge=1, description="Optimiser steps between two of them (paper: 10).")
    seed: int = Field(42, ge=0, description="Of initialisation, data order and noise. All styles share the first.")

    @model_validator(mode="after")
    def _enough_steps(self) -> StyleFineTuneConfig:
        span = (self.num_harvest - 1) * self.harvest_every + 1
        if span > self.num_steps:
            raise ValueError(
                f"num_harvest {self.num_harvest} every {self.harvest_every} steps needs {span} steps, num_steps is "
                f"{self.num_steps}; raise num_steps or lower num_harvest"
            )
        return self


class StyleHarvestConfig(Config):
    """One run on one style: everything that its checkpoints depend on."""

    base: StyleBase
    style: str
    encoded: Artifact = Field(description="The style's training images and captions, as the base takes them.")
    lora: LoraSpec
    fine_tune: StyleFineTuneConfig
    run: int = Field(0, ge=0, description="Number of the run: its data order and noise.")

    @property
    def label(self) -> str:
        return f"{self.style} run {self.run}"


def check_lora(lora: LoraSpec) -> None:
    """Raises UserError for dropout, which this training has not."""
    if lora.lora_dropout:
        raise UserError(f"lora.lora_dropout {lora.lora_dropout:g}: styles train without dropout; set it to 0")


def group_key(config: StyleHarvestConfig) -> tuple[Any, ...]:
    """Runs with equal keys can share one stacked pass."""
    return config.base, config.lora, config.fine_tune


def run_seed(config: StyleHarvestConfig) -> list[int]:
    return [config.fine_tune.seed, zlib.crc32(config.style.encode()), config.run]


class StyleFineTuning:
    """S runs in one stack: images, weights, optimiser and harvested checkpoints, all on the device."""

    def __init__(self, members: Sequence[StyleHarvestConfig], root: Path, runtime: RuntimeConfig) -> None:
        if len({group_key(member) for member in members}) != 1:
            raise ValueError("the runs of one group must agree in base, LoRA shape and hyper-parameters")
        self.members = list(members)
        first = members[0]
        self.fine_tune = first.fine_tune
        check_lora(first.lora)
        self.device = device_of(runtime)
        self.data = DenoisingLoss(
            first.base, root, first.lora, [member.encoded for member in members], self.device, first.fine_tune.precision,
            compiles_layers(runtime, self.device),
        )  # fmt: skip
        for member, count in zip(members, self.data.counts, strict=True):
            if count < self.fine_tune.batch_size:
                raise UserError(
                    f"style {member.style!r}: {count} training images are fewer than fine_tune.batch_size "
                    f"{self.fine_tune.batch_size}; give more images or lower it"
                )
        w_K = initial_adapter(first.base, root, first.lora, first.fine_tune.seed)[0]
        self.w_SK = w_K.repeat(len(members), 1).to(self.device)
        self.adamw = AdamW(torch.zeros_like(self.w_SK), torch.zeros_like(self.w_SK))
        self.ring_SNK = torch.zeros(len(members), self.fine_tune.num_harvest, self.w_SK.shape[1], device=self.device)
        self.losses_ST = torch.full((len(members), self.fine_tune.num_steps), float("nan"), device=self.device)
        self.step = 0

    def run(self, runtime: RuntimeConfig, resume: ResumeState | None = None) -> list[CheckpointHarvest]:
        """Train every run to its end. Raises UserError at the first loss that is not finite."""
        if resume is not None and (state := resume.load()) is not None:
            self._restore(*state)
        total = self.fine_tune.num_steps
        every = 1 if self.device.type == "cpu" else READ_EVERY
        label = "harvest " + ", ".join(member.style for member in self.members[:3])
        label += f" and {len(self.members) - 3} more" if len(self.members) > 3 else ""
        step = self.train_step
        if self.device.type == "cuda" and runtime.capture_steps:
            step = self._captured(self.inputs_of(self.step))
        checked = self.step
        with track(label, total, runtime, done=self.step) as progress:
            while self.step < total:
                self.losses_ST[:, self.step] = step(*self.inputs_of(self.step))
                self.step += 1
                self._harvest()
                if self.step % every == 0 or self.step == total:
                    progress.step(self.step - checked, self._check_finite(checked))
                    checked = self.step
                    if resume is not None and resume.due():
                        resume.save(self._state(), {"step": self.step})
        back = torch.arange(self.fine_tune.num_harvest - 1, -1, -1) * self.fine_tune.harvest_every
        return [
            CheckpointHarvest(w_NK=self.ring_SNK[s].cpu(), steps=total - back, losses=self.losses_ST[s].cpu())
            for s in range(len(self.members))
        ]

    def inputs_of(self, step: int) -> tuple[torch.Tensor, ...]:
        """(images, flips, time steps, noise, numbers) of step `step`: S x B rows end to end. Of the numbers, the first
        is the learning rate and the others are AdamW's 1 - beta^t."""
        size = self.fine_tune.batch_size
        rows, flips, times, noises = [], [], [], []
        for member, count, first in zip(self.members, self.data.counts, self.data.first_row, strict=True):
            rows.append(torch.from_numpy(batch_rows(run_seed(member), step, size, count) + first))
            generator = generator_for(self.device, "style", *run_seed(member), step)
            uniform_2B = torch.rand(2, size, generator=generator, device=self.device)
            stratum_B = torch.arange(size, device=self.device)
            steps = self.data.num_train_timesteps
            times.append(((stratum_B + uniform_2B[0]) / size * steps).long().clamp_max(steps - 1))
            flips.append((uniform_2B[1] < 0.5) & self.fine_tune.flip)
            noises.append(torch.randn(size, *self.data.images.shape[1:], generator=generator, device=self.device))
        rate = self.fine_tune.learning_rate * min(1.0, (step + 1) / max(1, self.fine_tune.warmup_steps))
        numbers = [rate, *(1.0 - beta ** (step + 1) for beta in (self.adamw.beta1, self.adamw.beta2))]
        return (
            torch.cat(rows).to(self.device), torch.cat(flips), torch.cat(times), torch.cat(noises),
            torch.tensor(numbers, device=self.device),
        )  # fmt: skip

    def train_step(
        self, rows: torch.Tensor, flips: torch.Tensor, times: torch.Tensor, noise: torch.Tensor, numbers: torch.Tensor
    ) -> torch.Tensor:
        """One optimiser step of every run, on the device alone. Returns the losses, S."""
        w_SK = self.w_SK.detach().requires_grad_()
        loss_S = self.data.losses(w_SK, rows, flips, times, noise)
        (grad_SK,) = torch.autograd.grad(loss_S.sum(), w_SK)
        norm_S1 = torch.linalg.vector_norm(grad_SK, dim=1, keepdim=True)
        grad_SK = grad_SK * (self.fine_tune.max_grad_norm / (norm_S1 + 1e-6)).clamp(max=1.0)
        rate, correction1, correction2 = numbers.unbind()
        decay = torch.full_like(norm_S1, self.fine_tune.weight_decay)
        self.adamw.step(self.w_SK, grad_SK, rate.expand_as(norm_S1), decay, correction1, correction2)
        return loss_S.detach()

    def _captured(self, example: tuple[torch.Tensor, ...]) -> Callable[..., torch.Tensor]:
        """`train_step` as one CUDA graph. What the runs to warm up change is taken back."""
        static = tuple(tensor.clone() for tensor in example)
        own = (self.w_SK, self.adamw.mean_SK, self.adamw.square_SK)
        before = [tensor.clone() for tensor in own]
        warm_up(self.device, lambda: self.train_step(*static), 2)
        graph, loss_S = capture(self.device, lambda: self.train_step(*static))
        for tensor, value in zip(own, before, strict=True):
            tensor.copy_(value)
        return replaying(graph, static, loss_S)

    def _harvest(self) -> None:
        before_end, every = self.fine_tune.num_steps - self.step, self.fine_tune.harvest_every
        place = self.fine_tune.num_harvest - 1 - before_end // every
        if before_end % every == 0 and place >= 0:
            self.ring_SNK[:, place] = self.w_SK

    def _check_finite(self, start: int) -> float:
        losses = self.losses_ST[:, start : self.step].cpu()
        bad = torch.nonzero(~losses.isfinite())
        if len(bad):
            member = self.members[int(bad[0, 0])]
            raise UserError(
                f"style {member.style!r}: the loss of run {member.run} is not finite at step "
                f"{start + int(bad[0, 1]) + 1}; lower fine_tune.learning_rate (now {self.fine_tune.learning_rate:g})"
            )
        return float(losses[:, -1].mean())

    def _state(self) -> dict[str, torch.Tensor]:
        return {
            "w_SK": self.w_SK, "mean_SK": self.adamw.mean_SK, "square_SK": self.adamw.square_SK,
            "ring_SNK": self.ring_SNK, "losses_ST": self.losses_ST,
        }  # fmt: skip

    def _restore(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        for name, own in self._state().items():
            own.copy_(tensors[name])
        self.step = int(numbers["step"])
