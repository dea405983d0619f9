"""The conditional 1-D U-Net of Eq. 8: noise in a latent, given its time step and its condition.

Down- and up-sampling with skips, GroupNorm, one time step per sample. Two things differ from an image U-Net, since
a position of a LoRA latent is not like its neighbours: the first and last maps are untied (`PositionLinear`), and
the condition reaches every position by a linear map of its own besides scale and shift in every block (FiLM).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from cpdiff_core.config import Config
from cpdiff_core.generator.layers import PositionLinear, sinusoidal


class UNetConfig(Config):
    """Size of the U-Net (ours: the paper states none)."""

    width: int = Field(128, ge=8, multiple_of=8, description="Channels at full length (ours).")
    multipliers: tuple[int, ...] = Field((1, 2, 2), min_length=1, description="Width per level; each halves L (ours).")
    blocks_per_level: int = Field(1, ge=1, description="Residual blocks per level on either side (ours).")
    time_width: int = Field(128, ge=8, multiple_of=2, description="Width of the sinusoidal time embedding (ours).")


class UNet1d(nn.Module):
    """x_BCL, t_B, y_BD -> prediction of the shape of x. Zero at the start of training."""

    def __init__(self, config: UNetConfig, channels: int, length: int, condition_width: int) -> None:
        super().__init__()
        self.config = config
        self.width, self.length = config.width, length
        embedding = 2 * config.width
        self.time = nn.Sequential(
            nn.Linear(config.time_width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.condition = nn.Linear(condition_width, embedding)
        self.condition_map = nn.Linear(condition_width, config.width * length)
        self.into = nn.Conv1d(channels, config.width, 3, padding=1)
        self.position_CL = nn.Parameter(torch.zeros(config.width, length))
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        previous = config.width
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            blocks = [_Block(previous if i == 0 else width, width, embedding) for i in range(config.blocks_per_level)]
            halve = nn.Identity() if last else nn.Conv1d(width, width, 3, stride=2, padding=1)
            self.down.append(nn.ModuleList([*blocks, halve]))
            previous = width
        self.middle = _Block(previous, previous, embedding)
        for width in reversed(widths):
            blocks = [
                _Block(previous + width if i == 0 else width, width, embedding) for i in range(config.blocks_per_level)
            ]
            self.up.append(nn.ModuleList(blocks))
            previous = width
        self.norm = nn.GroupNorm(8, config.width * config.multipliers[0])
        self.out_of = nn.Conv1d(config.width * config.multipliers[0], channels, 3, padding=1)
        self.gain = nn.Linear(embedding, channels)
        for layer in (self.out_of, self.gain):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, 0.0)  # type: ignore[arg-type]

    def forward(self, x_BCL: torch.Tensor, t_B: torch.Tensor, y_BD: torch.Tensor) -> torch.Tensor:
        e_BE = F.silu(self.time(sinusoidal(t_B, self.config.time_width)) + self.condition(y_BD))
        h_BCL = self.into(x_BCL) + self.position_CL
        h_BCL = h_BCL + self.condition_map(y_BD).unflatten(1, (self.width, self.length))
        skips = []
        for *blocks, halve in self.down:  # type: ignore[misc]
            for block in blocks:
                h_BCL = block(h_BCL, e_BE)
            skips.append(h_BCL)
            h_BCL = halve(h_BCL)
        h_BCL = self.middle(h_BCL, e_BE)
        for blocks in self.up:
            skip_BCL = skips.pop()
            if h_BCL.shape[2] != skip_BCL.shape[2]:
                h_BCL = _doubled(h_BCL, skip_BCL.shape[2])
            h_BCL = torch.cat([h_BCL, skip_BCL], dim=1)
            for block in blocks:  # type: ignore[attr-defined]
                h_BCL = block(h_BCL, e_BE)
        out_BCL = self.out_of(F.silu(self.norm(h_BCL)))
        return out_BCL + self.gain(e_BE).unsqueeze(2) * x_BCL


class _Block(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with scale and shift from the embedding in between, and a skip."""

    def __init__(self, in_channels: int, channels: int, embedding: int) -> None:
        super().__init__()
        self.first_norm = nn.GroupNorm(8, in_channels)
        self.first = nn.Conv1d(in_channels, channels, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * channels)
        self.last_norm = nn.GroupNorm(8, channels)
        self.last = nn.Conv1d(channels, channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == channels else nn.Conv1d(in_channels, channels, 1)
        for layer in (self.film, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_BCL: torch.Tensor, e_BE: torch.Tensor) -> torch.Tensor:
        scale_BC, shift_BC = self.film(e_BE).unsqueeze(2).chunk(2, dim=1)
        h_BCL = self.first(F.silu(self.first_norm(x_BCL)))
        h_BCL = self.last_norm(h_BCL) * (1 + scale_BC) + shift_BC
        return self.skip(x_BCL) + self.last(F.silu(h_BCL))


def _doubled(x_BCL: torch.Tensor, length: int) -> torch.Tensor:
    """Nearest up-sampling to `length`; `interpolate` has no deterministic gradient on every device."""
    return x_BCL.unsqueeze(3).expand(-1, -1, -1, 2).flatten(2)[:, :, :length]
