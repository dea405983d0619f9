"""Small stages that write down when their body runs, and the functions that child processes run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import dask
import distributed
import prefect_dask  # noqa: F401 - child processes are forked from one that has imported it
import torch
from prefect import flow
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from cpdiff_core.artifacts import Artifact, ResumeState, read_tensors, verify, write_tensors
from cpdiff_core.config import Config, RuntimeConfig, UserError
from cpdiff_core.progress import track
from tasks.engine import each, with_engine
from tasks.locks import hold
from tasks.stage import GIVEN, folder, is_done, root, stage

STEPS = 50
DEFAULT_RUNTIME = RuntimeConfig()


class Number(Config):
    value: int
    scale: float = 1.0


class Sum(Artifact):
    """An artifact with a type of its own."""


def log(line: str) -> None:
    root().mkdir(parents=True, exist_ok=True)
    with (root() / "log.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def logged(path: Path) -> list[str]:
    file = path / "log.txt"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def die_if_told(point: str) -> None:
    """As kill -9 does it, if the file `die-<point>` lies in the root."""
    if (root() / f"die-{point}").exists():
        os.kill(os.getpid(), signal.SIGKILL)


def fill_disk_if_told() -> None:
    if (root() / "fill-before-record").exists():
        with suppress(OSError), (root() / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))


def before_record(transaction: Any) -> None:
    """Prefect calls it when the folder is in place and its own record is not written yet."""
    die_if_told("before-record")
    fill_disk_if_told()


def load(artifact: Artifact) -> float:
    return float(read_tensors(folder(artifact), "value.safetensors")["value"])


def save(out: Path, value: float) -> None:
    write_tensors(out / "value.safetensors", {"value": torch.tensor(float(value))})


@stage("number", label=lambda number: f"value {number.value}", on_commit=[before_record])
def number(out: Path, number: Number, *, runtime: RuntimeConfig = DEFAULT_RUNTIME) -> None:
    log(f"number {number.value}")
    save(out, number.value * number.scale)
    die_if_told("in-body")


@stage("double")
def double(out: Path, x: Artifact) -> None:
    log("double")
    save(out, 2 * load(x))


@stage("add", returns=Sum)
def add(out: Path, x: Artifact, y: Artifact) -> None:
    log("add")
    save(out, load(x) + load(y))


@stage("total")
def total(out: Path, sums: tuple[Sum, ...]) -> None:
    log("total")
    save(out, sum(load(item) for item in sums))


@stage("slow")
def slow(out: Path, seconds: float) -> None:
    log("slow begins")
    time.sleep(seconds)
    save(out, seconds)
    log("slow ends")


@stage("walk")
def walk(out: Path, num_steps: int, *, runtime: RuntimeConfig, resume: ResumeState = GIVEN) -> None:
    """Counts to `num_steps` and saves its state after each; 4 MB, so that a kill falls into a save now and then."""
    state = resume.load()
    step, ballast = (state[1]["step"], state[0]["ballast"]) if state else (0, torch.zeros(1_000_000))
    log(f"walk from {step}")
    while step < num_steps:
        step, ballast = step + 1, ballast + 1
        resume.save({"ballast": ballast}, {"step": step})
        time.sleep(0.01)
    save(out, float(ballast[0]))


@stage("march")
def march(out: Path, num_steps: int, *, runtime: RuntimeConfig = DEFAULT_RUNTIME, resume: ResumeState = GIVEN) -> None:
    """A loop as the training loops are: it shows its progress and saves its state when that is due."""
    state = resume.load()
    step = state[1]["step"] if state else 0
    log(f"march from {step}")
    log(f"marching in process {os.getpid()}")
    with track("march", num_steps, runtime, done=step) as progress:
        while step < num_steps:
            time.sleep(0.02)
            step += 1
            progress.step(loss=1.0 / step)
            if resume.due():
                resume.save({"step": torch.tensor(step)}, {"step": step})
    save(out, step)


@flow(persist_result=False)
def march_in_flow(num_steps: int, submitted: bool) -> None:
    log(f"flow run {flow_run.id}")
    runtime = RuntimeConfig(resume_seconds=1e6, progress=False)
    if submitted:
        march.submit(num_steps, runtime=runtime).result()
    else:
        march(num_steps, runtime=runtime)


@stage("flaky", retries=2)
def flaky(out: Path, failures: int, kind: str) -> None:
    log("flaky")
    (out / "half-written.txt").write_text("half")
    if logged(root()).count("flaky") <= failures:
        raise UserError("rank=0: must be at least 1; choose another") if kind == "user" else ConnectionError("again")
    save(out, 1)


@stage("many_files")
def many_files(out: Path, num_files: int) -> None:
    for index in range(num_files):
        (out / f"{index}.txt").write_text(str(index))


@stage("fills_disk")
def fills_disk(out: Path, megabytes: int, writer: str) -> None:
    if writer == "safetensors":
        write_tensors(out / "big.safetensors", {"big": torch.zeros(megabytes * 250_000)})
    else:
        (out / "big.bin").write_bytes(bytes(megabytes * 1_000_000))


@flow(persist_result=False)
def diamond(left: int, right: int) -> Artifact:
    x, y = number(Number(value=left)), number(Number(value=right))
    return double(add(double(x), y))


def in_child(path: Path, api_url: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: path, PREFECT_API_URL: api_url}):
        function(*arguments)


def run_number(value: int) -> None:
    number(Number(value=value))


def run_number_and_stay(value: int) -> None:
    number(Number(value=value))
    log("stays")
    time.sleep(60)


def run_march(num_steps: int, submitted: bool) -> None:
    march_in_flow(num_steps, submitted)


def add_up(values: list[int]) -> list[int]:
    """The processes that computed the values; each value as a call of its own, which a worker makes itself."""
    return each("number", number_of, [(value,) for value in values])


def number_of(value: int) -> int:
    number(Number(value=value))
    return os.getpid()


def march_to(num_steps: int) -> int:
    march(num_steps, runtime=RuntimeConfig(resume_seconds=0.1, progress=False))
    return os.getpid()


@flow(persist_result=False)
def spread(calls: list[list[int]]) -> list[list[int]]:
    """The processes that computed each call."""
    return each("add_up", add_up, [(values,) for values in calls])


@flow(persist_result=False)
def march_apart(num_steps: int) -> int:
    log(f"flow run {flow_run.id}")
    return each("march", march_to, [(num_steps,)])[0]


@flow(persist_result=False)
def march_below(num_steps: int) -> int:
    """As a form does it in the process of a Prefect worker: the run that is cancelled is not the one that has the cluster."""
    log(f"outer flow run {flow_run.id}")
    os.environ["PREFECT__FLOW_RUN_ID"] = str(flow_run.id)
    return int(with_engine(march_apart)(num_steps))


def run_below(address: str, num_steps: int) -> None:
    os.environ["CPDIFF_DASK"] = address
    march_below(num_steps)


def double_of(artifact: Artifact) -> Artifact:
    return double(artifact)


@flow(persist_result=False)
def double_apart(value: int) -> float:
    """A worker doubles a number that was computed here; and here its result is a hit."""
    x = number(Number(value=value))
    assert each("double", double_of, [(x,)]) == [double.artifact(x)]
    return load(double(x))


@flow(persist_result=False)
def fail_apart(message: str) -> None:
    each("fail", fail, [(message,)])


def fail(message: str) -> None:
    raise UserError(message)


def run_on(address: str, name: str, *arguments: Any) -> None:
    """Run a flow of this module on a cluster, and log what it returns or the user's error."""
    os.environ["CPDIFF_DASK"] = address
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # workers of local:<n> start anew
    try:
        log(f"returned {json.dumps(with_engine(globals()[name])(*arguments))}")
    except UserError as error:
        log(f"error: {error}")


