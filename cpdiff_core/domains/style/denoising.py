"""The diffusion loss of LoRA adapters on the images of their styles, through the frozen base.

It is what fine-tuning minimises over one adapter per style, and what `through_base.py` minimises over the generator
that makes the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cpdiff_core.artifacts import Artifact, read_tensors
from cpdiff_core.domains.glue.stacks import Precision
from cpdiff_core.domains.style.base import Captions, StyleBase, spec_of, to_model_range
from cpdiff_core.domains.style.stack import StackedPixArt, build_stack
from cpdiff_core.generator.diffusion import build_scheduler
from cpdiff_core.lora.layout import LoraSpec

ENCODED_FILE = "encoded.safetensors"


class DenoisingLoss:
    """A frozen base with the training images of Q styles, all on one device.

    Images of all styles lie end to end: those of style q are rows first_row[q] to first_row[q] + counts[q].
    """

    def __init__(
        self, base: StyleBase, root: Path, lora: LoraSpec, encoded: Sequence[Artifact], device: torch.device,
        precision: Precision, compiled: bool = False,
    ) -> None:  # fmt: skip
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.process = build_scheduler(spec_of(base, root).process, "ddpm")
        self.process.alphas_cumprod = self.process.alphas_cumprod.to(device)
        self.stack: StackedPixArt = build_stack(base, root, lora, device, dtype, compiled)
        data = [read_tensors(artifact.under(root), ENCODED_FILE) for artifact in encoded]
        self.counts = [len(tensors["images"]) for tensors in data]
        self.images = torch.cat([tensors["images"] for tensors in data]).to(device)
        self.first_row = np.cumsum([0, *self.counts[:-1]])
        starts = np.cumsum([0, *(len(tensors["mask_PT"]) for tensors in data)])
        self.captions = Captions(
            torch.cat([tensors["states_PTE"] for tensors in data]), torch.cat([tensors["mask_PT"] for tensors in data])
        ).to(device, dtype)
        self.caption_of = torch.cat([t["caption_N"] + int(s) for t, s in zip(data, starts[:-1], strict=True)]).to(device)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.process.alphas_cumprod)

    def losses(
        self, w_SK: torch.Tensor, rows: torch.Tensor, flips: torch.Tensor, times: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The mean loss of each adapter on its own images, [S], differentiable in w_SK.

        rows, flips, times and noise are of S x B images, those of one adapter together.
        """
        images = self.images[rows]
        x_VCHW = to_model_range(images) if images.dtype == torch.uint8 else images
        x_VCHW = torch.where(flips.view(-1, 1, 1, 1), x_VCHW.flip(3), x_VCHW)
        target = noise
        if self.process.config.prediction_type == "v_prediction":
            target = self.process.get_velocity(x_VCHW, noise, times)
        noisy = self.process.add_noise(x_VCHW, noise, times)
        prediction = self.stack(w_SK, noisy, times, self.captions.rows(self.caption_of[rows]))
        return (prediction - target).square().unflatten(0, (len(w_SK), -1)).mean((1, 2, 3, 4))
