"""The conditional 1-D U-Net of Eq. 8: the noise in a latent, given its time step and its condition.

Down- and up-sampling with skips, GroupNorm, one time step per sample. What an image U-Net lacks and this one has:
a learned map of positions, the condition at every position by a linear map of its own besides scale and shift in
every block (FiLM), and a gain per channel on the input, depending on time and condition: most of the noise of a
channel is predicted by x_t alone, and a network that must copy it through every layer learns that slowly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from cpdiff_core.config import Config
from cpdiff_core.generator.layers import sinusoidal, zeroed


class UNetConfig(Config):
    """Size of the U-Net (ours: the paper states none)."""

    width: int = Field(128, ge=8, multiple_of=8, description="Channels at full length (ours).")
    multipliers: tuple[int, ...] = Field((1, 1, 1), min_length=1, description="Width per level; each halves L (ours).")
    blocks_per_level: int = Field(1, ge=1, description="Residual blocks per level on either side (ours).")
    time_width: int = Field(128, ge=8, multiple_of=2, description="Width of the sinusoidal time embedding (ours).")


class UNet1d(nn.Module):
    """x_BCL, t_B, y_BD -> a prediction of the shape of x. It is zero at the start of training."""

    def __init__(self, config: UNetConfig, channels: int, length: int, condition_width: int) -> None:
        super().__init__()
        self.config, self.length = config, length
        embedding = 2 * config.width
        self.time = nn.Sequential(nn.Linear(config.time_width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.condition = nn.Linear(condition_width, embedding)
        self.condition_map = nn.Linear(condition_width, config.width * length)
        self.position_CL = nn.Parameter(torch.zeros(config.width, length))
        self.into = nn.Conv1d(channels, config.width, 3, padding=1)
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.down = nn.ModuleList()
        previous = config.width
        for width in widths:
            self.down.append(_Level(previous, width, embedding, config.blocks_per_level))
            previous = width
        self.halve = nn.ModuleList(nn.Conv1d(width, width, 3, stride=2, padding=1) for width in widths[:-1])
        self.middle = _Level(previous, previous, embedding, 1)
        self.up = nn.ModuleList()
        for width in reversed(widths):
            self.up.append(_Level(previous + width, width, embedding, config.blocks_per_level))
            previous = width
        self.norm = nn.GroupNorm(8, previous)
        self.out_of = nn.Conv1d(previous, channels, 3, padding=1)
        self.gain = nn.Linear(embedding, channels)
        zeroed(self.out_of)
        zeroed(self.gain)

    def forward(self, x_BCL: torch.Tensor, t_B: torch.Tensor, y_BD: torch.Tensor) -> torch.Tensor:
        e_BE = F.silu(self.time(sinusoidal(t_B, self.config.time_width)) + self.condition(y_BD))
        y_map_BWL = self.condition_map(y_BD).unflatten(1, (self.config.width, self.length))
        h_BWL = self.into(x_BCL) + self.position_CL + y_map_BWL
        skips = []
        for index, level in enumerate(self.down):
            h_BWL = level(h_BWL, e_BE)
            skips.append(h_BWL)
            if index < len(self.halve):
                h_BWL = self.halve[index](h_BWL)
        h_BWL = self.middle(h_BWL, e_BE)
        for level in self.up:
            skip_BWL = skips.pop()
            h_BWL = level(torch.cat([_stretched(h_BWL, skip_BWL.shape[2]), skip_BWL], dim=1), e_BE)
        return self.out_of(F.silu(self.norm(h_BWL))) + self.gain(e_BE).unsqueeze(2) * x_BCL  # type: ignore[no-any-return]


class _Level(nn.Module):
    """Residual blocks at one length; the first changes the number of channels."""

    def __init__(self, in_channels: int, channels: int, embedding: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _Block(in_channels if index == 0 else channels, channels, embedding) for index in range(num_blocks)
        )

    def forward(self, x_BCL: torch.Tensor, e_BE: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x_BCL = block(x_BCL, e_BE)
        return x_BCL


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
        zeroed(self.film)
        zeroed(self.last)

    def forward(self, x_BCL: torch.Tensor, e_BE: torch.Tensor) -> torch.Tensor:
        scale_BC1, shift_BC1 = self.film(e_BE).unsqueeze(2).chunk(2, dim=1)
        h_BCL = self.first(F.silu(self.first_norm(x_BCL)))
        h_BCL = self.last_norm(h_BCL) * (1 + scale_BC1) + shift_BC1
        return self.skip(x_BCL) + self.last(F.silu(h_BCL))  # type: ignore[no-any-return]


def _stretched(x_BCL: torch.Tensor, length: int) -> torch.Tensor:
    """Nearest up-sampling to `length`; `interpolate` has no deterministic gradient on every device."""
    if x_BCL.shape[2] == length:
        return x_BCL
    return x_BCL.unsqueeze(3).expand(-1, -1, -1, 2).flatten(2)[:, :, :length]
