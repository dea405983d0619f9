"""Many LoRA adapters through one frozen base in one forward pass, for training and for scoring.

Every adapted layer computes the frozen product once for all tokens and adds two small products, x A_s^T B_s^T, with the
factors of the adapter that the token belongs to. The base is transformers' own model, so a stack of one equals PEFT
(tested per architecture); only two things are replaced in BERT's relatives: the self-attention, by one whose three
projections are a single product, and the last block above its attention, which computes the tokens that the head reads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cpdiff_core.lora.layout import ParameterLayout
from cpdiff_core.lora.packing import TokenBatch

HeadLayers = tuple[tuple[str, str], ...]
_PEFT_PREFIX = "base_model.model."
_ALIGN = 8
"""Inner sizes of the small products are filled up with zeros to a multiple that matrix units like."""


class _Arrange(torch.autograd.Function):
    """w_SK -> the factors of every layer end to end, each as one matrix over all adapters; a permutation with zeros."""

    @staticmethod
    def forward(ctx: Any, w_SK: torch.Tensor, order: torch.Tensor, back: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.shape = w_SK.shape
        flat = w_SK.flatten().to(dtype)
        return torch.cat([flat, flat.new_zeros(1)])[order]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return grads[0][back].view(ctx.shape).float(), None, None, None


class _MixedLinear(torch.autograd.Function):
    """y = x W^T + b + scaling (x down^T * mask) up, for tokens of all adapters in any order.

    The adapters' part rides in the frozen product: [x, h] [W, scaling up^T]^T is one matrix product, and so is its
    gradient with respect to x and h. down: J x in, up: J x out, mask: T x J with 1 where column j belongs to the
    token's adapter. W and b get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor,
        bias: torch.Tensor | None, scaling: float,
    ) -> torch.Tensor:  # fmt: skip
        hidden = (x @ down.t()) * mask
        joint = torch.cat([weight, up.t() * scaling], dim=1)
        ctx.save_for_backward(x, down, mask, hidden, joint)
        ctx.scaling = scaling
        return F.linear(torch.cat([x, hidden], dim=1), joint, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, down, mask, hidden, joint = ctx.saved_tensors
        width, d_x = x.shape[1], None
        if ctx.needs_input_grad[0]:
            both = grads[0] @ joint
            d_hidden = both[:, width:] * mask
            d_x = torch.addmm(both[:, :width], d_hidden, down)
        else:  # the first block: below it nothing is trained
            d_hidden = (grads[0] @ joint[:, width:]) * mask
        return d_x, d_hidden.t() @ x, (hidden.t() @ grads[0]) * ctx.scaling, None, None, None, None


@dataclass
class _Tokens:
    """What the layers need to know about the tokens they are given: all of a batch, or those that the head reads.

    index: their places in the batch, or None for all. masks: by the number of joined modules, T x J (see `_MixedLinear`);
    empty where rows divide evenly among the adapters.
    """

    index: torch.Tensor | None = None
    dropout_keys: torch.Tensor | None = None
    masks: dict[int, torch.Tensor] = field(default_factory=dict)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """These rows of x, which has one for every token of the batch."""
        return x if self.index is None else x.index_select(0, self.index)


class _Routing:
    """The adapters of the forward pass under way, shared by all stacked layers of one model."""

    def __init__(self, layout: ParameterLayout, scaling: float, dropout: float) -> None:
        self.layout = layout
        self.scaling = scaling
        self.dropout = dropout
        self.layers: list[_Adapted] = []
        self.all, self.pooled = _Tokens(), _Tokens()
        self.num_rows = 0
        self.num_columns = 0  # S x rank: those of one adapted module in the small products
        self._orders: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def set(self, w_SK: torch.Tensor, batch: TokenBatch, dtype: torch.dtype) -> None:
        """Give every layer its factors. Tokens of mixed order use matrices over all adapters and a mask; rows that
        divide evenly among the adapters, in order, use batched products."""
        self.num_rows = batch.input_ids.shape[0]
        self.pooled.index = batch.pool_index.flatten()
        for tokens in (self.all, self.pooled):
            tokens.dropout_keys = None if batch.dropout_keys is None else tokens.of(batch.dropout_keys)
            tokens.masks = {}
        if batch.owners is None:
            factors = self.layout.views(w_SK.to(dtype))
            for layer in self.layers:
                layer.pairs = [factors[name] for name in layer.names]
            return
        num_adapters = len(w_SK)
        key = (num_adapters, w_SK.device)
        if key not in self._orders:
            self._orders[key] = tuple(x.to(w_SK.device) for x in self._order(num_adapters))  # type: ignore[assignment]
        flat = _Arrange.apply(w_SK, *self._orders[key], dtype)
        rows = [self._inner(num_adapters, layer.num_joined) for layer in self.layers]
        sizes = [n * width for n, x in zip(rows, self.layers, strict=True) for width in (x.in_features, x.out_features)]
        parts = iter(flat.split(sizes))  # not by slices: the gradient of each would be as long as all together
        for layer in self.layers:  # each holds its own, so that a compiled layer serves all of them
            layer.down = next(parts).view(-1, layer.in_features)
            layer.up = next(parts).view(-1, layer.out_features)
        rank = self.layout.factors[0].rank
        columns = torch.arange(num_adapters, device=w_SK.device).repeat_interleave(rank)
        self.num_columns = len(columns)
        own = (batch.owners[:, None] == columns).to(dtype)
        for count in {layer.num_joined for layer in self.layers}:
            mask = F.pad(own.repeat(1, count), (0, self._inner(num_adapters, count) - count * own.shape[1]))
            self.all.masks[count], self.pooled.masks[count] = mask, self.pooled.of(mask)

    def _inner(self, num_adapters: int, count: int) -> int:
        """Columns J of the small products of a layer that joins `count` adapted modules."""
        return -(-num_adapters * self.layout.factors[0].rank * count // _ALIGN) * _ALIGN

    def _order(self, num_adapters: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For each place of the arranged factors its place in w_SK (or one beyond, a zero), and the way back."""
        factors = {factor.module: factor for factor in self.layout.factors}
        size = self.layout.num_parameters
        adapter = torch.arange(num_adapters)[:, None, None] * size
        parts = []
        for layer in self.layers:
            members = [factors[name] for name in layer.names]
            rank, count = members[0].rank, len(members)
            rows = self._inner(num_adapters, count)
            down = torch.full((rows, layer.in_features), num_adapters * size)
            up = torch.full((rows, layer.out_features), num_adapters * size)
            width = 0
            for i, factor in enumerate(members):
                here = slice(i * num_adapters * rank, (i + 1) * num_adapters * rank)
                a = torch.arange(factor.a_start, factor.a_start + rank * factor.in_features).view(1, rank, -1)
                b = torch.arange(factor.b_start, factor.b_start + rank * factor.out_features).view(1, -1, rank)
                down[here] = (adapter + a).flatten(0, 1)
                up[here, width : width + factor.out_features] = (adapter + b).transpose(1, 2).flatten(0, 1)
                width += factor.out_features
            parts += [down.flatten(), up.flatten()]
        order = torch.cat(parts)
        back = torch.empty(num_adapters * size + 1, dtype=torch.int64)
        back[order] = torch.arange(len(order))
        return order, back[:-1]


class _Adapted(nn.Module):
    """A frozen linear layer (or several with the same input, side by side) with the adapters of the pass under way."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, names: tuple[str, ...], first_salt: int, routing: _Routing
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # out x in
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape
        self.names, self.first_salt = names, first_salt
        self.num_joined = len(names)  # all that a compiled layer reads of them: one program serves all blocks
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.down = self.up = weight.new_empty(0)
        self._routing, self.tokens = routing, routing.all
        routing.layers.append(self)

    def apply_to(self, x: torch.Tensor) -> torch.Tensor:
        """T x in -> T x out, the adapters of the tokens included."""
        routing, tokens = self._routing, self.tokens
        if routing.dropout > 0.0 and tokens.dropout_keys is not None:
            return self._with_dropout(x, tokens.dropout_keys)
        if tokens.masks:
            mask = tokens.masks[self.num_joined]
            return _MixedLinear.apply(x, self.down, self.up, mask, self.weight, self.bias, routing.scaling)  # type: ignore[no-any-return]
        if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled():
            return self._merged(x)
        out = F.linear(x, self.weight, self.bias)
        groups = len(self.pairs[0][0])
        down = torch.cat([a for a, _ in self.pairs], dim=1)  # S x (modules r) x in
        hidden = torch.bmm(x.reshape(groups, -1, x.shape[-1]), down.transpose(1, 2))
        ups = [b.transpose(1, 2) for _, b in self.pairs]
        added = [torch.bmm(h, up) for h, up in zip(hidden.chunk(len(ups), dim=2), ups, strict=True)]
        return torch.add(out, torch.cat(added, dim=2).view(out.shape), alpha=routing.scaling)

    def _merged(self, x: torch.Tensor) -> torch.Tensor:
        """The same by W + scaling B A, one adapter after the other: on a CPU the small products cost more than the merging.
        bfloat16 would round much of an adapter away."""
        rows = x.view(len(self.pairs[0][0]), -1, self.in_features)
        out = x.new_empty(*rows.shape[:2], self.out_features)
        for s, x_TI in enumerate(rows):
            weight = self.weight.clone()
            for part, (a_SrI, b_SOr) in zip(weight.chunk(self.num_joined), self.pairs, strict=True):
                part.addmm_(b_SOr[s], a_SrI[s], alpha=self._routing.scaling)
            torch.mm(x_TI, weight.t(), out=out[s])
        out = out.flatten(0, 1)
        return out if self.bias is None else out.add_(self.bias)

    def _with_dropout(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Each adapted module drops entries of its own input, as PEFT does."""
        routing, masks = self._routing, self.tokens.masks
        out = F.linear(x, self.weight, self.bias)
        dropped = [
            counter_dropout(x, keys, self.first_salt + i, routing.dropout) for i in range(self.num_joined)
        ]
        if masks:
            mask, step = masks[self.num_joined], routing.num_columns
            hidden = torch.cat([d @ self.down[i * step : (i + 1) * step].t() for i, d in enumerate(dropped)], dim=1)
            hidden = F.pad(hidden, (0, mask.shape[1] - hidden.shape[1])) * mask
            return torch.addmm(out, hidden, self.up, alpha=routing.scaling)
        groups = len(self.pairs[0][0])
        added = [
            torch.bmm(torch.bmm(d.reshape(groups, -1, d.shape[-1]), a.transpose(1, 2)), b.transpose(1, 2))
            for d, (a, b) in zip(dropped, self.pairs, strict=True)
        ]
        return torch.add(out, torch.cat(added, dim=2).view(out.shape), alpha=routing.scaling)


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


class StackedLora(_Adapted):
    """One adapted layer in the place of transformers' Linear or Conv1D."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_to(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class SharedInputLora(_Adapted):
    """A layer whose input all sequences share (DeBERTa's relative positions, 1 x P x I): one result per adapter, for each
    of its rows. Dropout does not reach it: it belongs to no example."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a_SrI, b_SOr = self.pairs[0]
        delta = x.expand(len(a_SrI), -1, -1) @ a_SrI.transpose(1, 2) @ b_SOr.transpose(1, 2)
        out = F.linear(x, self.weight, self.bias) + self._routing.scaling * delta
        return out.repeat_interleave(self._routing.num_rows // len(a_SrI), dim=0)


class FusedSelfAttention(_Adapted):
    """Self-attention of BERT's relatives with query, key and value as one product."""

    head_width: int

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        rows, length, width = hidden_states.shape
        qkv = self.apply_to(hidden_states.reshape(-1, width)).view(rows, length, 3, -1, self.head_width)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        out = _attention(query, key, value, attention_mask)
        return out.transpose(1, 2).reshape(rows, length, width), None


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of R x H x L x D under a mask that is added to the scores, R x 1 x L x L (or what expands to it).

    In a compiled layer on a GPU by flex_attention, which reads the mask inside its kernel: faster than cuDNN's on rows of
    128 tokens. Its kernels want D a power of two, from 16 on, and CPUs have no gradient of it.
    """
    width = query.shape[-1]
    fits = query.is_cuda and width >= 16 and width & (width - 1) == 0
    if mask is None or not mask.is_floating_point() or not fits or not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    from torch.nn.attention.flex_attention import flex_attention  # half a second, which others are spared

    rows, _, length, _ = query.shape
    mask = mask.expand(rows, 1, length, length)

    def masked(score: torch.Tensor, r: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return score + mask[r, 0, i, j]

    return flex_attention(query, key, value, score_mod=masked)  # type: ignore[return-value]


_OF_POSITIONS = ("pos_proj", "pos_q_proj")
"""DeBERTa's layers whose input is the table of relative positions."""


def _stacked_lora(base: nn.Module, name: str, salt: int, routing: _Routing) -> StackedLora | SharedInputLora:
    from transformers.pytorch_utils import Conv1D

    weight = base.weight.detach()  # type: ignore[union-attr, operator]
    if isinstance(base, Conv1D):
        weight = weight.t().contiguous()  # type: ignore[operator]
    kind = SharedInputLora if name.rpartition(".")[2] in _OF_POSITIONS else StackedLora
    return kind(weight, base.bias, (name,), salt, routing)  # type: ignore[arg-type]


def _fused_attention(base: nn.Module, names: tuple[str, ...], salt: int, routing: _Routing) -> FusedSelfAttention:
    layers: list[Any] = [base.query, base.key, base.value]
    weight, bias = (torch.cat([getattr(layer, part).detach() for layer in layers]) for part in ("weight", "bias"))
    fused = FusedSelfAttention(weight, bias, names, salt, routing)
    fused.head_width = int(base.attention_head_size)  # type: ignore[arg-type]
    return fused


class _OfPooledTokens(nn.Module):
    """What follows the last block's attention, for the tokens that the head reads: the block's result is 1 x (S B) x H."""

    def __init__(self, output: nn.Module, tokens: _Tokens) -> None:
        super().__init__()
        self.output, self.tokens = output, tokens

    def forward(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        attended, residual = (self.tokens.of(x.flatten(0, 1))[None] for x in (attended, residual))
        return self.output(attended, residual)  # type: ignore[no-any-return]


class StackedClassifier(nn.Module):
    """A frozen sequence classifier that runs S adapters, each with its own head, in one forward pass."""

    def __init__(
        self, classifier: nn.Module, layout: ParameterLayout, head: HeadLayers, *, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        model: Any = copy.deepcopy(classifier)
        self.head_layers = tuple((name, _activation(name_, model.config)) for name, name_ in head)
        self.own_head = {
            name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] in dict(head)
        }
        self.layout = layout
        self._routing = _Routing(layout, scaling, dropout)
        self.backbone: Any = model.base_model  # transformers' own class
        self._insert(model)
        self._pools_within = hasattr(self.backbone, "encoder")
        if self._pools_within:
            self._drop_unread_tokens(self.backbone.encoder.layer[-1])
        if getattr(self.backbone, "pooler", None) is not None:
            self.backbone.pooler = None  # the head applies it, to the pooled tokens only
        self.requires_grad_(False)

    def _insert(self, model: nn.Module) -> None:
        """Put the stacked layers in the places of those that PEFT would adapt."""
        salts = {factor.module: 1 + number for number, factor in enumerate(self.layout.factors)}
        for name, salt in salts.items():
            path = name.removeprefix(_PEFT_PREFIX)
            parent, _, child = path.rpartition(".")
            trio = tuple(f"{_PEFT_PREFIX}{parent}.{part}" for part in ("query", "key", "value"))
            if not all(part in salts for part in trio):
                layer: nn.Module = _stacked_lora(model.get_submodule(path), name, salt, self._routing)
                setattr(model.get_submodule(parent), child, layer)
            elif child == "query":  # PEFT's order: query, key, value, so their salts follow one another
                owner, _, place = parent.rpartition(".")
                layer = _fused_attention(model.get_submodule(parent), trio, salt, self._routing)
                setattr(model.get_submodule(owner), place, layer)

    def _drop_unread_tokens(self, block: Any) -> None:
        """Compute the last block above its attention for the pooled tokens only: nothing reads the others."""
        for part in (block.attention.output, block.intermediate, block.output):
            for layer in part.modules():
                if isinstance(layer, _Adapted):
                    layer.tokens = self._routing.pooled
        block.attention.output = _OfPooledTokens(block.attention.output, self._routing.pooled)

    def compile_layers(self, backend: Any = "inductor") -> None:
        """Compile the base's transformer layers: few programs, which serve every layer and any number of rows. With LoRA
        dropout each layer has its own, and DeBERTa one per number of rows; after 8 of them torch runs layers eagerly."""
        config = self.backbone.config
        blocks = self.backbone.h if config.model_type == "gpt2" else self.backbone.encoder.layer
        for block in blocks:
            block.compile(backend=backend)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    def forward(self, w_SK: torch.Tensor, head: Mapping[str, torch.Tensor], batch: TokenBatch) -> torch.Tensor:
        """Logits, S x B x classes, float32. head: parameter name -> S x ... (from `stack_heads`)."""
        return self.apply_head(self.features(w_SK, batch), head)

    def features(self, w_SK: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """The hidden state that the head reads, S x B x H."""
        self._routing.set(w_SK, batch, self.dtype)
        config = self.backbone.config
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if config.model_type != "deberta":
            inputs["position_ids"] = batch.position_ids
        if getattr(config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = batch.token_type_ids
        if config.model_type == "gpt2":
            inputs["use_cache"] = False
        hidden = self.backbone(**inputs).last_hidden_state
        rows = hidden.flatten(0, 1)
        rows = rows if self._pools_within else self._routing.pooled.of(rows)
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
    from transformers.activations import ACT2FN

    if not name:
        return nn.Identity()
    activation: nn.Module = ACT2FN[getattr(config, name, name)]
    return activation
