"""Many LoRA adapters through one frozen base in one forward pass, for training and for scoring.

Every adapted layer computes the frozen product once for all tokens and adds two small products, x A_s^T B_s^T, with the
factors of the adapter that the token belongs to. The base is transformers' own model, so a stack of one equals PEFT
(tested per architecture); only the self-attention of BERT's relatives is replaced, by one whose three projections
are a single product.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from cpdiff_core.lora.layout import ParameterLayout
from cpdiff_core.lora.packing import TokenBatch

HeadLayers = tuple[tuple[str, str], ...]
Factors = tuple[torch.Tensor, torch.Tensor]
_PEFT_PREFIX = "base_model.model."


class _Routing:
    """The adapters of the forward pass under way, shared by all stacked layers of one model."""

    def __init__(self, scaling: float, dropout: float) -> None:
        self.scaling = scaling
        self.dropout = dropout
        self.layers: list[StackedLora | FusedSelfAttention] = []
        self.mask: torch.Tensor | None = None
        self.dropout_keys: torch.Tensor | None = None
        self.num_rows = 0

    def set(self, factors: dict[str, Factors], batch: TokenBatch, dtype: torch.dtype) -> None:
        """mask: T x (S rank), 1 where the column's adapter owns the token; None if rows divide evenly, in order."""
        for layer in self.layers:  # each holds its own, so that a compiled layer serves all of them
            layer.pairs = [(factors[name][0].to(dtype), factors[name][1].to(dtype)) for name in layer.names]
        self.num_rows, self.dropout_keys, self.mask = batch.input_ids.shape[0], batch.dropout_keys, None
        if batch.owners is not None:
            num_adapters, rank = next(iter(factors.values()))[0].shape[:2]
            columns = torch.arange(num_adapters, device=batch.owners.device).repeat_interleave(rank)
            self.mask = (batch.owners[:, None] == columns).to(dtype)

    def add(self, out: torch.Tensor, x: torch.Tensor, pairs: list[Factors], salts: tuple[int, ...]) -> torch.Tensor:
        """out plus the adapters' products of x, for layers whose outputs lie side by side in `out`'s last axis.

        out: T x sum of widths, x: T x in. Where a mask is set, all adapters' products are computed at once and what
        is not the token's own is struck out: plain products, tokens in any order, a deterministic backward. It is
        worth it while S x rank is small against the width. Otherwise tokens come adapter by adapter, equally many.
        """
        if self.dropout > 0.0 and self.dropout_keys is not None:
            parts = out.split([b.shape[1] for _, b in pairs], dim=-1)
            inputs = [counter_dropout(x, self.dropout_keys, salt, self.dropout) for salt in salts]
            added = [self._product(*item) for item in zip(parts, inputs, [[pair] for pair in pairs], strict=True)]
            return torch.cat(added, dim=-1) if len(added) > 1 else added[0]
        return self._product(out, x, pairs)

    def _product(self, out: torch.Tensor, x: torch.Tensor, pairs: list[Factors]) -> torch.Tensor:
        down = torch.cat([a for a, _ in pairs], dim=1)  # S x (layers r) x in
        if self.mask is not None:
            down = torch.cat([a.flatten(0, 1) for a, _ in pairs])
            ups = [b.transpose(1, 2).flatten(0, 1) for _, b in pairs]
            hidden = (x @ down.t()) * (self.mask if len(pairs) == 1 else self.mask.repeat(1, len(pairs)))
            return torch.addmm(out, hidden, ups[0] if len(ups) == 1 else torch.block_diag(*ups), alpha=self.scaling)
        groups = down.shape[0]
        up = [b.transpose(1, 2) for _, b in pairs]  # each S x r x out
        hidden = torch.bmm(x.reshape(groups, -1, x.shape[-1]), down.transpose(1, 2))
        if len(up) == 1:
            return torch.baddbmm(
                out.reshape(groups, -1, out.shape[-1]), hidden, up[0], alpha=self.scaling
            ).view(out.shape)
        parts = [torch.bmm(h, u) for h, u in zip(hidden.chunk(len(up), dim=2), up, strict=True)]
        return torch.add(out, torch.cat(parts, dim=2).view(out.shape), alpha=self.scaling)


