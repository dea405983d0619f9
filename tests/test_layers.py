"""Imports point one way: deployments, flows -> tasks -> cpdiff_core, and inside the core from the top down."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = {"cpdiff_core": 0, "tasks": 1, "flows": 2, "deployments": 2}

# Inside cpdiff_core: what is not named here (experiments, reports, export, ...) is on top.
CORE = {
    "config": 0,
    "artifacts": 1, "cuda_graphs": 1, "progress": 1, "lora": 1,
    "domains": 2, "generator": 2, "evaluation": 2,
}  # fmt: skip
TOP = 3


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((PROJECT / package).rglob("*.py"))]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def rank_in_core(parts: list[str]) -> int:
    if len(parts) < 2 or parts[1] in ("__init__", "__version__"):
        return 0  # the package itself holds a version and nothing else
    return CORE.get(parts[1], TOP)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_module_imports_only_from_its_own_layer_or_below(path: Path) -> None:
    own = list(path.relative_to(PROJECT).with_suffix("").parts)
    for line, name in imported(path):
        parts = name.split(".")
        where = f"{'/'.join(own)}.py:{line} imports {name}"
        assert own[0] != "cpdiff_core" or parts[0] != "prefect", f"{where}: the science knows no workflow engine"
        if parts[0] not in PACKAGES:
            continue
        assert PACKAGES[parts[0]] <= PACKAGES[own[0]], f"{where}: that is a layer above"
        if own[0] == parts[0] == "cpdiff_core":
            assert rank_in_core(parts) <= rank_in_core(own), f"{where}: that is a layer above"


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not [path for path in modules() if path.stem in ("utils", "util", "common", "helpers", "misc")]


def test_flows_import_nothing_that_a_cached_run_does_not_need() -> None:
    stems = {path.stem for path in (PROJECT / "flows").glob("*.py")} - {"__init__", "benchmark"}
    flows = [f"flows.{stem}" for stem in sorted(stems)]
    heavy = ("peft", "diffusers", "scipy", "sklearn", "matplotlib", "evaluate", "transformers", "datasets", "torchvision")
    code = f"import sys, {', '.join(flows)}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_experiment_on_texts_imports_nothing_of_styles() -> None:
    code = "import sys; from flows import cli; cli._flow_of(cli.load_experiment('quickstart')); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    names = [name for name in done.stdout.split() if name.split(".")[0] in PACKAGES]
    assert "flows.pipeline" in names
    assert [name for name in names if "style" in name] == []
