"""Batches of token sequences without padding, for many adapters at once.

A `TokenBatch` lays the sequences of S adapters end to end in one row of T tokens (*packed*), each adapter's share
rounded up to whole chunks so that the small LoRA products are one batched matrix product over chunks. Models
whose attention cannot be packed (DeBERTa) get the same sequences padded, one row each.
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
    groups: adapter of each chunk of tokens, or None where the tokens divide evenly among the adapters in order.
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
    groups: torch.Tensor | None = None
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


def _tensor(array: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _positions(lengths: IntArray) -> IntArray:
    """0, 1, ..., length - 1 for each sequence, end to end."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def pack(
    texts: Sequence[TokenizedTexts], rows: Sequence[IntArray], *, last_token: bool = False, position_offset: int = 0,
    chunk: int = 1, total: int | None = None, keys: IntArray | None = None, padded_attention: bool = True,
) -> TokenBatch:  # fmt: skip
    """Pack texts `rows[s]` (B indices each) of `texts[s]` for every adapter s.

    chunk: each adapter's tokens are filled up to a multiple of it with padding sequences of their own; `total`
    fills the whole row up to that many tokens, for fixed shapes. `groups` is None if every adapter has the same
    number of tokens. keys: one number per adapter that seeds `dropout_keys`; none are made if None.
    """
    num_adapters = len(rows)
    ids, types, lengths, pools, shares, seeds = [], [], [], [], [], []
    start = 0
    for s, (source, row) in enumerate(zip(texts, rows, strict=True)):
        tokens = source.tokens(row)
        size = source.lengths[row]
        begin = start + np.cumsum(size) - size
        pools.append(begin + size - 1 if last_token else begin)
        fill = -len(tokens) % chunk
        ids += [source.ids[tokens], np.zeros(fill, np.int64)]
        types += [source.types[tokens], np.zeros(fill, np.int64)]
        lengths += [size, np.array([fill])] if chunk > 1 else [size]
        if keys is not None:
            slot = np.repeat(np.arange(len(row)), size) * 4096 + _positions(size)
            seeds += [slot + keys[s], np.zeros(fill, np.int64)]
        shares.append(len(tokens) + fill)
        start += len(tokens) + fill
    if total is not None:
        if total < start:
            raise ValueError(f"{start} tokens do not fit the {total} of a fixed shape")
        tail = np.full((total - start) // chunk, chunk)
        ids.append(np.zeros(total - start, np.int64))
        types.append(np.zeros(total - start, np.int64))
        lengths.append(tail)
        seeds.append(np.zeros(total - start, np.int64))
    size = np.concatenate(lengths)
    size = size[size > 0]
    even = total is None and len(set(shares)) == 1
    owners = np.repeat(np.arange(num_adapters), [share // chunk for share in shares])
    if total is not None:
        owners = np.concatenate([owners, np.zeros((total - start) // chunk, np.int64)])
    gather = mask = scatter = None
    if padded_attention:
        longest = int(size.max())
        inside = np.arange(longest)[None, :] < size[:, None]
        begin = np.cumsum(size) - size
        gather = np.where(inside, begin[:, None] + np.arange(longest)[None, :], 0)
        mask, scatter = inside, np.flatnonzero(inside)
    return TokenBatch(
        input_ids=_tensor(np.concatenate(ids))[None], token_type_ids=_tensor(np.concatenate(types))[None],
        position_ids=_tensor(_positions(size) + position_offset)[None], pool_index=_tensor(np.stack(pools)),
        groups=None if even else _tensor(owners), max_length=int(size.max()),
        sequence_starts=_tensor(np.concatenate([[0], np.cumsum(size)]).astype(np.int32)),
        gather=None if gather is None else _tensor(gather), gather_mask=None if mask is None else _tensor(mask),
        scatter=None if scatter is None else _tensor(scatter),
        dropout_keys=_tensor(np.concatenate(seeds)) if keys is not None else None,
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
