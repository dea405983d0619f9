"""Generators inside the package: their size, and working adapters from a command on a CPU."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from cpdiff_core import bundle
from cpdiff_core.bundle import BUILTIN_FOLDER, Generator
from cpdiff_core.delivery import AdapterRequest, deliver
from cpdiff_core.domains.base_models import embedded_minilm
from cpdiff_core.experiments import experiment
from cpdiff_core.generator.autoencoder import ParameterAutoencoder
from cpdiff_core.generator.diffusion import LatentDiffusion
from cpdiff_core.generators import copy_generator

LIMIT = 20_000_000
NUM_MINILM = 18_432


def test_generator_of_the_six_tasks_stays_below_twenty_megabytes() -> None:
    """Counted on the meta device: two bytes a weight without encoder, four reference vectors per task in float32."""
    config = experiment("glue6/minilm-r1")
    with torch.device("meta"):
        autoencoder = ParameterAutoencoder(config.autoencoder, NUM_MINILM)
        diffusion = LatentDiffusion(config.diffusion, config.condition, autoencoder.channels, autoencoder.length, 384)
    del autoencoder.into, autoencoder.encoder_blocks
    weights = sum(p.numel() for module in (autoencoder, diffusion) for p in module.parameters())
    assert 2 * weights + 4 * 4 * NUM_MINILM * len(config.tasks) + 500_000 < LIMIT


def test_builtin_is_found_by_name(bundled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "BUILTIN_FOLDER", tmp_path)
    copy_generator(bundled.folder, tmp_path / "small", compact=True)
    assert Generator.load("builtin/small").card.compact
    shutil.rmtree(tmp_path / "small")


@pytest.mark.parametrize("folder", sorted(BUILTIN_FOLDER.glob("*/generator.json")), ids=lambda path: path.parent.name)
def test_builtin_gives_adapters_that_peft_loads_on_the_embedded_base(folder: Path, bundled, tmp_path: Path) -> None:
    name = f"builtin/{folder.parent.name}"
    assert sum(path.stat().st_size for path in folder.parent.iterdir()) < LIMIT
    generator = Generator.load(name)
    task = generator.card.tasks[0]
    deliver(generator, AdapterRequest(task=task.name, num=2), tmp_path / "out", bundled.runtime)
    model = AutoModelForSequenceClassification.from_pretrained(embedded_minilm(), num_labels=len(task.labels or ("",)))
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "out" / "candidate-0")).eval()
    ids = torch.tensor([[101, 2023, 3185, 2001, 2204, 102]])
    with torch.no_grad(), adapted.disable_adapter():
        plain = adapted(input_ids=ids).logits
    with torch.no_grad():
        assert not torch.allclose(adapted(input_ids=ids).logits, plain)
    assert generator.card.base.find().files


def test_python_in_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([20, 18432])" in capsys.readouterr().out
    assert (tmp_path / "adapters" / "candidate-00" / "adapter_model.safetensors").is_file()
