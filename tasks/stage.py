"""The cache rule: a function that writes files becomes a stage that runs once per input, in any process.

    @stage("harvest", label=lambda task, run: f"{task.name} run {run}")
    def harvest(out: Path, task: TaskConfig, run: int, *, runtime: RuntimeConfig, resume: ResumeState = GIVEN) -> None:
        ...write files below `out`...

`harvest(task, 0, runtime=runtime)` is then a Prefect task that returns an `Artifact`. Its key is
`<stage>/<fingerprint>/result.json`, where the fingerprint covers the stage's name and version and every argument but
`runtime`. The same path, below the root, is the artifact's folder: the body writes into a scratch folder, which is
renamed into place when it is complete, and Prefect's own record `result.json` is written into it last. A folder
without a readable record is no hit, so a crash at any moment costs a repetition and never a wrong result. A lock on
the key makes two processes that ask for the same stage compute it once (`tasks/locks.py`).
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, get_type_hints

from prefect import Task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.results import ResultRecord
from prefect.settings import PREFECT_DEFAULT_RESULT_STORAGE_BLOCK
from prefect.transactions import IsolationLevel
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypeVar

from cpdiff_core.artifacts import Artifact, ResumeState, seal, write_json
from cpdiff_core.config import RuntimeConfig, UserError, canonical, fingerprint
from tasks import remote
from tasks.code import code_behind, made_by_other_code
from tasks.environment import disk_fault, memory_fault, root
from tasks.locks import FlockManager, hold
from tasks.observe import watched
from tasks.provenance import Meter, signed
from tasks.record import RECORD, cache_key, is_sound
from tasks.report import stage_ended, warn_once

P = ParamSpec("P")
A = TypeVar("A", bound=Artifact, default=Artifact)

_FROM_STAGE = ("out", "resume", "account")
NOT_IN_KEY = ("runtime", *_FROM_STAGE)
SCRATCH_PREFIX = ".building-"

GIVEN: Any = None  # default of a body's `resume` and `account`: the stage gives them, callers never do

STAGES: dict[str, Stage[..., Any]] = {}


class Stage(Task[P, A]):
    """A cached Prefect task. Made by `stage`; `with_options` gives a plain task with the same cache key."""

    body: Callable[..., None]
    identify: Callable[[Mapping[str, Any]], A]
    returns: type[A]
    stage_version: int

    def artifact(self, *args: P.args, **kwargs: P.kwargs) -> A:
        """The artifact that a call with these arguments returns, without running anything."""
        bound = inspect.signature(self.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        return self.identify(bound.arguments)


def stage(
    name: str,
    version: int = 1,
    *,
    returns: type[A] = Artifact,  # type: ignore[assignment]
    label: Callable[..., str] | None = None,
    **task_options: Any,
) -> Callable[[Callable[Concatenate[Path, P], None]], Stage[P, A]]:
    """Make `body(out, ..., *, runtime, resume)` a stage.

    name: folder of its artifacts: lower-case letters, digits and underscores.
    version: to be raised when the same inputs are to give another result (see `tasks/versions.py`).
    returns: a subclass of Artifact where other stages must not confuse this artifact with another.
    label: what is shown of the arguments; a function of those arguments that it names.
    task_options: further options of Prefect's task, such as retries and tags.

    `resume` is given to a body that declares it, and so is `account`, a dictionary for what the body knows better than
    the clock: it goes over the stage's own figures in provenance.json. Arguments are checked against the body's
    annotations, so an artifact of the wrong type is a TypeError.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"stage name {name!r}: must be lower-case letters, digits and underscores")

    def decorate(body: Callable[Concatenate[Path, P], None]) -> Stage[P, A]:
        declared = inspect.signature(body)
        hints = get_type_hints(body)
        parameters = [item for item in declared.parameters.values() if item.name not in _FROM_STAGE]
        signature = declared.replace(parameters=parameters, return_annotation=returns)
        shown = list(inspect.signature(label).parameters) if label is not None else []
        if unknown := set(shown) - {item.name for item in parameters}:
            raise TypeError(f"stage {name!r}: the label asks for {sorted(unknown)}, which are no arguments of it")

        def identify(arguments: Mapping[str, Any]) -> A:
            for key, value in arguments.items():
                if key in hints and signature.parameters[key].kind not in _VARIADIC:
                    _check_type(f"stage {name!r}: argument {key!r}", hints[key], value)
            return returns(stage=name, fingerprint=fingerprint(name, version, _inputs(arguments)))

        @functools.wraps(body)
        def run(*args: P.args, **kwargs: P.kwargs) -> A:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            result = identify(bound.arguments)
            runtime = bound.arguments.get("runtime") or RuntimeConfig()
            account: dict[str, Any] = {}
            given = {"resume": resume_state(result, runtime), "account": account}
            extra = {key: value for key, value in given.items() if key in declared.parameters}
            config = {"stage": name, "version": version, "inputs": canonical(_inputs(bound.arguments))}
            try:
                for upstream in remote.artifacts_in(list(bound.arguments.values())):
                    bring(upstream)
                if _fetched(result):
                    return result
                with watched(result):
                    write = functools.partial(_call, body, bound, extra)
                    _build(folder(result), write, config, runtime, account, code_behind(body))
                _shared(result)
            except Exception as error:
                if (fault := disk_fault(error) or memory_fault(f"stage {name!r}", error)) is not None:
                    raise fault from error
                raise
            return result

        def run_name(parameters: dict[str, Any]) -> str:
            identify(parameters)  # so that a wrong argument is named before the label trips over it
            return f"{name} {label(**{key: parameters[key] for key in shown})}" if label is not None else name

        run.__signature__ = signature  # type: ignore[attr-defined]  # what Prefect and callers see
        policy = CacheKeyFnPolicy(cache_key_fn=lambda _, arguments: cache_key(identify(arguments)))
        options = {"retry_condition_fn": _may_retry} | task_options
        options["on_completion"] = [_completed, *options.get("on_completion", ())]
        options["on_failure"] = [_failed, *options.get("on_failure", ())]
        made: Stage[P, A] = Stage(
            run,
            name=name,
            task_run_name=run_name,  # type: ignore[arg-type]  # Prefect's protocol asks for more than it uses
            cache_policy=policy.configure(
                isolation_level=IsolationLevel.SERIALIZABLE, lock_manager=FlockManager(drop_unsound)
            ),
            persist_result=True,
            result_serializer="json",  # nothing is ever unpickled
            **options,
        )
        made.body, made.identify, made.returns = body, identify, returns
        made.stage_version = version
        known = STAGES.setdefault(name, made)
        if (known.body.__module__, known.body.__qualname__) != (body.__module__, body.__qualname__):
            raise ValueError(f"stage name {name!r}: is taken by {known.body.__module__}.{known.body.__qualname__}")
        STAGES[name] = made
        return made

    return decorate


