"""Batches of token sequences without padding, for many adapters at once.

A `TokenBatch` lays the sequences of S adapters end to end in one row of T tokens (*packed*). Models whose attention
cannot be packed (DeBERTa) get the same sequences padded, one row each. Both are built by tensor operations on the
device where the tokens lie, with shapes that are fixed if `total` is given, so building one can be part of a captured
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

TAIL = 64
"""Padding tokens at the end of a fixed shape form sequences of this length."""
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
    """What a stacked model reads. R rows of tokens: one row (packed) or one row per sequence (padded).

    input_ids, position_ids, token_type_ids: R x T. attention_mask: R x T, only when padded.
    owners: the adapter of each token, or None where the tokens divide evenly among the adapters in order.
    pool_index: S x B, the flat index of the token that the head reads.
    sequence_starts: cumulative lengths, int32 (packed). gather, gather_mask, scatter: the same sequences padded
    inside the attention only, for devices without a variable-length kernel. dropout_keys: one number per token that
    does not depend on padding or grouping.
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
        return TokenBatch(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()})

    def repeat(self, num_adapters: int) -> TokenBatch:
        """The batch of one adapter given to each of `num_adapters`: the same texts, one copy each."""
        device, tokens = self.input_ids.device, self.num_tokens
        packed = self.attention_mask is None
        adapter = torch.arange(num_adapters, device=device)[:, None]

        def rows(x: torch.Tensor) -> torch.Tensor:
            return x.repeat(1, num_adapters) if packed else x.repeat(num_adapters, 1)

        def shifted(x: torch.Tensor | None, step: int) -> torch.Tensor | None:
            return None if x is None else (x.reshape(1, -1) + adapter * step).reshape(-1, *x.shape[1:])

        starts = self.sequence_starts
        if starts is not None:
            begins = (starts[None, :-1] + adapter * tokens).flatten()
            starts = torch.cat([begins, begins.new_full((1,), num_adapters * tokens)]).int()
        return TokenBatch(
            input_ids=rows(self.input_ids), position_ids=rows(self.position_ids), token_type_ids=rows(self.token_type_ids),
            attention_mask=None if self.attention_mask is None else rows(self.attention_mask),
            pool_index=self.pool_index + adapter * tokens, sequence_starts=starts, max_length=self.max_length,
            gather=shifted(self.gather, tokens),
            gather_mask=None if self.gather_mask is None else self.gather_mask.repeat(num_adapters, 1),
            scatter=shifted(self.scatter, 0 if self.gather is None else self.gather.numel()),
        )  # fmt: skip


def pack(
    texts: TokenizedTexts, rows_SB: torch.Tensor, *, last_token: bool = False, position_offset: int = 0,
    total: int | None = None, max_length: int | None = None, keys_S: torch.Tensor | None = None,
    padded_attention: bool = True,
) -> TokenBatch:  # fmt: skip
    """Pack texts `rows_SB[s]` for every adapter s, on the device of `texts`.

    total: fill the row up to that many tokens with padding sequences, for a fixed shape; then max_length, an upper
    bound of the texts' lengths, must be given too. keys_S: one number per adapter that seeds `dropout_keys`.
    Raises ValueError if `total` is too small (checked where the device need not be asked, on the CPU).
    """
    device = texts.ids.device
    rows = rows_SB.flatten()
    size = texts.lengths[rows]
    sources = texts.starts[rows]
    fixed = total is not None
    if total is None:
        total = int(size.sum())
    elif device.type == "cpu" and int(size.sum()) > total:
        raise ValueError(f"{int(size.sum())} tokens do not fit the {total} of a fixed shape")
    if fixed:
        fill = total - size.sum()
        tail = (fill - TAIL * torch.arange(-(-total // TAIL), device=device)).clamp(0, TAIL)
        size = torch.cat([size, tail])
        sources = torch.cat([sources, torch.zeros_like(tail)])
    ends = size.cumsum(0)
    begins = ends - size
    sequence = torch.repeat_interleave(torch.arange(len(size), device=device), size, output_size=total)
    position = torch.arange(total, device=device) - begins[sequence]
    token = sources[sequence] + position
    slot = sequence % rows_SB.shape[1]
    owners = (sequence // rows_SB.shape[1]).clamp_max(len(rows_SB) - 1)
    pooled = (ends - 1 if last_token else begins)[: len(rows)]
    gather = mask = scatter = None
    longest = max(TAIL, max_length) if fixed and max_length is not None else int(size.max())
    if padded_attention:
        mask = torch.arange(longest, device=device)[None, :] < size[:, None]
        gather = torch.where(mask, begins[:, None] + torch.arange(longest, device=device)[None, :], 0)
        scatter = sequence * longest + position
    return TokenBatch(
        input_ids=texts.ids[token][None], token_type_ids=texts.types[token][None],
        position_ids=(position + position_offset)[None], pool_index=pooled.view(rows_SB.shape),
        owners=None if len(rows_SB) == 1 else owners, max_length=longest,
        sequence_starts=torch.cat([ends.new_zeros(1), ends]).int(), gather=gather, gather_mask=mask, scatter=scatter,
        dropout_keys=None if keys_S is None else slot * _SLOT + position + keys_S[owners],
    )  # fmt: skip


def pad(
    texts: TokenizedTexts, rows_SB: torch.Tensor, *, pad_token_id: int, last_token: bool = False,
    position_offset: int = 0, max_length: int | None = None, keys_S: torch.Tensor | None = None,
) -> TokenBatch:  # fmt: skip
    """The same sequences with one row each, padded to the longest or to `max_length`."""
    device = texts.ids.device
    size = texts.lengths[rows_SB.flatten()]
    longest = int(size.max()) if max_length is None else max_length
    place = torch.arange(longest, device=device)[None, :]
    inside = place < size[:, None]
    token = torch.where(inside, texts.starts[rows_SB.flatten()][:, None] + place, 0)
    begins = torch.arange(len(size), device=device) * longest
    keys = None
    if keys_S is not None:
        slot = torch.arange(rows_SB.shape[1], device=device) * _SLOT
        keys = (keys_S[:, None, None] + slot[None, :, None] + place[None]).flatten()
    return TokenBatch(
        input_ids=torch.where(inside, texts.ids[token], pad_token_id), attention_mask=inside.long(),
        token_type_ids=torch.where(inside, texts.types[token], 0),
        position_ids=torch.where(inside, place + position_offset, 0),
        pool_index=(begins + (size - 1 if last_token else 0)).view(rows_SB.shape), max_length=longest, dropout_keys=keys,
    )  # fmt: skip
