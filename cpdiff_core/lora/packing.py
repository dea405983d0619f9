"""Batches of token sequences with hardly any padding, for many adapters at once.

Several sequences share a row of L tokens, whoever's they are, and a block mask keeps their attention apart: a mixed
batch of GLUE fills its rows to 98 % where one row per sequence would leave half of them empty. `place` decides on
the host where each sequence goes; the batch itself is built by tensor operations on the device where the tokens lie,
with shapes that are fixed by the number of rows, so building it can be part of a captured CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_SLOT = 4096
"""More than the tokens of any text: text and token number share one dropout key."""


@dataclass(frozen=True)
class TokenizedTexts:
    """Tokenised texts end to end: `ids[starts[i]:starts[i + 1]]` is text i; `types` are the segment ids. int64."""

    ids: torch.Tensor
    types: torch.Tensor
    starts: torch.Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> torch.Tensor:
        return self.starts.diff()

    def take(self, rows: torch.Tensor) -> TokenizedTexts:
        """The texts `rows` alone, in that order."""
        lengths = self.lengths[rows]
        ends = lengths.cumsum(0)
        tokens = torch.repeat_interleave(self.starts[rows] - (ends - lengths), lengths) + torch.arange(int(ends[-1]))
        return TokenizedTexts(self.ids[tokens], self.types[tokens], torch.cat([ends.new_zeros(1), ends]))

    def to(self, device: torch.device) -> TokenizedTexts:
        return TokenizedTexts(self.ids.to(device), self.types.to(device), self.starts.to(device))


def join(texts: Sequence[TokenizedTexts]) -> tuple[TokenizedTexts, list[int]]:
    """Several collections as one, and the number of the first text of each in it."""
    starts, firsts, tokens, rows = [torch.zeros(1, dtype=torch.int64)], [], 0, 0
    for part in texts:
        starts.append(part.starts[1:] + tokens)
        firsts.append(rows)
        tokens += len(part.ids)
        rows += len(part)
    joined = TokenizedTexts(
        torch.cat([part.ids for part in texts]), torch.cat([part.types for part in texts]), torch.cat(starts)
    )
    return joined, firsts


@dataclass(frozen=True)
class TokenBatch:
    """What a stacked model reads: R rows of L tokens.

    input_ids, position_ids, token_type_ids: R x L. attention_mask: R x 1 x L x L, added to the attention scores
    (packed), or R x L with 1 for tokens (one sequence per row). owners: the adapter of each of the R L tokens, or None
    where the rows divide evenly among the adapters in order. pool_index: S x B, the flat index of the token that the
    head reads. dropout_keys: one number per token that does not depend on where the token lies.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    token_type_ids: torch.Tensor
    attention_mask: torch.Tensor
    pool_index: torch.Tensor
    owners: torch.Tensor | None = None
    dropout_keys: torch.Tensor | None = None

    def repeat(self, num_adapters: int) -> TokenBatch:
        """The batch of one adapter given to each of `num_adapters`: the same texts, one copy each."""

        def rows(x: torch.Tensor) -> torch.Tensor:
            return x.repeat(num_adapters, *[1] * (x.dim() - 1))

        shift = torch.arange(num_adapters, device=self.input_ids.device)[:, None] * self.input_ids.numel()
        return TokenBatch(
            input_ids=rows(self.input_ids), position_ids=rows(self.position_ids), token_type_ids=rows(self.token_type_ids),
            attention_mask=rows(self.attention_mask), pool_index=self.pool_index + shift,
        )  # fmt: skip


def place(lengths: NDArray[np.int64], row_length: int) -> tuple[NDArray[np.int64], int]:
    """Where each sequence starts (row number x L + offset), and how many rows that takes.

    The longest first, each into the fullest row that still has room (best fit). Raises ValueError for a sequence longer
    than a row.
    """
    if len(lengths) and int(lengths.max()) > row_length:
        raise ValueError(f"a text of {int(lengths.max())} tokens does not fit a row of {row_length}")
    starts = np.zeros(len(lengths), np.int64)
    room: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by the room they have left
    num_rows = 0
    for i in np.argsort(-lengths, kind="stable"):
        need = int(lengths[i])
        left = next((free for free in range(need, row_length) if room[free]), None)
        if left is None:
            row, left = num_rows, row_length
            num_rows += 1
        else:
            row = room[left].pop()
        starts[i] = row * row_length + row_length - left
        room[left - need].append(row)
    return starts, num_rows


