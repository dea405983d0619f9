"""A base model ready for many adapters on one device, and the passes that need no gradient: features and logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.base_models import FAMILIES, BaseModel, Family, cached_classifier
from cpdiff_core.lora.layout import LoraSpec, ParameterLayout, initial_vector
from cpdiff_core.lora.packing import TokenBatch, TokenizedTexts, pack, pad
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
        self, texts: list[TokenizedTexts], rows: list[NDArray[np.int64]], *, total: int | None = None,
        keys: NDArray[np.int64] | None = None,
    ) -> TokenBatch:  # fmt: skip
        """Sequences `rows[s]` of `texts[s]` for each adapter s, packed where the architecture allows."""
        last = self.family.pooling == "last"
        if self.family.packed:
            return pack(
                texts, rows, last_token=last, position_offset=self.position_offset, total=total, keys=keys,
                padded_attention=self.device.type != "cuda" or next(self.model.parameters()).dtype == torch.float32,
            )  # fmt: skip
        return pad(
            texts, rows, pad_token_id=self.pad_token_id, last_token=last, position_offset=self.position_offset, keys=keys
        )


def device_of(runtime: RuntimeConfig) -> torch.device:
    """The device a stage computes on; also applies the number of CPU threads."""
    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    if runtime.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(runtime.device)


def build_stack(base: BaseModel, lora: LoraSpec, num_classes: int, precision: Precision, runtime: RuntimeConfig) -> Stack:
    """The base for stacks of adapters of this shape. Kept in memory for the next stage."""
    return _build_stack(base, lora, num_classes, precision, device_of(runtime))


@lru_cache(maxsize=2)
def _build_stack(base: BaseModel, lora: LoraSpec, num_classes: int, precision: Precision, device: torch.device) -> Stack:
    family = FAMILIES[base.family]
    classifier, _ = cached_classifier(base, num_classes)
    _, layout = initial_vector(classifier, lora, family.target_modules, family.block_pattern, 0)
    model = StackedClassifier(
        classifier, layout, family.head, packed=family.packed, scaling=lora.scaling, dropout=lora.lora_dropout
    )
    model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    return Stack(
        model=model, layout=layout, family=family, pad_token_id=int(classifier.config.pad_token_id),
        position_offset=family.position_offset(classifier.config), device=device,
    )  # fmt: skip


def tokens_per_batch(runtime: RuntimeConfig, device: torch.device) -> int:
    """Tokens of all adapters in one pass without gradients: enough to fill the device, little enough to fit it."""
    return runtime.tokens_per_batch or (4096 if device.type == "cpu" else 131072)


def _shards(texts: TokenizedTexts, rows: NDArray[np.int64], budget: int, padded: bool) -> Iterator[NDArray[np.int64]]:
    """Positions in `rows`, longest texts first, cut so that each shard has at most `budget` tokens (at least one text)."""
    lengths = texts.lengths[rows]
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        sizes = lengths[order[start:]]
        cost = np.arange(1, len(sizes) + 1) * sizes[0] if padded else np.cumsum(sizes)
        count = max(1, int(np.searchsorted(cost, budget, side="right")))
        yield order[start : start + count]
        start += count


@torch.no_grad()
def features_of(
    stack: Stack, texts: TokenizedTexts, rows: NDArray[np.int64], label: str, runtime: RuntimeConfig
) -> torch.Tensor:
    """The frozen base's features of texts `rows`, len(rows) x H, float32 on the CPU."""
    w_1K = torch.zeros(1, stack.layout.num_parameters, device=stack.device)
    features: torch.Tensor | None = None
    with track(label, len(rows), runtime, unit="text") as progress:
        for shard in _shards(texts, rows, tokens_per_batch(runtime, stack.device), not stack.family.packed):
            batch = stack.batch([texts], [rows[shard]]).to(stack.device)
            part = stack.model.features(w_1K, batch)[0].float().cpu()
            features = part.new_empty(len(rows), part.shape[-1]) if features is None else features
            features[torch.from_numpy(shard)] = part
            progress.step(len(shard))
    assert features is not None
    return features


@torch.no_grad()
def logits_of(
    stack: Stack, w_VK: torch.Tensor, head: Head, num_classes: int, texts: TokenizedTexts, label: str, runtime: RuntimeConfig
) -> torch.Tensor:
    """Logits of every vector on every text, V x n x classes, float32 on the CPU."""
    budget = tokens_per_batch(runtime, stack.device)
    rows = np.arange(len(texts))
    mean_length = max(1.0, float(texts.lengths.mean()))
    group = runtime.adapters_per_batch or max(1, int(budget // (mean_length * min(len(rows), 32))))
    out = torch.empty(len(w_VK), len(rows), num_classes)
    with track(label, len(w_VK) * len(rows), runtime, unit="text") as progress:
        for first in range(0, len(w_VK), group):
            part_SK = w_VK[first : first + group].to(stack.device)
            size = len(part_SK)
            heads = stack.model.stack_heads([head] * size, num_classes)
            for shard in _shards(texts, rows, max(1, budget // size), not stack.family.packed):
                batch = stack.batch([texts], [rows[shard]]).to(stack.device).repeat(size)
                out[first : first + size, torch.from_numpy(shard)] = stack.model(part_SK, heads, batch).cpu()
                progress.step(size * len(shard))
    return out
