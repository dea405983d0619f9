"""Batches of token sequences without padding, for many adapters at once.

A `TokenBatch` lays the sequences of S adapters end to end in one row of T tokens (*packed*). Models whose attention
cannot be packed (DeBERTa) get the same sequences padded, one row each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class TokenizedTexts:
    """Tokenised texts end to end: `ids[starts[i]:starts[i + 1]]` is text i; `types` are the segment ids."""

    ids: IntArray
    types: IntArray
    starts: IntArray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.starts)

    def tokens(self, rows: IntArray) -> IntArray:
        """Indices into `ids` of the texts `rows`, end to end in that order."""
        lengths = self.lengths[rows]
        offsets = np.repeat(self.starts[rows] - (np.cumsum(lengths) - lengths), lengths)
        return offsets + np.arange(int(lengths.sum()))


@dataclass(frozen=True)
class TokenBatch:
    """What a stacked model reads. R rows of tokens: one row (packed) or one row per sequence (padded).

    input_ids, position_ids, token_type_ids: R x T. attention_mask: R x T, only when padded.
    owners: the adapter of each token, or None where the tokens divide evenly among the adapters in order.
    pool_index: S x B, the flat index of the token that the head reads.
    sequence_starts: cumulative lengths (packed). gather, gather_mask, scatter: the same sequences padded inside
    the attention only, for devices without a variable-length kernel. dropout_keys: one number per token that does
    not depend on padding or grouping.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    token_type_ids: torch.Tensor
    pool_index: torch.Tensor
    attention_mask: torch.Tensor | None = None
    owners: torch.Tensor | None = None
    sequence_starts: torch.Tensor | None = None
    max_length: int = 0
    gather: torch.Tensor | None = None
    gather_mask: torch.Tensor | None = None
    scatter: torch.Tensor | None = None
    dropout_keys: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device) -> TokenBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        return TokenBatch(**moved)

    def repeat(self, num_adapters: int) -> TokenBatch:
        """The batch of one adapter given to each of `num_adapters`: the same texts, one copy each."""
        rows, tokens = self.input_ids.shape
        shift = torch.arange(num_adapters, device=self.input_ids.device)[:, None] * (rows * tokens)

        def row(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.repeat(*((1, num_adapters) if self.attention_mask is None else (num_adapters, 1)))

        def index(x: torch.Tensor | None, step: torch.Tensor) -> torch.Tensor | None:
            return None if x is None else (x[None].flatten(1) + step).view(-1, *x.shape[1:])

        ids, positions, types = row(self.input_ids), row(self.position_ids), row(self.token_type_ids)
        assert ids is not None and positions is not None and types is not None
        starts = self.sequence_starts
        if starts is not None:
            first = (starts[None, :-1] + shift).flatten()
            starts = torch.cat([first, first.new_full((1,), num_adapters * rows * tokens)]).to(starts.dtype)
        places = torch.arange(num_adapters, device=ids.device)[:, None] * (0 if self.gather is None else self.gather.numel())
        return TokenBatch(
            input_ids=ids, position_ids=positions, token_type_ids=types, attention_mask=row(self.attention_mask),
            pool_index=self.pool_index + shift, sequence_starts=starts, max_length=self.max_length,
            gather=index(self.gather, shift), scatter=index(self.scatter, places),
            gather_mask=None if self.gather_mask is None else self.gather_mask.repeat(num_adapters, 1),
        )  # fmt: skip


TAIL = 64
"""Padding tokens at the end of a fixed shape form sequences of this length."""


def _tensor(array: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _positions(lengths: IntArray) -> IntArray:
    """0, 1, ..., length - 1 for each sequence, end to end."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def token_seeds(rows: Sequence[IntArray], sizes: Sequence[IntArray], keys: IntArray) -> list[IntArray]:
    """One number per token, made of the adapter's key, the text's place in the batch and the token's place in it."""
    return [
        np.repeat(np.arange(len(row)), size) * 4096 + _positions(size) + key
        for row, size, key in zip(rows, sizes, keys, strict=True)
    ]


def pack(
    texts: Sequence[TokenizedTexts], rows: Sequence[IntArray], *, last_token: bool = False, position_offset: int = 0,
    total: int | None = None, keys: IntArray | None = None, padded_attention: bool = True,
) -> TokenBatch:  # fmt: skip
    """Pack texts `rows[s]` (B indices each) of `texts[s]` for every adapter s.

    total: fill the row up to that many tokens with padding sequences, for fixed shapes. `owners` is None if all
    tokens belong to one adapter. keys: one number per adapter that seeds `dropout_keys`; none are made if None.
    """
    tokens = [source.tokens(row) for source, row in zip(texts, rows, strict=True)]
    sizes = [source.lengths[row] for source, row in zip(texts, rows, strict=True)]
    counts = np.array([len(part) for part in tokens])
    used = int(counts.sum())
    fill = 0 if total is None else total - used
    if fill < 0:
        raise ValueError(f"{used} tokens do not fit the {total} of a fixed shape")
    tail = np.full(-(-fill // TAIL), TAIL)
    if fill % TAIL:
        tail[-1] = fill % TAIL
    size = np.concatenate([*sizes, tail])
    begins = np.concatenate([[0], np.cumsum(size)])
    nothing = np.zeros(fill, np.int64)
    starts = begins[: sum(map(len, sizes))].reshape(len(rows), -1)
    ends = begins[1 : sum(map(len, sizes)) + 1].reshape(len(rows), -1)
    owners = np.concatenate([np.repeat(np.arange(len(rows)), counts), nothing])
    gather = mask = scatter = None
    if padded_attention:
        longest = int(size.max())
        mask = np.arange(longest)[None, :] < size[:, None]
        gather = np.where(mask, begins[:-1, None] + np.arange(longest)[None, :], 0)
        scatter = np.flatnonzero(mask)
    if total is not None:  # a fixed number of sequences too: the missing ones are empty
        most = sum(map(len, sizes)) + -(-total // TAIL)
        begins = np.concatenate([begins, np.full(most + 1 - len(begins), begins[-1])]) if len(begins) <= most else begins
    seeds = None
    if keys is not None:
        seeds = _tensor(np.concatenate([*token_seeds(rows, sizes, keys), nothing]))
    return TokenBatch(
        input_ids=_tensor(np.concatenate([*(s.ids[t] for s, t in zip(texts, tokens, strict=True)), nothing]))[None],
        token_type_ids=_tensor(np.concatenate([*(s.types[t] for s, t in zip(texts, tokens, strict=True)), nothing]))[None],
        position_ids=_tensor(_positions(size) + position_offset)[None],
        pool_index=_tensor(ends - 1 if last_token else starts),
        owners=None if len(rows) == 1 else _tensor(owners), max_length=int(size.max()),
        sequence_starts=_tensor(begins.astype(np.int32)), dropout_keys=seeds,
        gather=None if gather is None else _tensor(gather), gather_mask=None if mask is None else _tensor(mask),
        scatter=None if scatter is None else _tensor(scatter),
    )  # fmt: skip


def pad(
    texts: Sequence[TokenizedTexts], rows: Sequence[IntArray], *, pad_token_id: int, last_token: bool = False,
    position_offset: int = 0, keys: IntArray | None = None, multiple: int = 1,
) -> TokenBatch:  # fmt: skip
    """The same sequences with one row each, padded to the longest (rounded up to `multiple`)."""
    size = np.concatenate([source.lengths[row] for source, row in zip(texts, rows, strict=True)])
    longest = -(-int(size.max()) // multiple) * multiple
    inside = np.arange(longest)[None, :] < size[:, None]
    ids = np.full(inside.shape, pad_token_id)
    types = np.zeros(inside.shape, np.int64)
    ids[inside] = np.concatenate([source.ids[source.tokens(row)] for source, row in zip(texts, rows, strict=True)])
    types[inside] = np.concatenate([source.types[source.tokens(row)] for source, row in zip(texts, rows, strict=True)])
    begin = np.arange(len(size)) * longest
    seeds = None
    if keys is not None:
        slots = np.concatenate([np.arange(len(row)) * 4096 + key for row, key in zip(rows, keys, strict=True)])
        seeds = _tensor((slots[:, None] + np.arange(longest)[None, :]).reshape(-1))
    return TokenBatch(
        input_ids=_tensor(ids), token_type_ids=_tensor(types), attention_mask=_tensor(inside.astype(np.int64)),
        position_ids=_tensor(np.where(inside, np.arange(longest)[None, :] + position_offset, 0)),
        pool_index=_tensor((begin + (size - 1 if last_token else 0)).reshape(len(rows), -1)), max_length=longest,
        dropout_keys=seeds,
    )  # fmt: skip
