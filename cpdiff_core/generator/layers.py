"""Layers that both networks use: an untied linear map per position and a residual 1-D convolution block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class PositionLinear(nn.Module):
    """A linear map of its own at every position: [B, L, I] -> [B, L, O].

    A plain convolution cannot know where in the vector it stands, yet every slice of a LoRA vector belongs to
    another layer and means something else; here each position has its own weights.
    """

    def __init__(self, length: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(length, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(length, out_features))

    def forward(self, x_BLI: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), x_BLI.transpose(0, 1), self.weight).transpose(0, 1)


class ResidualConv(nn.Module):
    """x + conv(silu(conv(x + position))), with the last convolution at zero: it starts as the identity."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.position_CL = nn.Parameter(torch.zeros(channels, length))
        self.first = nn.Conv1d(channels, channels, 3, padding=1)
        self.last = nn.Conv1d(channels, channels, 3, padding=1)
        zeroed(self.last)

    def forward(self, x_BCL: torch.Tensor) -> torch.Tensor:
        return x_BCL + self.last(F.silu(self.first(x_BCL + self.position_CL)))


def sinusoidal(t_B: torch.Tensor, width: int, longest: float = 10_000.0) -> torch.Tensor:
    """Sinusoidal embedding of the time steps, one row per sample: [B] -> [B, width]."""
    half = width // 2
    frequency = torch.exp(-math.log(longest) * torch.arange(half, device=t_B.device, dtype=torch.float32) / half)
    angle = t_B.float().unsqueeze(1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def zeroed(layer: nn.Module) -> None:
    """Set every parameter of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
