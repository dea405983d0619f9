"""Which changes of the source files are changes of a stage's code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.code import Sources

FILES = {
    "tasks/stages.py": (
        "from cpdiff_core import other\nfrom cpdiff_core.science import Rule, fit as compute\n\n\n"
        '@stage("fit", 1)\ndef fit(out, config: Rule):\n    return compute(config) + prepared()\n\n\n'
        "def prepared():\n    from cpdiff_core.lazy import lazily\n\n    return lazily() + other.of_module()\n\n\n"
        '@stage("another")\ndef another(out):\n    return 0\n'
    ),
    "cpdiff_core/__init__.py": "",
    "cpdiff_core/science.py": (
        "from cpdiff_core.config import Config\n\nLIMIT = 3\nTABLE = {}\n\n\n@register\nclass Rule(Config):\n"
        '    """What is chosen."""\n\n    width: int = Field(4, description="How wide.")\n\n\n'
        'def fit(rule):\n    """Fits."""\n    return step(rule.width)  # once\n\n\n'
        'def step(x):\n    return min(x, LIMIT) + TABLE["plus"]\n\n\nTABLE["plus"] = 1\n\n\ndef unused():\n    return 7\n'
    ),
    "cpdiff_core/lazy.py": "def lazily():\n    return 1\n",
    "cpdiff_core/other.py": "def of_module():\n    return 2\n",
    "cpdiff_core/config.py": "class Config:\n    width = 1\n",
}


@pytest.fixture
def top(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def code(top: Path, name: str = "fit") -> str | None:
    return Sources(top).code_of("tasks.stages", name)


def change(top: Path, name: str, old: str, new: str) -> None:
    text = (top / name).read_text()
    assert text.count(old) == 1
    (top / name).write_text(text.replace(old, new))


CHANGES = {
    "the body": ("tasks/stages.py", "compute(config) +", "compute(config) -"),
    "a function that it calls": ("cpdiff_core/science.py", "step(rule.width)", "step(-rule.width)"),
    "one that this calls": ("cpdiff_core/science.py", "min(x", "max(x"),
    "a number of the module": ("cpdiff_core/science.py", "LIMIT = 3", "LIMIT = 4"),
    "what is put into a table": ("cpdiff_core/science.py", "] = 1", "] = 2"),
    "a decorator": ("cpdiff_core/science.py", "@register", "@other"),
    "a default": ("cpdiff_core/science.py", "Field(4", "Field(5"),
    "what is imported in a function": ("cpdiff_core/lazy.py", "return 1", "return 2"),
    "what is found in a module": ("cpdiff_core/other.py", "return 2", "return 3"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_change_of_whatever_a_stage_reaches_is_a_change_of_its_code_and_of_no_other_stage(top: Path, what: str) -> None:
    before, other = code(top), code(top, "another")
    change(top, *CHANGES[what])
    assert code(top) != before
    assert code(top, "another") == other


NO_CHANGES = {
    "a docstring": ("cpdiff_core/science.py", "Fits.", "Fits well."),
    "a comment": ("cpdiff_core/science.py", "  # once", ""),
    "a description": ("cpdiff_core/science.py", "How wide.", "Its width."),
    "a function that nothing calls": ("cpdiff_core/science.py", "return 7", "return 8"),
    "how values are checked and named": ("cpdiff_core/config.py", "width = 1", "width = 2"),
    "the stage's version": ("tasks/stages.py", '"fit", 1', '"fit", 2'),
}


@pytest.mark.parametrize("what", NO_CHANGES)
def test_change_of_anything_else_is_none(top: Path, what: str) -> None:
    before, files = code(top), Sources(top).digest
    change(top, *NO_CHANGES[what])
    assert code(top) == before
    assert Sources(top).digest != files


def test_code_is_not_known_where_a_file_was_edited_under_a_running_process(top: Path) -> None:
    sources = Sources(top)
    change(top, *CHANGES["the body"])
    assert sources.code_of("tasks.stages", "fit") is None


def test_virtual_environment_beside_the_packages_is_not_read(top: Path) -> None:
    before = Sources(top).digest
    (top / ".venv").mkdir()
    (top / ".venv" / "torch.py").write_text("x = 1\n")
    assert Sources(top).digest == before
