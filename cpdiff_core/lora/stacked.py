"""Many LoRA adapters through one frozen base in one forward pass, for training and for scoring.

Every adapted layer computes the frozen product once for all tokens and adds two small batched products,
x A_s^T B_s^T, with the factors of the adapter that the token belongs to. The base is transformers' own module, so
a stack of one equals PEFT (tested per architecture).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import ACT2FN

from cpdiff_core.lora.layout import ParameterLayout
from cpdiff_core.lora.packing import TokenBatch

try:  # torch's variable-length flash attention, bf16 and fp16 on CUDA only
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover - torch older than the floor
    varlen_attn = None  # type: ignore[assignment]

PACKED = "cpdiff_packed"
HeadLayers = tuple[tuple[str, str], ...]


def packed_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    scaling: float | None = None, token_batch: TokenBatch | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention inside each packed sequence. query, key, value: 1 x heads x T x d. Returns 1 x T x heads x d."""
    assert token_batch is not None and token_batch.sequence_starts is not None
    causal = bool(getattr(module, "is_causal", False))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and varlen_attn is not None:
        out = _variable_length(query, key, value, token_batch, causal, scaling)
        return out[None], None
    gather, mask, scatter = token_batch.gather, token_batch.gather_mask, token_batch.scatter
    assert gather is not None and mask is not None and scatter is not None
    num_sequences, longest = gather.shape
    heads, width = query.shape[1], query.shape[3]

    def spread(x: torch.Tensor) -> torch.Tensor:
        rows = x[0].transpose(0, 1).reshape(-1, heads * width).index_select(0, gather.view(-1))
        return rows.view(num_sequences, longest, heads, width).transpose(1, 2)

    allowed = mask[:, None, None, :]
    if causal:
        allowed = allowed & torch.ones(longest, longest, dtype=torch.bool, device=mask.device).tril()
    out = F.scaled_dot_product_attention(spread(query), spread(key), spread(value), attn_mask=allowed, scale=scaling)
    out = out.transpose(1, 2).reshape(num_sequences * longest, heads * width).index_select(0, scatter)
    return out.view(1, -1, heads, width), None


def _variable_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: TokenBatch, causal: bool, scaling: float | None
) -> torch.Tensor:
    starts = batch.sequence_starts
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    options: dict[str, Any] = {"scale": scaling}
    if causal:
        options |= {"window_size": (-1, 0)} if "window_size" in _VARLEN_OPTIONS else {"is_causal": True}
    out: torch.Tensor = varlen_attn(*rows, starts, starts, batch.max_length, batch.max_length, **options)  # type: ignore[arg-type,assignment]
    return out


_VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn is not None else frozenset()
AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


class _Routing:
    """The adapters of the forward pass under way, shared by all stacked layers of one model."""

    def __init__(self, scaling: float, dropout: float) -> None:
        self.scaling = scaling
        self.dropout = dropout
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.batch: TokenBatch | None = None
        self.mask: torch.Tensor | None = None

    def set(self, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], batch: TokenBatch, dtype: torch.dtype) -> None:
        """mask: T x (S rank), 1 where the column's adapter owns the token; None if tokens divide evenly, in order."""
        self.factors, self.batch, self.mask = factors, batch, None
        if batch.owners is not None:
            num_adapters, rank = next(iter(factors.values()))[0].shape[:2]
            columns = torch.arange(num_adapters, device=batch.owners.device).repeat_interleave(rank)
            self.mask = (batch.owners[:, None] == columns).to(dtype)


