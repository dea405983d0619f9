"""Finding a base model: a folder, a known name, the embedded one; what is missing is named."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import FAMILY_NAMES, save_model, saved_base
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from cpdiff_core.config import UserError
from cpdiff_core.domains.base_models import (
    BaseModelConfig,
    build_classifier,
    cached_classifier,
    load_tokenizer,
    resolve_base_model,
)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_folder_of_each_architecture_is_found_and_has_a_pad_token(tmp_path: Path, family: str) -> None:
    base = resolve_base_model(BaseModelConfig(name=str(save_model(tmp_path, family))))
    assert base.family == family
    assert load_tokenizer(base).pad_token is not None
    model, _ = build_classifier(base, 2)
    assert model.config.pad_token_id is not None
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_embedded_minilm_is_found_without_a_network() -> None:
    base = resolve_base_model(BaseModelConfig())
    assert (base.name, base.family) == ("minilm-l6", "bert")
    config = json.loads((base.folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (384, 6)


def test_missing_folder_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"base_model.name '/no/such': no such folder; check the path"):
        resolve_base_model(BaseModelConfig(name="/no/such"))
    whole = save_model(tmp_path / "whole")
    for pattern, message in (
        ("config.json", "has no config.json; give a folder saved by transformers"),
        ("*.safetensors", r"has no model weights \(\*.safetensors\)"),
        ("token*", "has no tokenizer files"),
    ):
        part = tmp_path / "part"
        shutil.copytree(whole, part)
        for path in part.glob(pattern):
            path.unlink()
        with pytest.raises(UserError, match=message):
            resolve_base_model(BaseModelConfig(name=str(part)))
        shutil.rmtree(part)


def test_other_architecture_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(UserError, match=r"architecture 't5' is not supported; use one of bert, roberta, deberta, gpt2"):
        resolve_base_model(BaseModelConfig(name=str(folder)))


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    base = resolve_base_model(BaseModelConfig(name=str(folder)))
    with pytest.raises(UserError, match=r"^base_model.name '.*': cannot be loaded \(.*\)$") as error:
        build_classifier(base, 2)
    assert "\n" not in str(error.value)


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _with_classifier(folder: Path, labels: int) -> None:
    config = AutoConfig.from_pretrained(folder, num_labels=labels)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def _not_finite(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    next(model.parameters()).data[3] = float("nan")
    model.save_pretrained(folder)


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "two labels of its own": (lambda folder: _with_classifier(folder, 2), r"has a classifier of its own \(classifier\.weight\)"),
    "five labels of its own": (lambda folder: _with_classifier(folder, 5), r"has a classifier of its own \(classifier\.weight\)"),
    "more layers than weights": (
        lambda folder: _change(folder / "config.json", num_hidden_layers=3), r"its weights lack 16 parameters of the bert",
    ),
    "another width": (
        lambda folder: _change(folder / "config.json", intermediate_size=48),
        r"do not fit its config.json \(bert.*intermediate.dense.bias has shape \[64\], not \[48\]\)",
    ),
    "not finite": (_not_finite, r"weights that are not finite \(bert.embeddings.word_embeddings.weight\)"),
    "quantised": (
        lambda folder: _change(
            folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
        ),
        r"cannot be loaded \(",
    ),
    "no token for padding": (
        lambda folder: _change(folder / "config.json", pad_token_id=None, eos_token_id=None),
        r"neither pad_token_id nor eos_token_id",
    ),
    "a decoder": (lambda folder: _change(folder / "config.json", is_decoder=True), r"is_decoder true"),
    "an adapter inside": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'), r"is a folder of a PEFT adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_base_of_which_a_part_would_be_random_or_ignored_is_refused_in_a_line(tmp_path: Path, case: str) -> None:
    folder = save_model(tmp_path / "model")
    spoil, message = UNUSABLE[case]
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        cached_classifier(resolve_base_model(BaseModelConfig(name=str(folder))), 2)
    assert str(error.value).startswith(f"base_model.name '{folder}': ")
    assert "\n" not in str(error.value)


def test_base_without_its_classifier_is_taken(tmp_path: Path) -> None:
    """What the refusal says to do."""
    folder = save_model(tmp_path / "model")
    _with_classifier(folder, 5)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    _, missing = build_classifier(resolve_base_model(BaseModelConfig(name=str(folder))), 2)
    assert missing == ("classifier.bias", "classifier.weight")


def test_tokenizer_that_cannot_be_loaded_or_has_nothing_to_pad_with_is_a_line(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    names = json.loads((folder / "tokenizer_config.json").read_text())
    for token in ("pad_token", "eos_token"):
        names.pop(token)
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match=r"neither a pad token nor an end-of-text token; set pad_token"):
        load_tokenizer(resolve_base_model(BaseModelConfig(name=str(folder))))
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match=r"its tokenizer cannot be loaded \(.*\); save it") as error:
        load_tokenizer(resolve_base_model(BaseModelConfig(name=str(folder))))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["bert-base", "nobody/has-this-model", "not a name"])
def test_model_that_is_not_on_this_machine_is_named_within_seconds(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"base_model.name .*use an embedded default \(minilm-l6\)"):
        resolve_base_model(BaseModelConfig(name=name))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("family", "num_tokens"), [("bert", 64), ("roberta", 68), ("deberta", 64), ("gpt2", 64)])
def test_config_says_how_many_blocks_and_tokens_there_are(tmp_path: Path, family: str, num_tokens: int) -> None:
    base = saved_base(tmp_path / family, family)
    assert (base.num_blocks, base.num_tokens) == (2, num_tokens)
    config = json.loads((base.folder / "config.json").read_text())
    (base.folder / "config.json").write_text(json.dumps({"model_type": config["model_type"]}))
    assert (base.num_blocks, base.num_tokens) == (None, None)
