"""Which changes to a condition or to statistics can tell anything."""

from __future__ import annotations

import pytest

from cpdiff_core.generator.probing import CHANGES, telling_changes

OTHER, SHUFFLED, EMPTY, STATISTICS = CHANGES


@pytest.mark.parametrize(
    ("num_tasks", "kind", "own_statistics", "telling"),
    [
        (2, "task_info_few_shot", True, CHANGES),
        (2, "one_hot", True, (OTHER, EMPTY, STATISTICS)),
        (2, "few_shot", False, (OTHER, SHUFFLED, EMPTY)),
        (1, "task_info", True, (SHUFFLED, EMPTY)),
        (1, "learned", False, (EMPTY,)),
    ],
)
def test_only_what_changes_something_is_compared(num_tasks: int, kind: str, own_statistics: bool, telling) -> None:
    assert telling_changes(num_tasks, kind, own_statistics) == telling
