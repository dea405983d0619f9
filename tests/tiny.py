"""Tiny real models: transformers' own classes with random weights, saved as a user's folder with a tiny tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    BertConfig,
    DebertaConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.base_models import BaseModel, BaseModelConfig, resolve_base_model

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
GOOD = ("fine", "bright", "warm", "lovely")
BAD = ("dull", "cold", "broken", "sad")
NEUTRAL = tuple(f"w{number}" for number in range(40))
WORDS = (*SPECIAL, *GOOD, *BAD, *NEUTRAL)

_SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
# Weights larger than usual, so that an untrained model tells inputs apart.
_COMMON: dict[str, Any] = {"vocab_size": len(WORDS), "initializer_range": 0.2}

CONFIGS: dict[str, Any] = {
    "bert": BertConfig(**_COMMON, **_SHAPE, max_position_embeddings=64),
    "roberta": RobertaConfig(**_COMMON, **_SHAPE, max_position_embeddings=70, pad_token_id=1, type_vocab_size=1),
    "deberta": DebertaConfig(
        **_COMMON, **_SHAPE, max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"],
        position_biased_input=False, type_vocab_size=0,
    ),
    "gpt2": GPT2Config(
        **_COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=3, eos_token_id=3, pad_token_id=None
    ),
}  # fmt: skip
FAMILY_NAMES = tuple(CONFIGS)


def save_model(path: Path, family: str = "bert", seed: int = 0) -> Path:
    """A folder as `save_pretrained` leaves it: a base model without a classifier, and its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModel.from_config(CONFIGS[family]).save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    names: dict[str, str] = {"unk_token": "[UNK]", "eos_token": "[SEP]"}
    if family != "gpt2":
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    return path


def saved_base(path: Path, family: str = "bert", seed: int = 0) -> BaseModel:
    return resolve_base_model(BaseModelConfig(name=str(save_model(path, family, seed))))


def sentences(num: int, seed: int, cue: bool = True) -> tuple[list[str], list[int]]:
    """Sentences of 2 to 9 words; label 1 if a word of GOOD is in it, 0 if one of BAD."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(num):
        label = int(rng.integers(2))
        words = [str(word) for word in rng.choice(NEUTRAL, rng.integers(1, 9))]
        if cue:
            words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(GOOD if label else BAD)))
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_in_copy(flow: Callable[..., str], experiment: Any, runtime: RuntimeConfig, root: Path, copy: Path) -> Path:
    """Run an experiment in a copy of a root in which a like one has been computed; the folder of its report."""
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: shutil.copytree(root, copy)}):
        return Path(flow(experiment, runtime)).parent
