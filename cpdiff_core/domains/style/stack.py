"""Many LoRA adapters through one frozen PixArt in one forward pass, for training and for sampling.

Each adapted projection computes the frozen product once for all images and adds x A_s^T B_s^T for the images of
adapter s, which lie together; a stack that samples many images on a GPU multiplies by W + B_s A_s instead, which reads and
writes the images' tokens less often. A stack of one equals PEFT (tested).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cpdiff_core.domains.style.base import BLOCK_PATTERN, TARGET_MODULES, Captions, StyleBase, load_transformer
from cpdiff_core.lora.layout import LoraSpec, ParameterLayout, initial_vector

_PEFT_PREFIX = "base_model.model."
MERGE_TOKENS = 8192
"""Tokens per adapter from which a product for each adapter fills a GPU; below, two products serve all of them."""


class StackedPixArt(nn.Module):
    """A frozen PixArt that runs S adapters on S x B images."""

    def __init__(self, transformer: nn.Module, layout: ParameterLayout, scaling: float, merged: bool = False) -> None:
        """merged: without gradients, and with tokens enough, the adapters become parts of the weights."""
        super().__init__()
        self.layout = layout
        self.transformer: Any = copy.deepcopy(transformer)
        self._layers: list[_StackedLinear] = []
        for factor in layout.factors:
            path = factor.module.removeprefix(_PEFT_PREFIX)
            parent, _, child = path.rpartition(".")
            layer = _StackedLinear(self.transformer.get_submodule(path), factor.module, scaling, merged)
            setattr(self.transformer.get_submodule(parent), child, layer)
            self._layers.append(layer)
        self.requires_grad_(False)

    def forward(self, w_SK: torch.Tensor, x_VCHW: torch.Tensor, t_V: torch.Tensor, captions: Captions) -> torch.Tensor:
        """The base's prediction for images of S adapters, those of adapter s together: V = S x B rows, float32.

        A learned variance, the second half of PixArt-alpha's output channels, is dropped.
        """
        dtype = self.transformer.proj_out.weight.dtype
        pairs = self.layout.views(w_SK.to(dtype))
        for layer in self._layers:
            layer.pair = pairs[layer.name]
        out = self.transformer(
            x_VCHW.to(dtype), encoder_hidden_states=captions.states_PTE.to(dtype), timestep=t_V,
            encoder_attention_mask=captions.mask_PT.to(dtype),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
        return out[:, : x_VCHW.shape[1]].float()  # type: ignore[no-any-return]


class _StackedLinear(nn.Module):
    """A frozen linear layer and, for the pass under way, the factors (A_SrI, B_SOr) of its adapters."""

    def __init__(self, linear: Any, name: str, scaling: float, merged: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.name, self.scaling, self.merged = name, scaling, merged
        self.pair: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a_SrI, b_SOr = self.pair
        x_STI = x.reshape(len(a_SrI), -1, x.shape[-1])
        if self.merged and x_STI.shape[1] >= MERGE_TOKENS and not torch.is_grad_enabled():
            w_SOI = torch.baddbmm(self.weight.expand(len(a_SrI), -1, -1), b_SOr, a_SrI, alpha=self.scaling)
            # One product per adapter, which takes the bias along; compiled, their results need no copy to lie together.
            each = [F.linear(x_TI, w_OI, self.bias) for x_TI, w_OI in zip(x_STI, w_SOI, strict=True)]
            return torch.stack(each).view(*x.shape[:-1], -1)
        hidden = torch.bmm(x_STI, a_SrI.transpose(1, 2))
        out = F.linear(x, self.weight, self.bias)
        return torch.add(out, torch.bmm(hidden, b_SOr.transpose(1, 2)).view(out.shape), alpha=self.scaling)


def initial_adapter(base: StyleBase, root: Path, lora: LoraSpec, seed: int) -> tuple[torch.Tensor, ParameterLayout]:
    """(w_K as PEFT initialises it from `seed`, the layout)."""
    return initial_vector(load_transformer(base, root), lora, TARGET_MODULES, BLOCK_PATTERN, seed)


def build_stack(
    base: StyleBase, root: Path, lora: LoraSpec, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> StackedPixArt:
    """The base ready for adapters of this shape, on a device. compiled: its blocks, as one program that serves all."""
    _, layout = initial_adapter(base, root, lora, 0)
    merged = device.type == "cuda"  # on a CPU it gains nothing
    stack = StackedPixArt(load_transformer(base, root), layout, lora.scaling, merged).to(device, dtype)
    if compiled:
        for block in stack.transformer.transformer_blocks:
            block.compile(dynamic=False)
    return stack
