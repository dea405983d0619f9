"""Finding a base model: a folder, a known name, the embedded one; what is missing is named."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from tiny import FAMILY_NAMES, save_model, saved_base

from cpdiff_core.config import UserError
from cpdiff_core.domains.base_models import BaseModelConfig, build_classifier, load_tokenizer, resolve_base_model


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
