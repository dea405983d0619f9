"""A thousand malformed experiments: one line that names the fault each, never a traceback, and nothing on the disk."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpdiff_core.config import UserError
from cpdiff_core.experiments import QUICKSTART, ExperimentConfig
from flows.cli import load_experiment

VALUES: dict[str, Any] = QUICKSTART.model_dump(mode="json")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, item in items for place in places(item, (*path, key))]


@st.composite
def malformed(draw: st.DrawFn) -> str:
    """The quickstart with one to three fields replaced, removed or added, or its text cut or changed."""
    values = copy.deepcopy(VALUES)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(values)))
        parent = values
        for key in way:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            parent[last] = draw(json_values)
        elif action == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = draw(json_values)
    text = json.dumps(values)
    if draw(st.integers(0, 4)) == 0:
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.text(max_size=3)) * draw(st.integers(0, 1)) + text[place + draw(st.integers(0, 3)) :]
    return text


def test_thousand_malformed_experiments_are_one_line_each(tmp_path: Path) -> None:
    file = tmp_path / "experiment.json"
    seen: Counter[str] = Counter()

    @settings(max_examples=1000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(malformed())
    def check(text: str) -> None:
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            assert isinstance(load_experiment(str(file)), ExperimentConfig)
            seen["still valid"] += 1
        except UserError as error:
            seen["refused"] += 1
            message = str(error)
            assert message.startswith("experiment file ")
            assert len(message.splitlines()) == 1, message
            assert len(message) < 500, message

    check()
    assert seen["refused"] > 500, seen
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.json"]


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\ufeff{}", '{"tasks": NaN}', "[" * 100000])
def test_what_is_no_experiment_at_all_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "experiment.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"^experiment file "):
        load_experiment(str(file))
