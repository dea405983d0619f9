"""Zoos: harvests shared as PEFT folders, and a generator trained on adapters that PEFT itself has saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForSequenceClassification

from cpdiff_core.artifacts import read_tensors
from cpdiff_core.bundle import Generator
from cpdiff_core.config import UserError
from cpdiff_core.delivery import AdapterRequest, deliver
from cpdiff_core.domains.base_models import BaseModel, BaseModelConfig, resolve_base_model
from cpdiff_core.zoo_folder import ZooGeneratorConfig, find_zoo, shared_shape
from flows.zoos import export_zoo, import_zoo

TRAINING = {"steps": 4, "batch_size": 8}
SETTINGS = ZooGeneratorConfig.model_validate(
    {
        "autoencoder": {"kind": "conv", "channels": 4, "length": 8, "training": TRAINING},
        "condition": {"kind": "one_hot"}, "sampling": {"num_inference_steps": 3},
        "diffusion": {"unet": {"width": 16, "multipliers": [1, 2], "time_width": 16}, "training": TRAINING},
    }
)  # fmt: skip


@pytest.fixture
def root(bundled) -> Iterator[Path]:
    """The root of the bundled experiment, so that its stages are cached."""
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: bundled.root}):
        yield bundled.root


def save_peft(folder: Path, base: Path, seed: int, **options) -> None:
    """An adapter as PEFT's own `save_pretrained` leaves it, with random weights."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"} | options
    adapted = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder))


def test_exported_zoo_holds_the_harvest_and_comes_back_bit_for_bit(bundled, root, tmp_path) -> None:
    runtime = bundled.runtime.model_copy(update={"data_dir": str(bundled.data)})
    zoo = Path(export_zoo(bundled.experiment, str(tmp_path / "zoo"), None, runtime))
    harvests = {
        json.loads(path.read_text())["inputs"]["config"]["task"]["task"]["name"]: path.parent
        for path in root.glob("harvest_checkpoints/*/config.json")
    }
    w_NK = read_tensors(harvests["left"], "checkpoints.safetensors")["w_NK"]
    adapters = sorted((zoo / "left").glob("checkpoint-*"))
    assert len(adapters) == len(w_NK) == 5
    model = AutoModelForSequenceClassification.from_pretrained(bundled.base.folder, num_labels=2)
    state = get_peft_model_state_dict(PeftModel.from_pretrained(model, str(adapters[2])))
    layout = Generator.load(bundled.folder).card.layout
    assert torch.equal(layout.flatten(state), w_NK[2])
    made = Generator.load(import_zoo([str(zoo)], {}, str(bundled.base.folder), SETTINGS, bundled.runtime))
    assert made.card.task_names == ("left", "right")
    assert made.card.task("left").description == "The task left."
    imported = [read_tensors(path, "checkpoints.safetensors")["w_NK"] for path in root.glob("import_harvest/*")]
    assert any(torch.equal(item, w_NK) for item in imported)
    torch.testing.assert_close(
        made.heads["left"], Generator.load(bundled.folder).heads["left"], rtol=0, atol=0
    )
    assert "2 tasks" in (zoo / "README.md").read_text()
    # Nothing about it depends on where it came from: the same settings on the same vectors give the same normaliser.
    mine, theirs = made.normalizer.tensors(), Generator.load(bundled.folder).normalizer.tensors()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_adapters_that_peft_saved_become_a_generator_whose_adapters_peft_loads(bundled, root, tmp_path) -> None:
    for task, seed in (("topics", 0), ("moods", 100)):
        for step in (900, 1000, 1100):
            save_peft(tmp_path / task / f"checkpoint-{step}", bundled.base.folder, seed + step)
    zoo = find_zoo([tmp_path / "topics", tmp_path / "moods"], {})
    assert [Path(files.weights.path).parent.name[-4:] for files in zoo[0].adapters] == ["-900", "1000", "1100"]
    folders = [str(tmp_path / "topics"), str(tmp_path / "moods")]
    generator = Generator.load(import_zoo(folders, {"moods": "Find the mood."}, None, SETTINGS, bundled.runtime))
    assert generator.card.base.name == bundled.base.folder.name
    assert generator.card.task("moods").description == "Find the mood."
    assert generator.card.task("topics").labels == ("0", "1", "2")
    deliver(generator, AdapterRequest(task="topics", num=2), tmp_path / "out", bundled.runtime)
    model = AutoModelForSequenceClassification.from_pretrained(bundled.base.folder, num_labels=3)
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "out" / "candidate-1"))
    w_K = generator.generate("topics", 2).w_MK[1]
    state = get_peft_model_state_dict(loaded)
    assert torch.equal(generator.card.layout.flatten(state), w_K)
    last = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(bundled.base.folder, num_labels=3),
        str(tmp_path / "topics" / "checkpoint-1100"),
    )
    name = "base_model.model.classifier.weight"
    assert torch.equal(state[name], get_peft_model_state_dict(last)[name])


