from __future__ import annotations

import json

from tasks.versions import RECORDED, complaints, current, registered


def test_no_stage_changed_its_source_without_a_new_version_or_an_acknowledgement() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert complaints(recorded, current(registered())) == []


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
