"""LoRA fine-tuning of many runs in one batch, and the harvest of their last checkpoints (Sec. 4.1).

Each run has its own data order and dropout, drawn from its own seeds, so it does not matter which other runs
share the batch: the results agree within rounding, and bit for bit for the same group on the same device. The
frozen base runs in eval mode: its own dropout is off, which differs from the usual Trainer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, model_validator

from cpdiff_core.artifacts import ResumeState
from cpdiff_core.config import Config, RuntimeConfig, UserError
from cpdiff_core.cuda_graphs import capture, warm_up
from cpdiff_core.domains.base_models import FAMILIES, BaseModel, cached_classifier
from cpdiff_core.domains.glue.data import ResolvedTask, SplitConfig, tokenize
from cpdiff_core.domains.glue.stacks import Places, Precision, Stack, build_stack, row_length
from cpdiff_core.lora.layout import LoraSpec, initial_vector
from cpdiff_core.lora.packing import join
from cpdiff_core.progress import track


class FineTuneConfig(Config):
    """Hyper-parameters of LoRA fine-tuning. The paper gives none: ours, measured on a held-out split."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak of AdamW. Measured on MiniLM; the released code has 1e-4.")
    num_steps: int = Field(1200, ge=1, description="Optimiser steps of a run, if num_epochs is None.")
    num_epochs: float | None = Field(None, gt=0, description="Length of a run in epochs instead (released code: 20).")
    batch_size: int = Field(32, ge=1, description="Examples per step. Released code: 16.")
    warmup_steps: int = Field(100, ge=0, description="Linear warm-up. Measured on MiniLM.")
    warmup_ratio: float | None = Field(None, ge=0, le=1, description="Warm-up as a share of the run instead (released: 0.1).")
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = Field(
        "constant_with_warmup", description="After the warm-up: constant, or to zero at the end of the run."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled (AdamW). Released code: 0.1.")
    max_grad_norm: float = Field(1.0, gt=0, description="Each run's gradient is clipped to this norm, as in the Trainer.")
    max_length: int = Field(128, ge=4, le=512, description="Tokens of one example (released code: 128).")
    precision: Precision = Field("fp32", description="Of the frozen base; LoRA master weights are always float32.")
    num_harvest: int = Field(150, ge=1, description="Checkpoints kept: the last ones of the run. The paper's N is 150.")
    harvest_every: int = Field(1, ge=1, description="Optimiser steps between two of them. The paper: 1 for language.")
    same_initialization: bool = Field(True, description="All runs and tasks start from the same LoRA weights (ours).")
    seed: int = Field(42, ge=0, description="Of initialisation, data order and dropout. Released code: 42.")

    @model_validator(mode="after")
    def _enough_steps(self) -> FineTuneConfig:
        span = (self.num_harvest - 1) * self.harvest_every + 1
        if self.num_epochs is None and span > self.num_steps:
            raise ValueError(
                f"num_harvest {self.num_harvest} every {self.harvest_every} steps needs {span} steps, num_steps is "
                f"{self.num_steps}; raise num_steps or lower num_harvest"
            )
        return self

    def steps_for(self, num_examples: int) -> int:
        """Optimiser steps of a run over `num_examples` training examples."""
        if self.num_epochs is None:
            return self.num_steps
        return max(1, round(self.num_epochs * num_examples / self.batch_size))

    def learning_rates(self, num_steps: int) -> NDArray[np.float64]:
        """The learning rate of each step, num_steps values."""
        step = np.arange(num_steps, dtype=np.float64)
        warmup = self.warmup_steps if self.warmup_ratio is None else round(self.warmup_ratio * num_steps)
        factor = np.minimum(1.0, (step + 1) / max(1, warmup))
        left = np.clip((num_steps - step) / max(1, num_steps - warmup), 0.0, 1.0)
        if self.lr_scheduler_type == "linear":
            factor = np.minimum(factor, left)
        elif self.lr_scheduler_type == "cosine":
            factor = np.minimum(factor, 0.5 * (1.0 - np.cos(math.pi * left)))
        return self.learning_rate * factor


class HarvestConfig(Config):
    """One run of one task: everything that its checkpoints depend on, but the head."""

    base: BaseModel
    task: ResolvedTask
    splits: SplitConfig
    lora: LoraSpec
    fine_tune: FineTuneConfig
    run: int = Field(0, ge=0, description="Number of the run: its data order, and its initialisation unless that is shared.")

    @property
    def label(self) -> str:
        return f"{self.task.name} run {self.run}"


@dataclass(frozen=True)
class CheckpointHarvest:
    """w_NK: the last N checkpoints, float32, oldest first. steps: after how many steps each was taken.
    losses: the training loss of every step of the run."""

    w_NK: torch.Tensor
    steps: torch.Tensor
    losses: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"w_NK": self.w_NK, "steps": self.steps, "losses": self.losses}