def test_zoos_that_do_not_fit_together_are_each_one_clear_error(bundled, root, tmp_path) -> None:
    base = bundled.base.folder
    save_peft(tmp_path / "a" / "checkpoint-1", base, 0)
    save_peft(tmp_path / "rank" / "checkpoint-1", base, 0, r=4, lora_alpha=8)
    save_peft(tmp_path / "alpha" / "checkpoint-1", base, 0, lora_alpha=16)
    save_peft(tmp_path / "modules" / "checkpoint-1", base, 0, target_modules=["key"])
    save_peft(tmp_path / "b" / "a" / "checkpoint-1", base, 1)
    (tmp_path / "empty").mkdir()

    def attempt(*names: str, base: BaseModel = bundled.base, descriptions: dict[str, str] | None = None) -> None:
        shared_shape(find_zoo([tmp_path / name for name in names], descriptions or {}), base)

    minilm = resolve_base_model(BaseModelConfig(name="minilm-l6"))
    for names, options, message in [
        (("a", "rank"), {}, "rank is 4"),
        (("a", "alpha"), {}, "scaling lora_alpha / r is 8"),
        (("a", "modules"), {}, "target_modules"),
        (("a", "b/a"), {}, "occurs twice"),
        (("empty",), {}, "holds no PEFT folder"),
        (("nowhere",), {}, "no such folder"),
        (("a",), {"descriptions": {"c": "x"}}, "--describe 'c'"),
        (("a",), {"base": minilm}, "does not match the layout"),
    ]:
        with pytest.raises(UserError, match=message):
            attempt(*names, **options)
    for text, message in (("[1]", "must hold one JSON object"), ("{", "is not JSON")):
        (tmp_path / "a" / "task.json").write_text(text)
        with pytest.raises(UserError, match=message):
            attempt("a")
    (tmp_path / "a" / "task.json").unlink()
    with pytest.raises(UserError, match="has no description"):
        import_zoo([str(tmp_path / "a")], {}, None, ZooGeneratorConfig(), bundled.runtime)


def test_folders_of_which_nothing_says_whether_they_are_tasks_are_not_taken_for_one_task(bundled, tmp_path) -> None:
    zoo = tmp_path / "zoo"
    for task in ("a", "b"):
        save_peft(zoo / task / "checkpoint-1", bundled.base.folder, 0)
    with pytest.raises(UserError, match=r"zoo': adapters lie in its folder 'a', which has no task.json; give each task's"):
        find_zoo([zoo], {})
    assert [task.card.name for task in find_zoo([zoo / "a", zoo / "b"], {})] == ["a", "b"]
    (zoo / "a" / "task.json").write_text("{}")
    with pytest.raises(UserError, match=r"its folder 'b', which has no task.json"):
        find_zoo([zoo], {})
    (zoo / "b" / "task.json").write_text("{}")
    assert [task.card.name for task in find_zoo([zoo], {})] == ["a", "b"]
    (zoo / "task.json").write_text("{}")
    (task,) = find_zoo([zoo], {})
    assert (task.card.name, len(task.adapters)) == ("zoo", 2)
