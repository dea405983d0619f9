"""The one training loop of the generator's networks, eager on a CPU and one CUDA graph per step on a GPU.

Three properties hold for every loss given to `train`:

- every draw is a function of (seed, step): a generator is seeded anew for each block of steps, so a killed training
  goes on from the last block and ends bit-identical to an undisturbed one;
- a step has fixed shapes and never waits for the device: losses stay there and are read once per block;
- captured and eager steps run the same kernels in the same order, so capture changes speed only.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from cpdiff_core.artifacts import ResumeState
from cpdiff_core.config import Config, RuntimeConfig, UserError
from cpdiff_core.cuda_graphs import capture, replaying, warm_up
from cpdiff_core.progress import track

logger = logging.getLogger(__name__)

BLOCK_STEPS = 50
"""Steps between two reads of the loss, two points of resumption and two seeds. Part of a result's identity."""

Inputs = tuple[torch.Tensor, ...]


class TrainingConfig(Config):
    """How a network of the generator is optimised (AdamW)."""

    steps: int = Field(2000, ge=1, description="Optimiser steps (ours; the paper states none, its code 10-12k epochs).")
    batch_size: int = Field(64, ge=1, description="Vectors per step, drawn with replacement (ours).")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate (released code: 1e-3).")
    lr_schedule: Literal["cosine", "one_cycle", "constant"] = Field(
        "cosine", description="cosine: warm-up then cosine to 0; one_cycle: 30 % up, 70 % down; constant (ours)."
    )
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Share of the steps for linear warm-up (ours).")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (ours; released code 2e-6).")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm (ours).")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Exponential moving average of the weights, bias-corrected; None keeps the last."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of activations and products; weights and optimiser stay in float32 (ours)."
    )

    def learning_rates(self) -> torch.Tensor:
        """The learning rate of every step, [steps]."""
        position = (torch.arange(self.steps, dtype=torch.float64) + 0.5) / self.steps
        up = {"cosine": self.warmup_fraction, "one_cycle": 0.3, "constant": self.warmup_fraction}[self.lr_schedule]
        rising = position / up if up > 0 else torch.ones_like(position)
        if self.lr_schedule == "constant":
            falling = torch.ones_like(position)
        else:
            falling = 0.5 * (1 + torch.cos(math.pi * (position - up) / (1 - up)))
        return (self.learning_rate * torch.where(position < up, rising, falling)).float()


def captures(runtime: RuntimeConfig, device: torch.device) -> bool:
    """Whether a training is worth capturing and compiling: on a GPU, unless `runtime.compile` says no."""
    return device.type == "cuda" and runtime.compile is not False


