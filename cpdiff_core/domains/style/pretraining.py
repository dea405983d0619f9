"""A tiny PixArt from scratch on photographs: the embedded default in the place of PixArt-alpha (ours).

Flips, an averaged model and a learning rate that decays to 0; all transformer gates start at 0 (as DiT does), which
an untrained diffusers model does not. With a thousand photographs the model ends near its training images: reports
show the nearest one beside each sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from cpdiff_core.artifacts import ResumeState, write_json, write_tensors
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.style.base import (
    PIXELS,
    SPEC_FILE,
    TEMPLATES,
    Captions,
    PretrainedBase,
    to_model_range,
)
from cpdiff_core.domains.style.styles import StyleImages
from cpdiff_core.generator.diffusion import build_scheduler
from cpdiff_core.generator.training import captures, train

_FILE_BYTES = 14 * 2**20
_PROCESS_FIELDS = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"}


def caption_rows(images: StyleImages) -> tuple[list[str], torch.Tensor]:
    """(the classes, sorted, and the index of each image's)."""
    classes = sorted(set(images.classes))
    return classes, torch.tensor([classes.index(name) for name in images.classes])


def pretrain(
    config: PretrainedBase, images: StyleImages, captions: Captions, *, seed: int, device: torch.device,
    runtime: RuntimeConfig, resume: ResumeState | None = None,
) -> tuple[Any, torch.Tensor]:  # fmt: skip
    """Train on `images`. Returns the model, averaged, and its loss at every step.

    captions: of class c in template k at row 3 c + k (`caption_rows`, TEMPLATES), the empty one last.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = config.size.build()
        start_quietly(model)
    model.to(device)
    if captures(runtime, device):
        for block in model.transformer_blocks:  # one program, which serves every block
            block.compile(dynamic=False)
        runtime = runtime.model_copy(update={"compile": None})  # the rest of the step is captured, not compiled
    x_NCHW = to_model_range(images.images_NCHW).to(device)
    class_N = caption_rows(images)[1].to(device)
    captions = captions.to(device)
    empty = len(captions.mask_PT) - 1
    process = build_scheduler(PIXELS, "ddpm")
    process.alphas_cumprod = process.alphas_cumprod.to(device)
    size, steps = config.training.batch_size, PIXELS.num_train_timesteps
    stratum_B = torch.arange(size, device=device)

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        row_B = torch.randint(len(x_NCHW), (size,), generator=generator, device=device)
        chance_3B = torch.rand(3, size, generator=generator, device=device)
        t_B = ((stratum_B + chance_3B[0]) / size * steps).long().clamp_max(steps - 1)
        template_B = torch.randint(len(TEMPLATES), (size,), generator=generator, device=device)
        caption_B = torch.where(chance_3B[1] < config.caption_dropout, empty, class_N[row_B] * len(TEMPLATES) + template_B)
        noise_BCHW = torch.randn(size, *x_NCHW.shape[1:], generator=generator, device=device)
        return row_B, chance_3B[2] < 0.5, t_B, caption_B, noise_BCHW

    def loss_of(
        row_B: torch.Tensor, flip_B: torch.Tensor, t_B: torch.Tensor, caption_B: torch.Tensor, noise_BCHW: torch.Tensor
    ) -> torch.Tensor:
        x_BCHW = x_NCHW[row_B]
        x_BCHW = torch.where(flip_B.view(-1, 1, 1, 1), x_BCHW.flip(3), x_BCHW)
        target_BCHW = process.get_velocity(x_BCHW, noise_BCHW, t_B)
        inputs: dict[str, Any] = {
            "encoder_hidden_states": captions.states_PTE[caption_B], "encoder_attention_mask": captions.mask_PT[caption_B],
            "timestep": t_B, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False,
        }  # fmt: skip
        weights = computing_weights(model, config.training.precision)
        noisy_BCHW = process.add_noise(x_BCHW, noise_BCHW, t_B)
        prediction_BCHW = functional_call(model, weights, (noisy_BCHW,), inputs)[0]
        return F.mse_loss(prediction_BCHW.float(), target_BCHW)

    options: dict[str, Any] = {"seed": seed, "device": device, "runtime": runtime, "resume": resume}
    losses = train("pretrain style base", model, loss_of, draw, config.training, **options)
    for block in model.transformer_blocks:
        block._compiled_call_impl = None  # a compiled block cannot be copied
    return model.eval().requires_grad_(False), losses


def computing_weights(model: nn.Module, precision: Literal["float32", "bfloat16"]) -> dict[str, torch.Tensor]:
    """The weights as the forward pass takes them: bfloat16 as a whole where it computes in that, so that blocks hand on
    bfloat16 too. Autocast alone leaves gates and scales in float32, and with them every sum of a block."""
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, weights if precision == "float32" else _Halved.apply(*weights), strict=True))


class _Halved(torch.autograd.Function):
    """Tensors -> their bfloat16 copies, and the gradients back to float32, all in one call each."""

    @staticmethod
    def forward(ctx: Any, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights]
        torch._foreach_copy_(out, list(weights))
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = [torch.empty_like(grad, dtype=torch.float32) for grad in grads]
        torch._foreach_copy_(out, list(grads))
        return tuple(out)


@torch.no_grad()
def start_quietly(model: Any) -> None:
    """Every block starts as the identity and the output at 0 (Peebles & Xie 2023, adaLN-Zero; PixArt's own code)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(model.adaln_single.linear.weight)
    nn.init.zeros_(model.proj_out.weight)
    for block in model.transformer_blocks:
        block.scale_shift_table[[2, 5]] = 0  # the gates of attention and of the feed-forward layer
        nn.init.zeros_(block.attn2.to_out[0].weight)


def save_base(model: Any, folder: Path) -> None:
    """Write `base.json` and the weights it names: float16, in files of at most `_FILE_BYTES`, as code hosts like them."""
    files: list[dict[str, torch.Tensor]] = [{}]
    for name, value in model.state_dict().items():
        half = value.half()
        if sum(part.nbytes for part in files[-1].values()) + half.nbytes > _FILE_BYTES:
            files.append({})
        files[-1][name] = half
    names = [f"transformer-{number}-of-{len(files)}.safetensors" for number in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        write_tensors(folder / name, tensors)
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    value = {"transformer": config, "process": PIXELS.model_dump(include=_PROCESS_FIELDS), "weights": names}
    write_json(folder / SPEC_FILE, value)