def counter_dropout(x: torch.Tensor, keys: torch.Tensor, salt: int, p: float) -> torch.Tensor:
    """Dropout whose mask is a hash of (token key, channel, salt): the same however tokens are grouped or padded."""
    channels = torch.arange(x.shape[-1], device=x.device, dtype=torch.int64)
    mixed = (keys[:, None] * 0x9E3779B1 + salt * 0x85EBCA6B) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = mixed ^ ((channels * 0x297A2D39) & 0xFFFFFFFF)
    mixed = ((mixed ^ (mixed >> 12)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 15)
    keep = mixed >= int(p * 2**32)
    return x * keep.view(x.shape).to(x.dtype) / (1.0 - p)


class StackedLora(nn.Module):
    """One adapted layer: the frozen layer, plus the factors of whichever adapter each token belongs to."""

    def __init__(self, base: nn.Module, name: str, salt: int, routing: _Routing) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.salt = salt
        self._routing = routing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routing = self._routing
        out: torch.Tensor = self.base(x)
        a_SrI, b_SOr = (factor.to(x.dtype) for factor in routing.factors[self.name])
        batch = routing.batch
        assert batch is not None
        if x.shape[0] != batch.input_ids.shape[0]:
            return self._shared_input(x, out, a_SrI, b_SOr, batch.input_ids.shape[0])
        if routing.dropout > 0.0 and batch.dropout_keys is not None:
            flat = x.reshape(-1, x.shape[-1])
            x = counter_dropout(flat, batch.dropout_keys, self.salt, routing.dropout).view(x.shape)
        if routing.mask is not None:
            # All adapters at once, then what is not the token's own is struck out: two plain products, any order
            # of tokens, and a deterministic backward. Worth it while S x rank is small against the width.
            hidden = (x.reshape(-1, x.shape[-1]) @ a_SrI.flatten(0, 1).t()) * routing.mask
            up = b_SOr.transpose(1, 2).flatten(0, 1)
            return torch.addmm(out.reshape(-1, out.shape[-1]), hidden, up, alpha=routing.scaling).view(out.shape)
        groups = a_SrI.shape[0]
        hidden = torch.bmm(x.reshape(groups, -1, x.shape[-1]), a_SrI.transpose(1, 2))
        added = torch.baddbmm(
            out.reshape(groups, -1, out.shape[-1]), hidden, b_SOr.transpose(1, 2), alpha=routing.scaling
        )
        return added.view(out.shape)

    def _shared_input(
        self, x: torch.Tensor, out: torch.Tensor, a_SrI: torch.Tensor, b_SOr: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """An input that all sequences share (DeBERTa's relative positions, 1 x P x I): one result per adapter."""
        num_adapters = a_SrI.shape[0]
        delta = x.expand(num_adapters, -1, -1) @ a_SrI.transpose(1, 2) @ b_SOr.transpose(1, 2)
        return (out + self._routing.scaling * delta).repeat_interleave(rows // num_adapters, dim=0)


class StackedClassifier(nn.Module):
    """A frozen sequence classifier that runs S adapters, each with its own head, in one forward pass."""

    def __init__(
        self, classifier: nn.Module, layout: ParameterLayout, head: HeadLayers, *, packed: bool, scaling: float,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        model = copy.deepcopy(classifier)
        self.head_layers = tuple((name, _activation(name_, model.config)) for name, name_ in head)
        self.own_head = {
            name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] in dict(head)
        }
        self.layout = layout
        self.packed = packed
        self._routing = _Routing(scaling, dropout)
        for salt, factor in enumerate(layout.factors):
            path = factor.module.removeprefix("base_model.model.")
            parent, _, child = path.rpartition(".")
            base = model.get_submodule(path)
            setattr(model.get_submodule(parent), child, StackedLora(base, factor.module, salt + 1, self._routing))
        if packed:
            model.set_attn_implementation(PACKED)
        self.backbone: nn.Module = model.base_model
        if getattr(self.backbone, "pooler", None) is not None:
            self.backbone.pooler = None  # the head applies it, to the pooled tokens only
        self.requires_grad_(False)

    def forward(self, w_SK: torch.Tensor, head: Mapping[str, torch.Tensor], batch: TokenBatch) -> torch.Tensor:
        """Logits, S x B x classes, float32. head: parameter name -> S x ... (from `stack_heads`)."""
        features = self.features(w_SK, batch)
        return self.apply_head(features, head)

    def features(self, w_SK: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """The hidden state that the head reads, S x B x H."""
        self._routing.set(self.layout.views(w_SK), batch, next(self.backbone.parameters()).dtype)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if self.packed:
            inputs |= {"position_ids": batch.position_ids, "token_batch": batch}
        else:
            inputs |= {"attention_mask": batch.attention_mask}
        if getattr(self.backbone.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = batch.token_type_ids
        if self.backbone.config.model_type == "gpt2":
            inputs["use_cache"] = False
        hidden = self.backbone(**inputs).last_hidden_state
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.pool_index.view(-1))
        return rows.view(*batch.pool_index.shape, -1)

    def apply_head(
        self, features: torch.Tensor, head: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The classification head on features S x B x H, computed in `dtype`."""
        x = features.to(dtype)
        for name, activation in self.head_layers:
            x = torch.bmm(x, head[f"{name}.weight"].to(dtype).transpose(1, 2))
            if f"{name}.bias" in head:
                x = x + head[f"{name}.bias"].to(dtype)[:, None, :]
            x = activation(x)
        return x

    def stack_heads(self, heads: list[Mapping[str, torch.Tensor]], num_classes: int) -> dict[str, torch.Tensor]:
        """Heads of several tasks as one stack. The logits of a task with fewer classes are filled up with zeros."""
        stacked: dict[str, torch.Tensor] = {}
        last = self.head_layers[-1][0]
        for key, own in self.own_head.items():
            rows = []
            for head in heads:
                value = head.get(key, own).to(own.device, own.dtype)
                if key.rpartition(".")[0] == last:
                    value = F.pad(value, (0, 0) * (value.dim() - 1) + (0, num_classes - value.shape[0]))
                rows.append(value)
            stacked[key] = torch.stack(rows)
        return stacked


def _activation(name: str, config: Any) -> nn.Module:
    """An activation by transformers' name, or by the name of the config field that names it; identity if empty."""
    if not name:
        return nn.Identity()
    activation: nn.Module = ACT2FN[getattr(config, name, name)]
    return activation