def run_on_with(environment: dict[str, str], address: str, name: str, *arguments: Any) -> None:
    os.environ.update(environment)
    run_on(address, name, *arguments)


def run_on_nobody(address: str) -> None:
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        run_on(address, "spread", [[1]])


def run_scheduler(port: int) -> None:
    async def serve() -> None:
        async with distributed.Scheduler(host="127.0.0.1", port=port, dashboard=False) as scheduler:
            await scheduler.finished()

    asyncio.run(serve())


def run_worker(address: str, environment: dict[str, str]) -> None:
    """A worker as `dask worker ADDRESS --nthreads 1 --resources GPU=1 --no-nanny` is one."""
    os.environ.update(environment)

    async def serve() -> None:
        async with distributed.Worker(address, host="127.0.0.1", nthreads=1, resources={"GPU": 1}) as worker:
            await worker.finished()

    asyncio.run(serve())


def run_slow(seconds: float) -> None:
    slow(seconds)
    log(f"had {load(slow.artifact(seconds))}")


def run_walk() -> None:
    walk(STEPS, runtime=RuntimeConfig())


def replace_dying_at_every_step() -> None:
    """Kill a process before the first change that it makes to the disk while it replaces a finished artifact, another
    before the second, and so on until one is not killed; log what each left: a hit or none, whole or broken."""
    artifact = many_files.artifact(3)
    good = folder(artifact).with_name("good")
    shutil.copytree(folder(artifact), good)
    code, step = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        step += 1
        if (child := os.fork()) == 0:
            _die_before_change(step)
            many_files.fn(3)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log(f"{'hit' if is_done(artifact) else 'none'} {'broken' if verify(folder(artifact)) else 'whole'}")
        shutil.rmtree(folder(artifact), ignore_errors=True)
        shutil.copytree(good, folder(artifact))


def _die_before_change(step: int) -> None:
    changes = count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")) and next(changes) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def hold_and_log(keys: list[str], repetitions: int, seconds: float) -> None:
    for _ in range(repetitions):
        with hold(keys):
            log(f"enter {os.getpid()}")
            time.sleep(seconds)
            log(f"leave {os.getpid()}")


def hold_and_fork(key: str) -> None:
    """Holds the lock, and so does a child that lives on when this process is killed."""
    with hold([key]):
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        log("forked")
        time.sleep(20)