def group_key(config: HarvestConfig) -> tuple[Any, ...]:
    """Runs with equal keys can share one stacked pass."""
    fine_tune = config.fine_tune
    return (
        config.base, config.lora, fine_tune.precision, fine_tune.max_length, fine_tune.batch_size, fine_tune.num_harvest,
        fine_tune.max_grad_norm,
    )  # fmt: skip


def run_seed(config: HarvestConfig) -> list[int]:
    return [config.fine_tune.seed, zlib.crc32(config.task.name.encode()), config.run]


@lru_cache(maxsize=512)
def _epoch_order(seed: tuple[int, ...], epoch: int, num_examples: int) -> NDArray[np.int64]:
    return np.random.default_rng([*seed, epoch]).permutation(num_examples)


def batch_rows(seed: Sequence[int], step: int, batch_size: int, num_examples: int) -> NDArray[np.int64]:
    """Examples of step `step`: B consecutive places in an endless sequence of reshuffled epochs."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(places, num_examples)
    parts = [
        _epoch_order(tuple(seed), epoch, num_examples)[offsets[epochs == epoch]]
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
    ]
    return np.concatenate(parts)


def initial_weights(config: HarvestConfig) -> torch.Tensor:
    """w_K as PEFT initialises it, from the config's seed (and the run's number, unless runs share theirs)."""
    family = FAMILIES[config.base.family]
    seed = config.fine_tune.seed
    if not config.fine_tune.same_initialization:
        seed = int(np.random.SeedSequence(run_seed(config)).generate_state(1)[0])
    classifier, _ = cached_classifier(config.base, config.task.task.num_classes)
    return initial_vector(classifier, config.lora, family.target_modules, family.block_pattern, seed)[0]


@dataclass
class AdamW:
    """AdamW over the rows of w_SK, each with its own learning rate and decay. Equals torch.optim.AdamW row by row."""

    mean_SK: torch.Tensor
    square_SK: torch.Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    @torch.no_grad()
    def step(
        self, w_SK: torch.Tensor, grad_SK: torch.Tensor, rate_S1: torch.Tensor, decay_S1: torch.Tensor,
        correction1: torch.Tensor, correction2: torch.Tensor,
    ) -> None:  # fmt: skip
        """correction1, correction2: 1 - beta^t of this step, scalars on the device."""
        w_SK.mul_(1.0 - rate_S1 * decay_S1)
        self.mean_SK.lerp_(grad_SK, 1.0 - self.beta1)
        self.square_SK.mul_(self.beta2).addcmul_(grad_SK, grad_SK, value=1.0 - self.beta2)
        denominator = (self.square_SK / correction2).sqrt_().add_(self.eps)
        w_SK.sub_(self.mean_SK / denominator * (rate_S1 / correction1))


def stacked_losses(
    logits_SBC: torch.Tensor, targets_SB: torch.Tensor, class_mask_SC: torch.Tensor, regression_S: torch.Tensor
) -> torch.Tensor:
    """The mean loss of each adapter's batch, S: cross-entropy over its own classes, or squared error."""
    masked = logits_SBC.masked_fill(~class_mask_SC[:, None, :], float("-inf"))
    classes = torch.where(regression_S[:, None], 0.0, targets_SB).long()
    entropy = F.cross_entropy(masked.flatten(0, 1), classes.flatten(), reduction="none").view_as(targets_SB)
    squared = (logits_SBC[..., 0] - targets_SB) ** 2
    return torch.where(regression_S[:, None], squared, entropy).mean(dim=1)