def pack(
    texts: TokenizedTexts, rows_SB: torch.Tensor, places_SB: torch.Tensor, num_rows: int, row_length: int, *,
    dtype: torch.dtype = torch.float32, last_token: bool = False, position_offset: int = 0, causal: bool = False,
    keys_S: torch.Tensor | None = None,
) -> TokenBatch:  # fmt: skip
    """Texts `rows_SB[s]` for every adapter s, laid out as `place` says, on the device of `texts`.

    dtype: of the mask, which is added to scores of that type. keys_S: one number per adapter that seeds `dropout_keys`.
    """
    device, num_tokens = texts.ids.device, num_rows * row_length
    rows, places = rows_SB.flatten(), places_SB.flatten()
    lengths = texts.lengths[rows]
    offset = torch.arange(row_length, device=device)[None, :]
    # A text's unused places all go to one slot beyond the end, which is cut off.
    target = torch.where(offset < lengths[:, None], places[:, None] + offset, num_tokens).flatten()

    def spread(values: torch.Tensor, empty: int) -> torch.Tensor:
        out = values.new_full((num_tokens + 1,), empty)
        return out.scatter_(0, target, values.expand(len(rows), row_length).flatten())[:num_tokens]

    source = spread(texts.starts[rows][:, None] + offset, 0)
    position = spread(offset, 0)
    sequence = spread(torch.arange(1, len(rows) + 1, device=device)[:, None], 0)
    block = sequence.view(num_rows, 1, row_length)
    allowed = block.transpose(1, 2) == block
    if causal:
        allowed = allowed & torch.ones(row_length, row_length, dtype=torch.bool, device=device).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)
    slot = (sequence - 1).clamp_min(0)
    owners = slot // rows_SB.shape[1]
    keys = None if keys_S is None else slot % rows_SB.shape[1] * _SLOT + position + keys_S[owners]
    pooled = places + lengths - 1 if last_token else places
    shape = (num_rows, row_length)
    return TokenBatch(
        input_ids=texts.ids[source].view(shape), token_type_ids=texts.types[source].view(shape),
        position_ids=(position + position_offset).view(shape), attention_mask=mask[:, None],
        pool_index=pooled.view(rows_SB.shape), owners=None if len(rows_SB) == 1 else owners, dropout_keys=keys,
    )  # fmt: skip


def pad(
    texts: TokenizedTexts, rows_SB: torch.Tensor, *, pad_token_id: int, last_token: bool = False,
    position_offset: int = 0, row_length: int | None = None, keys_S: torch.Tensor | None = None,
) -> TokenBatch:  # fmt: skip
    """The same texts with one row each, padded to the longest or to `row_length`."""
    device = texts.ids.device
    size = texts.lengths[rows_SB.flatten()]
    longest = int(size.max()) if row_length is None else row_length
    offset = torch.arange(longest, device=device)[None, :]
    inside = offset < size[:, None]
    token = torch.where(inside, texts.starts[rows_SB.flatten()][:, None] + offset, 0)
    begins = torch.arange(len(size), device=device) * longest
    keys = None
    if keys_S is not None:
        slot = torch.arange(rows_SB.shape[1], device=device) * _SLOT
        keys = (keys_S[:, None, None] + slot[None, :, None] + offset[None]).flatten()
    return TokenBatch(
        input_ids=torch.where(inside, texts.ids[token], pad_token_id), attention_mask=inside.long(),
        token_type_ids=torch.where(inside, texts.types[token], 0),
        position_ids=torch.where(inside, offset + position_offset, 0),
        pool_index=(begins + (size - 1 if last_token else 0)).view(rows_SB.shape), dropout_keys=keys,
    )  # fmt: skip
