"""A base model ready for many adapters on one device, and the passes that need no gradient: features and logits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.base_models import FAMILIES, BaseModel, Family, cached_classifier
from cpdiff_core.lora.layout import LoraSpec, ParameterLayout, initial_vector
from cpdiff_core.lora.packing import TokenBatch, TokenizedTexts, pack, pad, place
from cpdiff_core.lora.stacked import StackedClassifier
from cpdiff_core.progress import track

Precision = Literal["fp32", "bf16"]
Head = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Stack:
    """A frozen base on a device, with the layout of its LoRA vectors."""

    model: StackedClassifier
    layout: ParameterLayout
    family: Family
    pad_token_id: int
    position_offset: int
    device: torch.device

    def batch(
        self, texts: TokenizedTexts, rows_SB: torch.Tensor, layout: Places, keys_S: torch.Tensor | None = None
    ) -> TokenBatch:
        """Sequences `rows_SB[s]` of `texts` for each adapter s, packed where the architecture allows."""
        last = self.family.pooling == "last"
        if self.family.packed:
            return pack(
                texts, rows_SB, layout.places_SB, layout.num_rows, layout.row_length, dtype=self.model.dtype,
                last_token=last, position_offset=self.position_offset, causal=last, keys_S=keys_S,
            )  # fmt: skip
        return pad(
            texts, rows_SB, pad_token_id=self.pad_token_id, last_token=last, position_offset=self.position_offset,
            row_length=layout.row_length, keys_S=keys_S,
        )  # fmt: skip

    def places(self, lengths_SB: NDArray[np.int64], row_length: int, multiple: int = 1) -> Places:
        """Where to put sequences of these lengths, on the host; the number of rows is rounded up to a multiple."""
        if not self.family.packed:
            return Places(torch.zeros(lengths_SB.shape, dtype=torch.int64), lengths_SB.size, row_length)
        starts, num_rows = place(lengths_SB.ravel(), row_length)
        return Places(torch.from_numpy(starts.reshape(lengths_SB.shape)), -(-num_rows // multiple) * multiple, row_length)


@dataclass(frozen=True)
class Places:
    """The rows of a batch: where each sequence starts, how many rows there are, and their length."""

    places_SB: torch.Tensor
    num_rows: int
    row_length: int

    def to(self, device: torch.device) -> Places:
        return Places(self.places_SB.to(device), self.num_rows, self.row_length)


def row_length(longest: int, device: torch.device) -> int:
    """Tokens of one row for texts of at most `longest`: short rows cost less attention, long ones pack better."""
    return max(-(-longest // 8) * 8, 64 if device.type == "cpu" else 128)


THREADS_BESIDE_A_GPU = 8
"""CPU threads of a process whose arithmetic is on a GPU, unless told otherwise: the little that is left for the processor
gains nothing from more, and several processes on one machine hinder each other."""


def device_of(runtime: RuntimeConfig) -> torch.device:
    """The device a stage computes on; also applies the number of CPU threads."""
    name = runtime.device if runtime.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    threads = runtime.num_threads
    if threads is None and device.type == "cuda" and "OMP_NUM_THREADS" not in os.environ:
        threads = min(torch.get_num_threads(), THREADS_BESIDE_A_GPU)
    if threads is not None:
        torch.set_num_threads(threads)
    return device


def compiles_layers(runtime: RuntimeConfig, device: torch.device) -> bool:
    """Whether the layers of a stack are compiled: half a minute, so on a GPU and where it is asked for."""
    return bool(runtime.compile) and device.type == "cuda"


def all_devices(runtime: RuntimeConfig) -> list[str]:
    """The devices that independent work may be spread over: every GPU, unless one (or the CPU) is named."""
    device = device_of(runtime)
    if device.type != "cuda" or device.index is not None:
        return [str(device)]
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def build_stack(base: BaseModel, lora: LoraSpec, num_classes: int, precision: Precision, runtime: RuntimeConfig) -> Stack:
    """The base for stacks of adapters of this shape. Kept in memory for the next stage."""
    device = device_of(runtime)
    return _build_stack(base, lora, num_classes, precision, device, compiles_layers(runtime, device))


def forget_stacks() -> None:
    """Free the stacks kept in memory and what was compiled for them: another stack would count against torch's limit of
    programs for one layer, beyond which it runs eagerly."""
    _build_stack.cache_clear()
    torch.compiler.reset()


@lru_cache(maxsize=8)
def _build_stack(
    base: BaseModel, lora: LoraSpec, num_classes: int, precision: Precision, device: torch.device, compiled: bool
) -> Stack:
    family = FAMILIES[base.family]
    classifier: Any = cached_classifier(base, num_classes)[0]
    _, layout = initial_vector(classifier, lora, family.target_modules, family.block_pattern, 0)
    model = StackedClassifier(
        classifier, layout, family.head, scaling=lora.scaling, dropout=lora.lora_dropout
    )
    model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    if compiled:
        model.compile_layers()
    return Stack(
        model=model, layout=layout, family=family, pad_token_id=int(classifier.config.pad_token_id),
        position_offset=family.position_offset(classifier.config), device=device,
    )  # fmt: skip


def tokens_per_batch(runtime: RuntimeConfig, device: torch.device) -> int:
    """Tokens of all adapters in one pass without gradients: enough to fill the device, little enough to fit it."""
    return runtime.tokens_per_batch or (4096 if device.type == "cpu" else 131072)


def _shards(texts: TokenizedTexts, budget: int, padded: bool) -> Iterator[torch.Tensor]:
    """Numbers of texts, longest first, cut so that each shard has at most `budget` tokens (at least one text)."""
    lengths = texts.lengths
    order = torch.argsort(lengths, descending=True, stable=True)
    start = 0
    while start < len(order):
        sizes = lengths[order[start:]]
        cost = torch.arange(1, len(sizes) + 1) * sizes[0] if padded else sizes.cumsum(0)
        count = max(1, int(torch.searchsorted(cost, budget, side="right")))
        yield order[start : start + count]
        start += count


def _shard_batch(stack: Stack, resident: TokenizedTexts, texts: TokenizedTexts, shard: torch.Tensor) -> TokenBatch:
    """The batch of texts `shard` for one adapter."""
    lengths = texts.lengths[shard].numpy()
    length = row_length(int(lengths.max()), stack.device) if stack.family.packed else int(lengths.max())
    layout = stack.places(lengths[None], length)
    return stack.batch(resident, shard[None].to(stack.device), layout.to(stack.device))


@torch.no_grad()
def features_of(stack: Stack, texts: TokenizedTexts, label: str, runtime: RuntimeConfig) -> torch.Tensor:
    """The frozen base's features of every text, n x H, float32 on the CPU."""
    w_1K = torch.zeros(1, stack.layout.num_parameters, device=stack.device)
    resident = texts.to(stack.device)
    features: torch.Tensor | None = None
    with track(label, len(texts), runtime, unit="text") as progress:
        for shard in _shards(texts, tokens_per_batch(runtime, stack.device), not stack.family.packed):
            part = stack.model.features(w_1K, _shard_batch(stack, resident, texts, shard))[0].float()
            features = part.new_empty(len(texts), part.shape[-1]) if features is None else features
            features[shard.to(stack.device)] = part
            progress.step(len(shard))
    assert features is not None
    return features.cpu()


@torch.no_grad()
def logits_of(
    stack: Stack, w_VK: torch.Tensor, head: Head, num_classes: int, texts: TokenizedTexts, label: str, runtime: RuntimeConfig
) -> torch.Tensor:
    """Logits of every vector on every text, V x n x classes, float32 on the CPU."""
    budget = tokens_per_batch(runtime, stack.device)
    resident = texts.to(stack.device)
    mean_length = max(1.0, float(texts.lengths.float().mean()))
    group = runtime.adapters_per_batch or max(1, int(budget // (mean_length * min(len(texts), 32))))
    out = torch.empty(len(w_VK), len(texts), num_classes, device=stack.device)
    with track(label, len(w_VK) * len(texts), runtime, unit="text") as progress:
        for first in range(0, len(w_VK), group):
            part_SK = w_VK[first : first + group].to(stack.device)
            size = len(part_SK)
            heads = stack.model.stack_heads([head] * size, num_classes)
            for shard in _shards(texts, max(1, budget // size), not stack.family.packed):
                batch = _shard_batch(stack, resident, texts, shard).repeat(size)
                out[first : first + size, shard.to(stack.device)] = stack.model(part_SK, heads, batch)
                progress.step(size * len(shard))
    return out.cpu()