def folder(artifact: Artifact) -> Path:
    """Where the files of `artifact` lie, below the root of the moment."""
    return artifact.under(root())


def is_done(artifact: Artifact) -> bool:
    """Whether `artifact` is a hit: its record exists and is one that we write."""
    try:
        return is_sound((folder(artifact) / RECORD).read_bytes(), artifact)
    except OSError:
        return False


def drop_unsound(key: str) -> None:
    """Remove the record under `key` if it is not one that we write. To be called under the key's lock."""
    name, digits, _ = key.split("/")
    artifact = STAGES[name].returns(stage=name, fingerprint=digits)
    if (record := folder(artifact) / RECORD).is_file() and not is_done(artifact):
        record.unlink()


def bring(artifact: Artifact) -> bool:
    """See to it that the files of `artifact` are here; False if they are neither here nor in the store."""
    return is_done(artifact) or _fetched(artifact)


def _fetched(artifact: Artifact) -> bool:
    if remote.store() is None:
        return False
    with _scratch(folder(artifact)) as scratch:
        return remote.fetch(artifact, folder(artifact), scratch / "fetched")


def _shared(artifact: Artifact) -> None:
    if remote.store() is not None:
        with _scratch(folder(artifact)) as scratch:
            remote.share(artifact, folder(artifact), scratch / "fetched")


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A folder beside `target`, from which a rename moves files to it; `clean` knows it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{SCRATCH_PREFIX}{target.name}-") as scratch:
        yield Path(scratch)


def resume_state(artifact: Artifact, runtime: RuntimeConfig) -> ResumeState:
    """What a killed computation of `artifact` has left. Use it in the stage's body or while its lock is held."""
    return ResumeState(root() / ".resume" / artifact.stage / artifact.fingerprint, runtime.resume_seconds)


