"""What errors of libraries become in a line of ours."""

from __future__ import annotations

from cpdiff_core.config import first_line


def test_first_line_of_an_error_is_its_first_with_words_or_its_type() -> None:
    assert first_line(ValueError("\n  no such column: text\nat row 3")) == "no such column: text"
    assert first_line(TimeoutError()) == first_line(TimeoutError(" \n ")) == "TimeoutError"
    assert first_line(OSError("x" * 300)) == "x" * 200
