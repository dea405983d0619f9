"""From LoRA vectors to images: many adapters sampled in one batch, a fixed set of prompts, the same noise for all.

Image k of every adapter has the same caption and the same initial noise, so arms are compared image by image. The
noise of image k depends on (seed, k) alone, whatever else is in the batch.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field

from cpdiff_core.config import Config, RuntimeConfig
from cpdiff_core.domains.style.base import BaseSpec, Captions
from cpdiff_core.domains.style.stack import StackedPixArt
from cpdiff_core.generator.diffusion import build_scheduler
from cpdiff_core.generator.training import generator_for
from cpdiff_core.progress import track


class ImageSamplingConfig(Config):
    """How images are drawn to score a vector (the paper states neither number, size nor steps: ours)."""

    num_images: int = Field(256, ge=4, description="Images per vector; the same number in every arm (ours).")
    scheduler: str = Field("ddim", description="ddpm, ddim, dpmsolver++ or the name of a diffusers scheduler class.")
    num_inference_steps: int = Field(25, ge=1, description="Reverse steps (ours).")
    guidance_scale: float = Field(1.5, ge=0, description="Classifier-free guidance on the caption; 1 is off (ours).")
    seed: int = Field(0, ge=0, description="Of noise and prompts; choosing and reporting never share noise.")


def draw_prompts(classes: Sequence[str], num: int) -> list[str]:
    """`num` classes in the proportions of `classes` (largest remainders), so that the prompt mix is the style's own."""
    counts = Counter(classes)
    exact = {name: num * count / len(classes) for name, count in sorted(counts.items())}
    whole = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: whole[name] - exact[name])[: num - sum(whole.values())]:
        whole[name] += 1
    prompts = [name for name, count in whole.items() for _ in range(count)]
    return [prompts[i] for i in np.random.default_rng(0).permutation(num)]


@torch.no_grad()
def sample_images(
    stack: StackedPixArt, spec: BaseSpec, w_VK: torch.Tensor, captions: Captions, config: ImageSamplingConfig,
    seed: int, device: torch.device, label: str, runtime: RuntimeConfig,
) -> torch.Tensor:  # fmt: skip
    """Samples of every vector for every caption, [V, n, channels, size, size] in the base's space, float32 on the CPU.

    captions: of the n prompts, then the empty one. All vectors are sampled together, as many images at a time as the
    device is given.
    """
    num = len(captions.mask_PT) - 1
    dtype = stack.transformer.proj_out.weight.dtype
    shape = (spec.channels, spec.size, spec.size)
    noise_NCHW = torch.stack([torch.randn(shape, generator=_noise(seed, k)) for k in range(num)])
    budget = runtime.tokens_per_batch or (64 if device.type == "cpu" else 2048)
    group = min(len(w_VK), runtime.adapters_per_batch or max(1, budget // min(num, 64)))
    width = max(1, budget // group)
    out = torch.empty(len(w_VK), num, *shape)
    with track(label, len(w_VK) * num, runtime, unit="image") as progress:
        for first in range(0, len(w_VK), group):
            part_SK = w_VK[first : first + group].to(device)
            for start in range(0, num, width):
                rows = torch.arange(start, min(start + width, num))
                count = len(rows)
                chosen = captions.rows(torch.cat([rows, torch.tensor([num])])).to(device, dtype)
                x_SBCHW = _reverse(stack, spec, part_SK, noise_NCHW[rows].to(device), chosen, config, seed, start)
                out[first : first + len(part_SK), start : start + count] = x_SBCHW.cpu()
                progress.step(len(part_SK) * count)
    return out


def _noise(seed: int, k: int, what: str = "image") -> torch.Generator:
    return generator_for(torch.device("cpu"), what, seed, k)


def _reverse(
    stack: StackedPixArt, spec: BaseSpec, w_SK: torch.Tensor, noise_BCHW: torch.Tensor, captions: Captions,
    config: ImageSamplingConfig, seed: int, start: int,
) -> torch.Tensor:  # fmt: skip
    """The reverse process of one batch of S x B images."""
    num, batch = len(w_SK), len(noise_BCHW)
    scheduler = build_scheduler(spec.process, config.scheduler)
    scheduler.set_timesteps(config.num_inference_steps, device=noise_BCHW.device)
    x_VCHW = noise_BCHW.repeat(num, 1, 1, 1) * scheduler.init_noise_sigma
    guided = config.guidance_scale != 1
    predict = _predictor(stack, w_SK, captions, guided, config.guidance_scale, batch)
    options: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = [_noise(seed, start + k, "reverse") for _ in range(num) for k in range(batch)]
    for t in scheduler.timesteps:
        prediction = predict(scheduler.scale_model_input(x_VCHW, t), t)
        x_VCHW = scheduler.step(prediction, t, x_VCHW, **options).prev_sample
    return x_VCHW.unflatten(0, (num, batch))


def _predictor(
    stack: StackedPixArt, w_SK: torch.Tensor, captions: Captions, guided: bool, scale: float, batch: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The model's output at (x_VCHW, t), guided if asked; the two passes of guidance share one batch."""
    num = len(w_SK)
    own = torch.arange(batch, device=w_SK.device)
    rows_B = torch.cat([own, torch.full_like(own, batch)]) if guided else own
    chosen = captions.rows(rows_B.repeat(num))

    def predict(x_VCHW: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if not guided:
            return stack(w_SK, x_VCHW, t.expand(len(x_VCHW)), chosen)  # type: ignore[no-any-return]
        x_SBCHW = x_VCHW.unflatten(0, (num, batch))
        twice = torch.cat([x_SBCHW, x_SBCHW], dim=1).flatten(0, 1)
        out = stack(w_SK, twice, t.expand(len(twice)), chosen).unflatten(0, (num, 2, batch))
        return (out[:, 1] + scale * (out[:, 0] - out[:, 1])).flatten(0, 1)  # type: ignore[no-any-return]

    return predict