def clean(path: Path, older_than_seconds: float = 86400.0) -> list[Path]:
    """Remove what nobody reads below the root `path`, and return it: the scratch folders of killed processes, the
    records that Prefect keeps of exceptions (files of 32 hex digits) and the live losses of stages that have ended."""
    old = time.time() - older_than_seconds
    removed = []
    for scratch in path.glob(f"*/{SCRATCH_PREFIX}*"):
        builds = scratch.name.removeprefix(SCRATCH_PREFIX).split("-")[0]
        # A stage may take longer than `older_than_seconds`; then its lock is taken.
        with suppress(OSError, TimeoutError), hold([f"{scratch.parent.name}/{builds}/{RECORD}"], timeout=0):
            if scratch.stat().st_mtime < old:
                shutil.rmtree(scratch)
                removed.append(scratch)
    for record in [*path.glob("[0-9a-f]" * 32), *path.glob(".live/*/*.csv")]:
        with suppress(OSError):
            if record.is_file() and record.stat().st_mtime < old:
                record.unlink()
                removed.append(record)
    return removed


def _inputs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in NOT_IN_KEY}


def _call(body: Callable[..., None], bound: inspect.BoundArguments, extra: Mapping[str, Any], out: Path) -> None:
    body(out, *bound.args, **bound.kwargs, **extra)


def _build(
    target: Path, write: Callable[[Path], None], config: Any, runtime: RuntimeConfig, account: Mapping[str, Any],
    code: Mapping[str, Any],
) -> None:  # fmt: skip
    """Fill a scratch folder beside `target`, then rename it to `target`."""
    with _scratch(target) as scratch:
        out = scratch / "out"
        out.mkdir()
        meter = Meter(runtime.device)
        write(out)
        write_json(out / "config.json", config)
        seal(out)
        # After the seal: it differs from run to run.
        write_json(out / "provenance.json", signed(meter.provenance() | dict(code) | dict(account)))
        if target.exists():  # a refresh, or a process that died before the record was written
            # Moved away whole: deleting it file by file could leave its record, and so a hit, behind.
            os.rename(target, scratch / "replaced")
        os.rename(out, target)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_adapter = functools.cache(TypeAdapter)


def _check_type(what: str, annotation: Any, value: Any) -> None:
    try:
        _adapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        raise TypeError(f"{what}: {error.errors()[0]['msg']}, not {type(value).__name__}") from error


def _may_retry(task: Any, task_run: TaskRun, state: State[Any]) -> bool:
    """The user's faults stay the same however often they are tried."""
    return not isinstance(state.data, UserError)


_OUTDATED = (
    "some of what is Cached was made by code that has changed since, as its lines say; "
    "PREFECT_TASKS_REFRESH_CACHE=true computes every stage of a command again"
)


def _completed(task: Any, task_run: TaskRun, state: State[Any]) -> None:
    """Runs when the record has been written and the lock is free again."""
    artifact: Artifact = state.data.result if isinstance(state.data, ResultRecord) else state.data  # type: ignore[assignment]
    provenance = _provenance(artifact)
    if state.name == "Cached":
        outdated = made_by_other_code(provenance, STAGES[artifact.stage].body)
        if outdated:
            warn_once(_OUTDATED)
        stage_ended("cached", "Cached", task_run.name, "made by other code" if outdated else "")
    else:
        stage_ended("computed", "Completed", task_run.name, f"{provenance['seconds']:8.1f} s")
        if not is_done(artifact) and PREFECT_DEFAULT_RESULT_STORAGE_BLOCK.value() is None:
            stage_ended("unrecorded", "Not saved", task_run.name, "its record could not be written (is the disk full?)")
    left = resume_state(artifact, RuntimeConfig())
    if left.folder.exists():
        # Whoever holds the lock computes it again, and has use for the state.
        with suppress(TimeoutError), hold([cache_key(artifact)], timeout=0):
            left.discard()


def _provenance(artifact: Artifact) -> dict[str, Any]:
    """Of an artifact that may have been harmed since; then nothing is known."""
    try:
        return dict(json.loads((folder(artifact) / "provenance.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _failed(task: Any, task_run: TaskRun, state: State[Any]) -> None:
    stage_ended("failed", "Failed", task_run.name)
