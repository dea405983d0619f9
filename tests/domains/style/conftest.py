"""Small styles in files for the tests of the style domain."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from style_pictures import write_pictures

from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.style.styles import FolderImages, ResolvedStyle, Style, resolve_style

if TYPE_CHECKING:
    from cpdiff_core.style_experiments import StyleExperimentConfig

MakeStyle = Callable[..., ResolvedStyle]


@pytest.fixture
def make_style(tmp_path: Path) -> MakeStyle:
    """`make_style(name, num, shift=)`: a folder of small pictures in two classes, resolved."""

    def make(name: str, num: int = 20, seed: int = 0) -> ResolvedStyle:
        write_pictures(tmp_path / name, num, seed)
        return resolve_style(Style(name=name, source=FolderImages(path=name)), tmp_path)

    return make


@dataclass(frozen=True)
class StyleRun:
    """A tiny style experiment as the flow runs it: four styles, of which one is left out once."""

    report: Path
    root: Path
    data: Path
    experiment: StyleExperimentConfig
    runtime: RuntimeConfig

    def inputs(self, stage: str) -> dict[Path, dict[str, Any]]:
        """folder -> inputs of every artifact of a stage."""
        found = sorted((self.root / stage).glob("*/config.json"))
        return {path.parent: json.loads(path.read_text())["inputs"] for path in found}


def tiny_style_values() -> dict[str, Any]:
    def training(size: int, steps: int = 3) -> dict[str, Any]:
        return {"steps": steps, "batch_size": size}

    folders = [{"name": name, "source": {"kind": "folder", "path": name}} for name in ("photo", "ink", "oil", "chalk")]
    made = {"kind": "synthetic", "photos": {"kind": "folder", "path": "photo"}, "effects": ["hue", "grain"], "seed": 1}
    return {
        "name": "tiny-styles", "photos": folders[0], "styles": [*folders[1:], {"name": "made", "source": made}],
        "base": {
            "kind": "tiny", "training": training(4, 2),
            "size": {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8},
        },
        "lora": {"rank": 2, "lora_alpha": 6.0},
        "fine_tune": {"num_steps": 4, "batch_size": 4, "warmup_steps": 1, "num_harvest": 4, "harvest_every": 1},
        "num_checkpoints": 4, "scored_checkpoints": 1,
        "autoencoder": {"kind": "conv", "channels": 6, "length": 4, "training": training(8)},
        "condition": {"num_images": 3, "width": 8},
        "diffusion": {
            "prediction_type": "v_prediction", "training": training(8),
            "unet": {"width": 16, "multipliers": [1, 2], "time_width": 16},
        },
        "compared_objectives": [{"kind": "through_base", "images_per_adapter": 2, "training": training(3)}],
        "left_out": ["ink"], "scored": ["oil", "chalk"],
        "sampling": {"num_inference_steps": 3, "num_candidates": 3},
        "images": {"num_images": 6, "num_inference_steps": 2, "guidance_scale": 1.0},
    }  # fmt: skip


@pytest.fixture(scope="session")
def style_run(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> StyleRun:
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    from cpdiff_core.style_experiments import StyleExperimentConfig
    from flows.style import run_style_experiment

    path = tmp_path_factory.mktemp("style_run")
    for seed, name in enumerate(("photo", "ink", "oil", "chalk")):
        write_pictures(path / "data" / name, 20, seed)
    runtime = RuntimeConfig(device="cpu", progress=False, data_dir=str(path / "data"))
    experiment = StyleExperimentConfig.model_validate(tiny_style_values())
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: path / "root"}):
        report = Path(run_style_experiment(experiment, runtime)).parent
    return StyleRun(report, path / "root", path / "data", experiment, runtime)


@pytest.fixture(scope="session")
def style_bundle(style_run: StyleRun) -> Path:
    """The folder of the run's generator, as the flow bundles it."""
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    from flows.style_bundles import bundle_style_experiment

    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: style_run.root}):
        return Path(bundle_style_experiment(style_run.experiment, style_run.runtime))
