from __future__ import annotations

import json
from pathlib import Path

from tasks.versions import RECORDED, complaints, current, digest, registered


def test_no_stage_changed_its_source_without_a_new_version_or_an_acknowledgement() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert complaints(recorded, current(registered())) == []


def written(tmp_path: Path, monkeypatch, name: str, source: str):
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    return __import__(name)


def test_digest_ignores_comments_docstrings_decorators_and_layout_only(tmp_path: Path, monkeypatch) -> None:
    plain = "def f(x, *, n=1):\n    return f'{x:.{n}f}' + str({1: None})\n"
    dressed = (
        "from functools import cache\n\n@cache\ndef f(\n    x,\n    *,\n    n=1,  # why\n):\n"
        '    """What."""\n    return f"{x:.{n}f}" + str({1: None})\n'
    )
    original = digest(written(tmp_path, monkeypatch, "plain_source", plain).f)
    assert digest(written(tmp_path, monkeypatch, "dressed_source", dressed).f.__wrapped__) == original
    for index, (old, new) in enumerate([("n=1", "n=2"), (".{n}f", ".{n}e"), ("None", "0"), ("1: ", "1.0: ")]):
        changed = written(tmp_path, monkeypatch, f"changed_{index}", plain.replace(old, new))
        assert digest(changed.f) != original, (old, new)
    # Written down on Python 3.11; another version must come to the same.
    assert original == "81200977d45ad886ad1478a77020cf12fa4b2cc825ea3305974e2a9873b1a564"


def test_complaints_say_what_to_do() -> None:
    recorded = {name: {"version": 2, "sha256": "a"} for name in ("same", "edited", "raised", "lowered", "gone")}
    present = {
        "same": {"version": 2, "sha256": "a"},
        "edited": {"version": 2, "sha256": "b"},
        "raised": {"version": 3, "sha256": "b"},
        "lowered": {"version": 1, "sha256": "a"},
        "new": {"version": 1, "sha256": "a"},
    }
    lines = {line.split("'")[1]: line for line in complaints(recorded, present)}
    assert lines.keys() == {"edited", "raised", "lowered", "gone", "new"}
    assert "raise the version" in lines["edited"]
    assert "--acknowledge" in lines["edited"]
    assert "raise it again" in lines["lowered"]
