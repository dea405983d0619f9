"""What the source must not contain, and where the temporary server listens."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SOURCES = [path for name in ("cpdiff_core", "tasks", "flows", "deployments") for path in (PROJECT / name).rglob("*.py")]
UNPICKLING = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and UNPICKLING & {item.name.split(".")[0] for item in node.names}:
            yield "imports a module that unpickles"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLING:
            yield "imports from a module that unpickles"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {item.arg: ast.unparse(item.value) for item in node.keywords}
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            yield "numpy.load with pickles"
        if name in ("eval", "exec", "yaml.load", "os.system") or given.get("shell") == "True":
            yield name
        if given.get("trust_remote_code", "False") != "False":
            yield "trust_remote_code"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_source_unpickles_and_evaluates_nothing(path: Path) -> None:
    assert list(faults(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from cloudpickle import loads", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(x)",
        "np.load(f, allow_pickle=True)", "yaml.load(f)", "run(c, shell=True)", "f(trust_remote_code=True)",
    ],
)  # fmt: skip
def test_scan_finds_what_it_looks_for(source: str) -> None:
    assert len(list(faults(source))) == 1
