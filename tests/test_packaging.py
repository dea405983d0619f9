"""What `pip install .` carries, read from pyproject.toml, and what README promises of the repository."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("cpdiff_core", "tasks", "flows", "deployments")


def test_every_file_of_the_packages_is_installed_with_them() -> None:
    """Data, templates and tables lie beside the code; one that package-data forgets is missing after installation."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = project["tool"]["setuptools"]["package-data"]
    carried = {
        path for package, patterns in declared.items() for pattern in patterns
        for path in (PROJECT / package.replace(".", "/")).glob(pattern)
    }  # fmt: skip
    lying = {
        path for package in PACKAGES for path in (PROJECT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != "README.md"
        and not any(part.startswith(".") for part in path.relative_to(PROJECT).parts)
    }  # fmt: skip
    assert len(lying) > 8
    assert sorted(str(path.relative_to(PROJECT)) for path in lying - carried) == []
    folders = {path.parent for package in PACKAGES for path in (PROJECT / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == [], "packages are found by it"


@pytest.mark.parametrize("page", ["README.md", "docs/EXTENDING.md"])
def test_page_names_files_that_exist(page: str) -> None:
    text = (PROJECT / page).read_text(encoding="utf-8")
    table = re.findall(r"`((?:flows|tasks|cpdiff_core|tests)/[\w/.]*)`", text)
    assert len(table) > 6
    assert [name for name in table if not (PROJECT / name).exists()] == []


def test_licence_is_apache_and_notice_names_what_is_not_ours() -> None:
    assert "Apache License" in (PROJECT / "LICENSE").read_text(encoding="utf-8")
    notice = (PROJECT / "NOTICE").read_text(encoding="utf-8")
    for name in ("Stanford Sentiment Treebank", "Corpus of Linguistic Acceptability", "STS Benchmark", "MiniLM"):
        assert name in notice
