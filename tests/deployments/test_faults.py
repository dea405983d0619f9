"""What the UI says of a user's fault."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow
from prefect.exceptions import ParameterTypeError

from cpdiff_core.config import UserError
from deployments.faults import form, in_words_of_the_form, show_one_line
from tasks.stage import stage


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a worker's runs log at ERROR and above, as text."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    loggers = [logging.getLogger(name) for name in ("prefect.flow_runs", "prefect.task_runs")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.ERROR)
    yield text
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


@stage("refuses", label=lambda fault: fault)
def refuses(out: Path, fault: str) -> None:
    if fault == "none":
        return
    raise UserError("--few 'x': no such file") if fault == "user" else ValueError("ours")


@flow(persist_result=False)
@form
def refusing(fault: str = "user") -> None:
    refuses(fault)


def test_users_fault_is_one_line_in_the_log_and_in_the_state(artifact_root: Path, log: io.StringIO) -> None:
    show_one_line()
    state = refusing(return_state=True)
    assert state.is_failed()
    assert str(state.message).endswith("UserError: few 'x': no such file")
    assert "few 'x': no such file" in log.getvalue()
    assert "Traceback" not in log.getvalue()
    refusing("ours", return_state=True)
    assert "Traceback" in log.getvalue(), "a fault of ours is shown whole"


def test_log_says_which_stage_has_finished(artifact_root: Path, log: io.StringIO) -> None:
    show_one_line()
    logging.getLogger("prefect.task_runs").setLevel(logging.INFO)
    for _ in range(2):
        assert refusing("none", return_state=True).is_completed()
    assert log.getvalue().splitlines() == ["refuses none: Completed", "refuses none: Cached"]
    refusing("user", return_state=True)
    assert 'refuses user: Failed("Task run encountered an exception UserError: few ' in log.getvalue()


def test_wrong_parameter_is_one_line_in_the_log_without_preface(log: io.StringIO) -> None:
    show_one_line()
    fault = ParameterTypeError("Flow run received invalid parameters:\n - num: Input should be 1\n - name: Value error, is none")
    logging.getLogger("prefect.flow_runs").error("no", exc_info=(type(fault), fault, None))
    assert log.getvalue() == "num: Input should be 1; name: is none\n"


def test_hooks_of_stages_are_not_in_the_log(log: io.StringIO) -> None:
    show_one_line()
    logger = logging.getLogger("prefect.task_runs")
    logger.setLevel(logging.INFO)
    for text in ("Running hook '_completed' in response to entering state 'Completed'", "Hook '_completed' finished", "Finished"):
        logger.info(text)
    assert log.getvalue() == "Finished\n"


def test_options_become_fields_or_settings_of_the_worker() -> None:
    assert in_words_of_the_form("choose a folder with --root or PREFECT_LOCAL_STORAGE_PATH, and run again") == (
        "choose a folder with PREFECT_LOCAL_STORAGE_PATH of the worker, and run again"
    )
    assert in_words_of_the_form("--text-columns or --few: give --data-dir; a--b stays") == (
        "text_columns or few: give CPDIFF_DATA_DIR of the worker; a--b stays"
    )
