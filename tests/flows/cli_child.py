"""Runs the command line in a process forked from one that has imported torch, but not prefect: a second, not ten."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from warm import warm_parent

IMPORTED = ("flows.cli", "cpdiff_core.experiments", "cpdiff_core.reports.page")


def child(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell is born deaf to it
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = ["cpdiff", *arguments]
    from flows.cli import main

    main()


def flow_child(values: dict[str, Any], folder: Path, environment: dict[str, str], runtime: dict[str, Any]) -> None:
    """`run_experiment` itself, with a RuntimeConfig that the command line does not offer."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    from cpdiff_core.config import RuntimeConfig
    from cpdiff_core.experiments import ExperimentConfig
    from tasks.environment import prepare

    prepare()
    from flows.pipeline import run_experiment

    run_experiment(ExperimentConfig.model_validate(values), RuntimeConfig.model_validate(runtime))


@dataclass
class Outcome:
    code: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


class CommandLine:
    """`run(...)` as a user types `cpdiff ...` in `folder`, against the tests' Prefect server."""

    def __init__(self, folder: Path, api_url: str) -> None:
        self.folder = folder
        self._started: list[BaseProcess] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
        self.environment = kept | {
            "HF_HUB_OFFLINE": "1", "PREFECT_API_URL": api_url, "PREFECT_LOCAL_STORAGE_PATH": str(folder / "root"),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def start(self, *arguments: str, **variables: str) -> BaseProcess:
        environment = self.environment | variables
        process: BaseProcess = warm_parent(IMPORTED).Process(target=child, args=(list(arguments), self.folder, environment))
        process.start()
        self._started.append(process)
        return process

    def start_flow(self, values: dict[str, Any], **runtime: Any) -> BaseProcess:
        process: BaseProcess = warm_parent(IMPORTED).Process(
            target=flow_child, args=(values, self.folder, self.environment, runtime)
        )
        process.start()
        self._started.append(process)
        return process

    def run(self, *arguments: str, **variables: str) -> Outcome:
        start = time.monotonic()
        process = self.start(*arguments, **variables)
        process.join(120)
        return self.outcome(process, start)

    def kill_all(self) -> None:
        """What a failed test has left running."""
        for process in self._started:
            if process.is_alive():
                process.kill()
            process.join()

    def outcome(self, process: BaseProcess, start: float = 0.0) -> Outcome:
        read = [(self.folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        return Outcome(process.exitcode, *read, time.monotonic() - start)