@dataclass(frozen=True)
class StepInputs:
    """All that differs from step to step. rows_SB: examples, places_SB: where their tokens lie; keys_S: seeds of the
    dropout; rates_S: learning rates; corrections_2: 1 - beta^t of AdamW's two moments."""

    rows_SB: torch.Tensor
    places_SB: torch.Tensor
    keys_S: torch.Tensor
    rates_S: torch.Tensor
    corrections_2: torch.Tensor

    def to(self, device: torch.device) -> StepInputs:
        if device.type == "cpu":
            return self
        return StepInputs(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in self._tensors()))

    def copy_(self, other: StepInputs) -> None:
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs)

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.rows_SB, self.places_SB, self.keys_S, self.rates_S, self.corrections_2


class FineTuning:
    """S runs in one stack: data, weights, optimiser and the ring of harvested checkpoints, all on the device.

    settings: what of an experiment says how they are trained, for errors.
    """

    def __init__(
        self, members: Sequence[HarvestConfig], heads: Sequence[Mapping[str, torch.Tensor]], runtime: RuntimeConfig,
        settings: str = "fine_tune",
    ):  # fmt: skip
        if len({group_key(member) for member in members}) != 1:
            raise ValueError("the runs of one group must agree in base, LoRA shape, batch, length, precision and harvest")
        self.members = list(members)
        self.settings = settings
        first = members[0]
        self.batch_size = first.fine_tune.batch_size
        self.max_grad_norm = first.fine_tune.max_grad_norm
        self.num_classes = max(member.task.task.num_classes for member in members)
        self.stack: Stack = build_stack(first.base, first.lora, self.num_classes, first.fine_tune.precision, runtime)
        data = [tokenize(member.task, member.splits, "train", member.base, member.fine_tune.max_length) for member in members]
        self.num_examples = [len(texts) for texts, _ in data]
        self.num_steps = [m.fine_tune.steps_for(n) for m, n in zip(members, self.num_examples, strict=True)]
        for member, steps in zip(members, self.num_steps, strict=True):
            span = (member.fine_tune.num_harvest - 1) * member.fine_tune.harvest_every + 1
            if steps < span:
                raise UserError(
                    f"task {member.task.name!r}: num_harvest {member.fine_tune.num_harvest} needs {span} steps, "
                    f"{member.fine_tune.num_epochs} epochs are {steps}; raise num_epochs or lower num_harvest"
                )
        device = self.stack.device
        texts, self.first_row = join([texts for texts, _ in data])
        self.texts = texts.to(device)
        self.lengths = texts.lengths.numpy()
        self.row_length = row_length(int(self.lengths.max()), device)
        self.labels = torch.from_numpy(np.concatenate([labels for _, labels in data])).float().to(device)
        self.w_SK = torch.stack([initial_weights(member) for member in members]).to(device)
        self.adamw = AdamW(torch.zeros_like(self.w_SK), torch.zeros_like(self.w_SK))
        num_harvest = first.fine_tune.num_harvest
        self.ring_SNK = torch.zeros(len(members), num_harvest, self.w_SK.shape[1], device=device)
        self.losses_ST = torch.full((len(members), max(self.num_steps)), float("nan"), device=device)
        self.heads = self.stack.model.stack_heads(list(heads), self.num_classes)
        classes = torch.tensor([member.task.task.num_classes for member in members])
        self.class_mask_SC = (torch.arange(self.num_classes)[None] < classes[:, None]).to(device)
        self.regression_S = torch.tensor([member.task.task.labels is None for member in members], device=device)
        self.decay_S1 = torch.tensor([[member.fine_tune.weight_decay] for member in members], device=device)
        self.rates_TS = np.zeros((max(self.num_steps), len(members)), np.float32)
        for s, member in enumerate(members):
            self.rates_TS[: self.num_steps[s], s] = member.fine_tune.learning_rates(self.num_steps[s])
        self.step = 0

    def run(self, runtime: RuntimeConfig, resume: ResumeState | None = None) -> list[CheckpointHarvest]:
        """Train every run to its end. Raises UserError at the first loss that is not finite."""
        if resume is not None and (state := resume.load()) is not None:
            self._restore(*state)
        total, checked = max(self.num_steps), self.step
        label = "harvest " + ", ".join(member.label for member in self.members[:3])
        label += f" and {len(self.members) - 3} more" if len(self.members) > 3 else ""
        every = 1 if self.stack.device.type == "cpu" else READ_EVERY  # reading a loss waits for the device
        on_gpu = self.stack.device.type == "cuda"
        program = StepProgram(self, capture=runtime.capture_steps and on_gpu)
        here = torch.cuda.device(self.stack.device) if on_gpu else nullcontext()
        with here, track(label, total, runtime, done=self.step) as progress:
            while self.step < total:
                self.losses_ST[:, self.step] = program(self.step)
                self.step += 1
                self._harvest()
                if self.step % every == 0 or self.step == total:
                    loss = self._check_finite(checked)
                    progress.step(self.step - checked, loss)
                    checked = self.step
                    if resume is not None and resume.due():
                        resume.save(self._state(), {"step": self.step})
        return [self._result(s) for s in range(len(self.members))]

    def inputs_of(self, step: int, multiple: int = 1) -> tuple[StepInputs, int]:
        """What step `step` needs besides the resident data, on the host, and the number of its rows."""
        rows = [
            batch_rows(run_seed(member), step, self.batch_size, count) + first
            for member, count, first in zip(self.members, self.num_examples, self.first_row, strict=True)
        ]
        keys = np.zeros(len(rows), np.int64)
        if self.members[0].lora.lora_dropout > 0:
            keys = np.array(
                [np.random.SeedSequence([*run_seed(m), step]).generate_state(1)[0] for m in self.members], np.int64
            )
        corrections = [1.0 - beta ** (step + 1) for beta in (self.adamw.beta1, self.adamw.beta2)]
        rows_SB = np.stack(rows)
        places = self.stack.places(self.lengths[rows_SB], self.row_length, multiple)
        inputs = StepInputs(
            rows_SB=torch.from_numpy(rows_SB), places_SB=places.places_SB, keys_S=torch.from_numpy(keys),
            rates_S=torch.from_numpy(self.rates_TS[step]), corrections_2=torch.tensor(corrections),
        )  # fmt: skip
        return inputs, places.num_rows

    def train_step(self, inputs: StepInputs, num_rows: int) -> torch.Tensor:
        """One optimiser step of every run, on the device alone. Returns the losses, S."""
        keys_S = inputs.keys_S if self.members[0].lora.lora_dropout > 0 else None
        places = Places(inputs.places_SB, num_rows, self.row_length)
        batch = self.stack.batch(self.texts, inputs.rows_SB, places, keys_S)
        targets_SB = self.labels[inputs.rows_SB]
        w_SK = self.w_SK.detach().requires_grad_()
        logits = self.stack.model(w_SK, self.heads, batch)
        loss_S = stacked_losses(logits, targets_SB, self.class_mask_SC, self.regression_S)
        (grad_SK,) = torch.autograd.grad(loss_S.sum(), w_SK)
        norm_S1 = torch.linalg.vector_norm(grad_SK, dim=1, keepdim=True)
        grad_SK = grad_SK * (self.max_grad_norm / (norm_S1 + 1e-6)).clamp(max=1.0)
        correction1, correction2 = inputs.corrections_2.unbind()
        self.adamw.step(self.w_SK, grad_SK, inputs.rates_S[:, None], self.decay_S1, correction1, correction2)
        return loss_S.detach()

    def _check_finite(self, start: int) -> float:
        """The mean loss of the last step, after every loss since step `start` has been found finite."""
        losses = self.losses_ST[:, start : self.step].cpu()
        for s, member in enumerate(self.members):
            bad = torch.nonzero(~losses[s, : max(0, self.num_steps[s] - start)].isfinite())
            if len(bad):
                raise UserError(
                    f"task {member.task.name!r}: the loss of run {member.run} is not finite at step {start + int(bad[0]) + 1}; "
                    f"lower {self.settings}.learning_rate (now {member.fine_tune.learning_rate:g}) or check the data"
                )
        return float(losses[:, -1].nanmean())

    def _harvest(self) -> None:
        """Copy the rows whose step belongs to the harvest: the last of a run, and every `harvest_every` before it."""
        places: dict[int, list[int]] = {}
        for s, member in enumerate(self.members):
            before_end, every = self.num_steps[s] - self.step, member.fine_tune.harvest_every
            place = member.fine_tune.num_harvest - 1 - before_end // every
            if before_end >= 0 and before_end % every == 0 and place >= 0:
                places.setdefault(place, []).append(s)
        for place, rows in places.items():
            if len(rows) == len(self.members):
                self.ring_SNK[:, place] = self.w_SK
            else:
                self.ring_SNK[rows, place] = self.w_SK[rows]

    def _result(self, s: int) -> CheckpointHarvest:
        fine_tune = self.members[s].fine_tune
        back = torch.arange(fine_tune.num_harvest - 1, -1, -1) * fine_tune.harvest_every
        return CheckpointHarvest(
            w_NK=self.ring_SNK[s].cpu(), steps=self.num_steps[s] - back, losses=self.losses_ST[s, : self.num_steps[s]].cpu()
        )

    def _state(self) -> dict[str, torch.Tensor]:
        return {
            "w_SK": self.w_SK, "mean_SK": self.adamw.mean_SK, "square_SK": self.adamw.square_SK, "ring_SNK": self.ring_SNK,
            "losses_ST": self.losses_ST,
        }  # fmt: skip

    def _restore(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        self.w_SK.copy_(tensors["w_SK"])
        self.adamw.mean_SK.copy_(tensors["mean_SK"])
        self.adamw.square_SK.copy_(tensors["square_SK"])
        self.ring_SNK.copy_(tensors["ring_SNK"])
        self.losses_ST.copy_(tensors["losses_ST"])
        self.step = int(numbers["step"])


READ_EVERY = 50
"""Steps between two looks at the losses on a GPU."""
ROW_STEP = 4
"""Captured steps come in shapes of so many rows; a step is filled up to the next one with empty rows."""


class StepProgram:
    """Runs `FineTuning.train_step`, on CUDA as one captured graph per shape: the host only copies the inputs."""

    def __init__(self, tuning: FineTuning, capture: bool) -> None:
        self.tuning = tuning
        self.capture = capture
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._losses: dict[int, torch.Tensor] = {}
        self._static: StepInputs | None = None

    def prepare(self, step: int) -> int:
        """Load the inputs of a step and capture its shape if it is new. Returns the shape."""
        host, num_rows = self.tuning.inputs_of(step, ROW_STEP if self.capture else 1)
        inputs = host.to(self.tuning.stack.device)
        if self._static is None or not self.capture:  # only a captured step reads its inputs from fixed places
            self._static = inputs
        else:
            self._static.copy_(inputs)
        if self.capture and num_rows not in self._graphs:
            self._capture(self._static, num_rows)
        return num_rows

    def __call__(self, step: int) -> torch.Tensor:
        num_rows = self.prepare(step)
        if not self.capture:
            assert self._static is not None
            return self.tuning.train_step(self._static, num_rows)
        self._graphs[num_rows].replay()
        return self._losses[num_rows]

    def _capture(self, static: StepInputs, num_rows: int) -> None:
        """Capture the step at one shape. The run made to warm up is taken back."""
        tuning = self.tuning
        state = [tensor.clone() for tensor in (tuning.w_SK, tuning.adamw.mean_SK, tuning.adamw.square_SK)]
        device = tuning.stack.device
        warm_up(device, lambda: tuning.train_step(static, num_rows), 1)
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        graph, losses = capture(device, lambda: tuning.train_step(static, num_rows), pool)
        self._graphs[num_rows], self._losses[num_rows] = graph, losses
        for tensor, before in zip((tuning.w_SK, tuning.adamw.mean_SK, tuning.adamw.square_SK), state, strict=True):
            tensor.copy_(before)