def counter_dropout(x: torch.Tensor, keys: torch.Tensor, salt: int, p: float) -> torch.Tensor:
    """Dropout whose mask is a hash of (token key, channel, salt): the same however tokens are grouped or padded."""
    channels = torch.arange(x.shape[-1], device=x.device, dtype=torch.int64)
    mixed = (keys[:, None] * 0x9E3779B1 + salt * 0x85EBCA6B) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = mixed ^ ((channels * 0x297A2D39) & 0xFFFFFFFF)
    mixed = ((mixed ^ (mixed >> 12)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 15)
    keep = mixed >= int(p * 2**32)
    return x * keep.to(x.dtype) / (1.0 - p)


class StackedLora(nn.Module):
    """One adapted layer: the frozen layer, plus the factors of whichever adapter each token belongs to."""

    def __init__(self, base: nn.Module, name: str, salt: int, routing: _Routing) -> None:
        super().__init__()
        self.base = base
        self.names, self.salts = (name,), (salt,)
        self.pairs: list[Factors] = []
        self._routing = routing
        routing.layers.append(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x)
        if x.shape[0] != self._routing.num_rows:
            return self._shared_input(x, out)
        flat = self._routing.add(out.reshape(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), self.pairs, self.salts)
        return flat.view(out.shape)

    def _shared_input(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """An input that all sequences share (DeBERTa's relative positions, 1 x P x I): one result per adapter.

        The released code's dropout does not reach it: it belongs to no example.
        """
        a_SrI, b_SOr = self.pairs[0]
        num_adapters = a_SrI.shape[0]
        delta = x.expand(num_adapters, -1, -1) @ a_SrI.transpose(1, 2) @ b_SOr.transpose(1, 2)
        return (out + self._routing.scaling * delta).repeat_interleave(self._routing.num_rows // num_adapters, dim=0)


class FusedSelfAttention(nn.Module):
    """Self-attention of BERT's relatives with query, key and value as one product, and their adapters as another."""

    def __init__(self, base: nn.Module, names: tuple[str, ...], salts: tuple[int, ...], routing: _Routing) -> None:
        super().__init__()
        layers = [base.query, base.key, base.value]
        self.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)  # type: ignore[arg-type, misc]
        self.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)  # type: ignore[arg-type, misc]
        self.head_width = int(base.attention_head_size)  # type: ignore[arg-type]
        self.names, self.salts = names, salts
        self.pairs: list[Factors] = []
        self._routing = routing
        routing.layers.append(self)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        rows, length, width = hidden_states.shape
        x = hidden_states.reshape(-1, width)
        qkv = self._routing.add(F.linear(x, self.weight, self.bias), x, self.pairs, self.salts)
        query, key, value = qkv.view(rows, length, 3, -1, self.head_width).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return out.transpose(1, 2).reshape(rows, length, width), None


class StackedClassifier(nn.Module):
    """A frozen sequence classifier that runs S adapters, each with its own head, in one forward pass."""

    def __init__(
        self, classifier: nn.Module, layout: ParameterLayout, head: HeadLayers, *, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        model = copy.deepcopy(classifier)
        self.head_layers = tuple((name, _activation(name_, model.config)) for name, name_ in head)
        self.own_head = {
            name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] in dict(head)
        }
        self.layout = layout
        self._routing = _Routing(scaling, dropout)
        self.backbone: nn.Module = model.base_model
        self._insert(model)
        if getattr(self.backbone, "pooler", None) is not None:
            self.backbone.pooler = None  # the head applies it, to the pooled tokens only
        self.requires_grad_(False)

    def _insert(self, model: nn.Module) -> None:
        """Put the stacked layers in the places of those that PEFT would adapt."""
        names = [factor.module for factor in self.layout.factors]
        salts = {name: number + 1 for number, name in enumerate(names)}
        for name in names:
            path = name.removeprefix(_PEFT_PREFIX)
            parent, _, child = path.rpartition(".")
            trio = tuple(f"{_PEFT_PREFIX}{parent}.{part}" for part in ("query", "key", "value"))
            if all(part in salts for part in trio):
                if child == "query":
                    owner, _, place = parent.rpartition(".")
                    fused = FusedSelfAttention(
                        model.get_submodule(parent), trio, tuple(salts[part] for part in trio), self._routing
                    )
                    setattr(model.get_submodule(owner), place, fused)
            else:
                layer = StackedLora(model.get_submodule(path), name, salts[name], self._routing)
                setattr(model.get_submodule(parent), child, layer)

    def compile_layers(self) -> None:
        """Compile the base's transformer layers: one program, which serves every layer."""
        config = self.backbone.config
        blocks = self.backbone.h if config.model_type == "gpt2" else self.backbone.encoder.layer  # type: ignore[union-attr]
        for block in blocks:  # type: ignore[union-attr]
            block.compile(dynamic=False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    def forward(self, w_SK: torch.Tensor, head: Mapping[str, torch.Tensor], batch: TokenBatch) -> torch.Tensor:
        """Logits, S x B x classes, float32. head: parameter name -> S x ... (from `stack_heads`)."""
        return self.apply_head(self.features(w_SK, batch), head)

    def features(self, w_SK: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """The hidden state that the head reads, S x B x H."""
        self._routing.set(self.layout.views(w_SK), batch, self.dtype)
        config = self.backbone.config
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if config.model_type != "deberta":
            inputs["position_ids"] = batch.position_ids
        if getattr(config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = batch.token_type_ids
        if config.model_type == "gpt2":
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
        device = next(self.backbone.parameters()).device
        last = self.head_layers[-1][0]
        for key, own in self.own_head.items():
            rows = []
            for head in heads:
                value = head.get(key, own).to(device, torch.float32)
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
