"""Arithmetic on adapters in PEFT folders: interpolate and average the factors, add the products (Sec. 4.4).

Interpolating and averaging work on A and B, as the paper's interpolation and model soup do; the product BA of averaged
factors is not the average of the products. `add` is exact on dW = scaling * BA: adapters are laid side by side, and
the rank of the sum is the sum of the ranks. The head is the first adapter's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from cpdiff_core.artifacts import check_out, sha256_of
from cpdiff_core.config import UserError
from cpdiff_core.export import write_composed_card
from cpdiff_core.lora.layout import LoraSpec
from cpdiff_core.lora.peft_folder import WEIGHTS_FILE, PeftAdapter, read_adapter, write_state

Tensors = dict[str, torch.Tensor]


def average(adapters: Sequence[PeftAdapter], weights: Sequence[float] | None = None) -> tuple[LoraSpec, Tensors]:
    """sum_i weight_i (A_i, B_i); equal weights if none are given. Raises UserError for adapters of other shapes."""
    chosen = _weights(adapters, weights or [1 / len(adapters)] * len(adapters))
    first = adapters[0]
    for adapter in adapters[1:]:
        if adapter.lora.rank != first.lora.rank or adapter.lora.scaling != first.lora.scaling:
            raise UserError(
                f"adapter {str(adapter.folder)!r}: rank {adapter.lora.rank} and scaling {adapter.lora.scaling:g} are "
                f"not those of {str(first.folder)!r} ({first.lora.rank}, {first.lora.scaling:g}); `cpdiff add` takes both"
            )
        _same_modules(adapter, first)
    mixed = {
        name: sum(weight * adapter.tensors[name].double() for weight, adapter in zip(chosen, adapters, strict=True))
        for name in first.tensors
    }
    return first.lora, {name: torch.as_tensor(value).float() for name, value in mixed.items()}


def interpolate(a: PeftAdapter, b: PeftAdapter, weight: float) -> tuple[LoraSpec, Tensors]:
    """(1 - weight) a + weight b on the factors: a at 0, b at 1."""
    return average([a, b], [1 - weight, weight])


def add(adapters: Sequence[PeftAdapter], weights: Sequence[float] | None = None) -> tuple[LoraSpec, Tensors]:
    """dW = sum_i weight_i dW_i, exactly: factors side by side, all scalings in B. Weights are 1 if none are given."""
    chosen = _weights(adapters, weights or [1.0] * len(adapters))
    first = adapters[0]
    for adapter in adapters[1:]:
        _same_modules(adapter, first)
    rank = sum(adapter.lora.rank for adapter in adapters)
    lora = LoraSpec(rank=rank, lora_alpha=rank, lora_dropout=first.lora.lora_dropout)  # scaling 1
    tensors: Tensors = {}
    for name in first.tensors:
        if name.endswith("lora_A.weight"):
            tensors[name] = torch.cat([adapter.tensors[name] for adapter in adapters])
        else:
            factors = [weight * adapter.lora.scaling for weight, adapter in zip(chosen, adapters, strict=True)]
            parts = [f * adapter.tensors[name] for f, adapter in zip(factors, adapters, strict=True)]
            tensors[name] = torch.cat(parts, dim=1)
    return lora, tensors


def compose(how: str, folders: Sequence[Path], weights: Sequence[float] | None, out: Path) -> None:
    """Read PEFT folders, `interpolate`, `average` or `add` them, and write the result as a PEFT folder with a card.

    weights: of `interpolate` one, the share of the second adapter. Raises UserError for what does not fit together.
    """
    check_out(out)
    adapters = [read_adapter(folder) for folder in folders]
    first = adapters[0]
    bases = {adapter.base for adapter in adapters}
    if len(bases) > 1:
        raise UserError(f"adapters: are for different base models ({', '.join(sorted(bases))}); use those of one base")
    if how == "interpolate":
        share = weights[0] if weights else 0.5
        weights = [1 - share, share]
    lora, tensors = add(adapters, weights) if how == "add" else average(adapters, weights)
    write_state(out, tensors, lora, first.target_modules, base=first.base, head=first.head)
    shown = weights or [1.0 if how == "add" else 1 / len(adapters)] * len(adapters)
    parents = [
        (adapter.folder.resolve().name, weight, sha256_of(adapter.folder / WEIGHTS_FILE))
        for adapter, weight in zip(adapters, shown, strict=True)
    ]
    same_heads = all(_same_head(adapter, first) for adapter in adapters)
    images = any("transformer_blocks." in name for name in first.tensors)  # of a PixArt
    tag = "text-to-image" if images else "text-classification"
    write_composed_card(out, how, first.base, lora, parents, bool(first.head), same_heads, tag)


def _weights(adapters: Sequence[PeftAdapter], weights: Sequence[float]) -> list[float]:
    if len(weights) != len(adapters):
        raise UserError(f"--weights: {len(weights)} are given for {len(adapters)} adapters; give one each")
    if wrong := [weight for weight in weights if not math.isfinite(weight)]:
        raise UserError(f"--weights {wrong[0]}: is not a finite number; give others")
    return list(weights)


def _same_modules(adapter: PeftAdapter, first: PeftAdapter) -> None:
    if adapter.tensors.keys() != first.tensors.keys():
        other = min(adapter.tensors.keys() ^ first.tensors.keys())
        raise UserError(
            f"adapter {str(adapter.folder)!r}: adapts other modules than {str(first.folder)!r} ({other}); use adapters "
            "with the same target_modules"
        )
    for name in first.tensors:  # the widths; ranks may differ
        axis = 1 if name.endswith("lora_A.weight") else 0
        if adapter.tensors[name].shape[axis] != first.tensors[name].shape[axis]:
            raise UserError(f"adapter {str(adapter.folder)!r}: {name} has another width; use adapters of one base")


def _same_head(adapter: PeftAdapter, first: PeftAdapter) -> bool:
    return adapter.head.keys() == first.head.keys() and all(
        torch.equal(adapter.head[name], first.head[name]) for name in first.head
    )