def generator_for(device: torch.device, *key: object) -> torch.Generator:
    """A random generator that depends on `key` only: the same in every process."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def train(
    stage: str,
    module: nn.Module,
    loss_of: Callable[..., torch.Tensor],
    draw: Callable[[torch.Generator], Inputs],
    config: TrainingConfig,
    *,
    seed: int,
    device: torch.device,
    runtime: RuntimeConfig,
    resume: ResumeState | None = None,
) -> torch.Tensor:
    """Minimise `loss_of(*draw(generator))` over the parameters of `module`, in place. Returns the losses, [steps].

    draw: gives tensors of the same shapes at every step, on `device`, from that generator alone.
    loss_of: a scalar; it must not read values back to the host. With `ema_decay` the averaged weights stay.
    Raises UserError that names the stage and the step if a loss is not finite.
    """
    program = _Program(module, loss_of, config, device)
    start = program.restore(resume)
    step = program.step
    rates = config.learning_rates().to(device)
    with track(stage, config.steps, runtime, done=start) as progress:
        for first in range(start, config.steps, BLOCK_STEPS):
            generator = generator_for(device, stage, seed, first)
            last = min(first + BLOCK_STEPS, config.steps)
            for index in range(first, last):
                inputs = draw(generator)
                if index == start and captures(runtime, device):
                    step = program.captured(inputs, compiled=bool(runtime.compile))
                program.learning_rate.copy_(rates[index])
                program.losses[index] = step(*inputs)
            block = program.losses[first:last].cpu()
            if not bool(block.isfinite().all()):
                fault = first + int((~block.isfinite()).nonzero()[0]) + 1
                raise UserError(
                    f"{stage}: the loss is not finite at step {fault} of {config.steps}; "
                    f"lower its training.learning_rate (now {config.learning_rate:g})"
                )
            progress.step(last - first, float(block.mean()))
            if resume is not None and resume.due() and last < config.steps:
                program.save(resume, last)
    program.finish()
    return program.losses.cpu()


class _Program:
    """Parameters, optimiser, average and losses of one training, all updated in place."""

    def __init__(
        self, module: nn.Module, loss_of: Callable[..., torch.Tensor], config: TrainingConfig, device: torch.device
    ) -> None:
        self.loss_of = loss_of
        self.config = config
        self.device = device
        self.parameters: list[torch.Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.learning_rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.average = [torch.zeros_like(parameter) for parameter in self.parameters] if config.ema_decay else []
        self.losses = torch.full((config.steps,), torch.nan, device=device)
        # An update at rate 0 makes the optimiser allocate its state, so that it can be restored in place.
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    def step(self, *inputs: torch.Tensor) -> torch.Tensor:
        """One update: forward, backward, clipping, optimiser, average. Returns the loss, still on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16", cache_enabled=False
        ):
            loss = self.loss_of(*inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        if self.config.ema_decay:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - self.config.ema_decay)
        return loss.detach()

    def captured(self, example: Inputs, compiled: bool) -> Callable[..., torch.Tensor]:
        """`step` as one CUDA graph; `step` itself, with a warning, where capture fails."""
        static = tuple(tensor.clone() for tensor in example)
        before = [tensor.clone() for tensor in self._state().values()]
        eager_loss = self.loss_of
        if compiled:
            self.loss_of = torch.compile(eager_loss, dynamic=False)
        try:
            warm_up(self.device, lambda: self.step(*static), 3)
            self.optimizer.zero_grad(set_to_none=True)
            graph, loss = capture(self.device, lambda: self.step(*static))
        except RuntimeError as error:
            logger.warning("this step cannot be captured as a CUDA graph and runs eagerly: %s", error)
            self.loss_of = eager_loss
            self._copy_into_state(before)
            return self.step
        self._copy_into_state(before)
        return replaying(graph, static, loss)

    def save(self, resume: ResumeState, step: int) -> None:
        resume.save(self._state() | {"losses": self.losses}, {"step": step})

    def restore(self, resume: ResumeState | None) -> int:
        """Take over a saved state and return its step; 0 if there is none or it belongs to another network."""
        saved = resume.load() if resume is not None else None
        if saved is None:
            return 0
        tensors, numbers = saved
        own = self._state() | {"losses": self.losses}
        if {name: tensor.shape for name, tensor in tensors.items()} != {name: t.shape for name, t in own.items()}:
            return 0
        self._copy_into_state([tensors[name] for name in self._state()])
        self.losses.copy_(tensors["losses"])
        return int(numbers["step"])

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the average in the module. It started at zero, hence the correction, as in Adam."""
        if self.config.ema_decay:
            correction = 1 - self.config.ema_decay**self.config.steps
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.copy_(average / correction)
        self.optimizer.zero_grad(set_to_none=True)

    def _state(self) -> dict[str, torch.Tensor]:
        state = {f"parameter.{i}": parameter.detach() for i, parameter in enumerate(self.parameters)}
        state |= {f"average.{i}": average for i, average in enumerate(self.average)}
        for i, parameter in enumerate(self.parameters):
            state |= {f"{name}.{i}": tensor for name, tensor in self.optimizer.state[parameter].items()}
        return state

    @torch.no_grad()
    def _copy_into_state(self, values: Sequence[torch.Tensor]) -> None:
        for target, source in zip(self._state().values(), values, strict=True):
            target.copy_(source)
