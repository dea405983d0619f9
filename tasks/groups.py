"""Runs that train together in one pass and are each committed by their own cached stage.

Each finished run is left as a resume state that its own stage commits, so grouping and resuming are one mechanism. A
killed group goes on as the group it was, if the same runs are missing. Which runs share a pass follows from the list of
runs alone; several GPUs, or the workers of a Dask cluster, only take passes, so that the results are the same bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch

from cpdiff_core.artifacts import Artifact, ResumeState
from cpdiff_core.config import RuntimeConfig, UserError, fingerprint
from cpdiff_core.domains.glue.stacks import all_devices, forget_stacks
from cpdiff_core.progress import stop_all
from tasks.engine import each, has_workers
from tasks.environment import memory_fault
from tasks.locks import hold
from tasks.observe import awaiting_signal, watched
from tasks.provenance import Meter
from tasks.remote import artifacts_in
from tasks.stage import bring, cache_key, is_done, resume_state, root

GROUP = "harvest_group"
FINISHED_GROUP = "finished_group"

RUNS_PER_PASS = 16
"""Runs of one pass if `adapters_per_batch` does not say otherwise. On an H100 a step took 4.02 ms with 6 runs and 15.1 ms
with 30 (docs/BENCHMARKS.md); by the line through both, 16 lose 7 % against 30 and leave something to divide."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Member:
    """One run. artifact: what its stage makes; work: what `GroupedStage` is given of it; key: runs with equal keys can
    share a pass."""

    artifact: Artifact
    label: str
    work: Any
    key: Hashable


@dataclass(frozen=True)
class GroupedStage:
    """How the runs of one stage train. train(works, runtime, resume): the tensors of each run, in order.
    commit(work, runtime): run the stage itself. Both are functions of a module, since they travel to Dask workers.
    lazy: packages that train imports, some of which put another module in their place while they are imported: a thread
    that imports one at that moment is given the first, which lacks nearly everything. They are imported before threads
    start."""

    train: Callable[[Sequence[Any], RuntimeConfig, ResumeState], Sequence[Tensors]]
    commit: Callable[[Any, RuntimeConfig], object]
    lazy: tuple[str, ...] = ()


def train_together(how: GroupedStage, members: Sequence[Member], runtime: RuntimeConfig) -> None:
    """Train every missing run in as few passes as possible, under the locks of all of its pass."""
    _hand_out_leftovers(runtime)
    passes = []
    for group in passes_of(members, runtime.adapters_per_batch or RUNS_PER_PASS):
        if missing := [member for member in group if not _settled(member.artifact, runtime)]:
            passes.append(missing)
    if has_workers():
        each(GROUP, _train_and_commit, [(how, group, runtime) for group in passes])
        return
    devices = all_devices(runtime)
    if len(devices) == 1:
        _train_passes(how, passes, runtime)  # in this thread, where signals arrive
        return
    for package in how.lazy if passes else ():
        importlib.import_module(package)
    places = [runtime.model_copy(update={"device": device}) for device in devices]
    with ThreadPoolExecutor(len(devices)) as pool:  # each GPU takes every n-th pass
        # Prefect's settings, the root among them, belong to a context, which a new thread does not inherit.
        shares = [
            pool.submit(copy_context().run, _train_passes, how, passes[i :: len(places)], place)
            for i, place in enumerate(places)
        ]
        try:
            for share in shares:
                with awaiting_signal():
                    share.result()
        except BaseException:
            stop_all.set()  # an interrupt reaches this thread alone
            raise
        finally:
            wait(shares)
            stop_all.clear()


def passes_of(members: Sequence[Member], most: int) -> list[list[Member]]:
    """The members in passes of at most `most`, about equally large; the same for the same members, whatever is there."""
    groups: dict[Hashable, list[Member]] = {}
    for member in members:
        groups.setdefault(member.key, []).append(member)
    passes = []
    for group in groups.values():
        size = -(-len(group) // -(-len(group) // most))
        passes += [group[first : first + size] for first in range(0, len(group), size)]
    return passes


def finished_tensors(resume: ResumeState, account: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """What a group pass has left for the stage with this resume state, whose share of the cost goes to `account`."""
    state = resume.load()
    if state is None or not state[1].get("finished"):
        return None
    account |= state[1].get("account", {})
    return state[0]


def group_share(provenance: Mapping[str, Any], num_runs: int) -> dict[str, Any]:
    """What one of `num_runs` runs that trained together cost: an equal share of the pass, since it was last resumed."""
    whole = {name: provenance[name] for name in ("seconds", "processor_seconds", "gpu_seconds", "gpu_joules")}
    share = {name: None if value is None else round(value / num_runs, 3) for name, value in whole.items()}
    return share | {
        "group_seconds": whole["seconds"], "group_runs": num_runs, "gpu_idle_watts": provenance["gpu_idle_watts"],
        "peak_gpu_bytes": provenance["peak_gpu_bytes"],
    }  # fmt: skip


def _train_passes(how: GroupedStage, passes: Sequence[Sequence[Member]], runtime: RuntimeConfig) -> None:
    for members in passes:
        _train_fitting(how, members, runtime)


def _train_and_commit(how: GroupedStage, members: Sequence[Member], runtime: RuntimeConfig) -> None:
    """A pass on a worker elsewhere, which may share nothing with us but the store: it commits its runs itself."""
    for artifact in artifacts_in([member.work for member in members]):
        bring(artifact)
    _train_fitting(how, members, runtime)
    for member in members:
        how.commit(member.work, runtime)


def _train_fitting(how: GroupedStage, members: Sequence[Member], runtime: RuntimeConfig) -> None:
    """One pass; if the GPU's memory does not hold it, two passes of half the size."""
    try:
        _train_group(how, members, runtime)
        return
    except torch.OutOfMemoryError:
        if len(members) == 1:
            raise UserError(
                f"{members[0].label}: does not fit the memory of {runtime.device}; lower fine_tune.batch_size or "
                "fine_tune.max_length, or use a smaller base model"
            ) from None
    except (MemoryError, RuntimeError) as error:  # of the machine; a smaller pass would hardly need less
        if (fault := memory_fault(members[0].label, error)) is not None:
            raise fault from error
        raise
    forget_stacks()
    torch.cuda.empty_cache()
    middle = len(members) // 2
    _train_fitting(how, members[:middle], runtime)
    _train_fitting(how, members[middle:], runtime)


def _settled(artifact: Artifact, runtime: RuntimeConfig) -> bool:
    """Whether a run is committed, or finished and waiting for its stage to commit it."""
    if bring(artifact):
        return True
    numbers = resume_state(artifact, runtime).numbers()
    return numbers is not None and bool(numbers.get("finished"))


def _train_group(how: GroupedStage, members: Sequence[Member], runtime: RuntimeConfig) -> None:
    with hold([cache_key(member.artifact) for member in members]):
        missing = [member for member in members if not _settled(member.artifact, runtime)]
        if len(missing) < 2:  # another process has trained the rest, or a single run: its own stage does that
            return
        names = "-".join(sorted(member.artifact.fingerprint for member in missing))
        together = Artifact(stage=GROUP, fingerprint=fingerprint(GROUP, 1, {"members": names}))
        group = resume_state(together, runtime)
        meter = Meter(runtime.device)
        with watched(together):
            found = how.train([member.work for member in missing], runtime, group)
        # All at once, before any member has its own: a member that is left alone would train alone, and differ by rounding.
        finished = resume_state(Artifact(stage=FINISHED_GROUP, fingerprint=together.fingerprint), runtime)
        finished.save(
            {
                f"{member.artifact.fingerprint}.{name}": tensor
                for member, tensors in zip(missing, found, strict=True)
                for name, tensor in tensors.items()
            },
            {
                "members": [member.artifact.model_dump() for member in missing],
                "account": group_share(meter.provenance(), len(missing)),
            },
        )
        group.discard()
        _hand_out(finished, runtime)


def _hand_out(finished: ResumeState, runtime: RuntimeConfig) -> None:
    """Leave each member of a finished group the state that its own stage commits. Needs the locks of all members."""
    if (state := finished.load()) is not None:
        tensors, numbers = state
        for value in numbers["members"]:
            artifact = Artifact.model_validate(value)
            prefix = f"{artifact.fingerprint}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if not is_done(artifact):
                resume_state(artifact, runtime).save(own, {"finished": True, "account": numbers["account"]})
    finished.discard()


def _hand_out_leftovers(runtime: RuntimeConfig) -> None:
    """Go on with groups that finished and were killed before every member had its own."""
    for path in sorted((root() / ".resume" / FINISHED_GROUP).glob("*")):
        finished = resume_state(Artifact(stage=FINISHED_GROUP, fingerprint=path.name), runtime)
        if (numbers := finished.numbers()) is None:
            continue  # being written under its members' locks, or left by a kill, or damaged
        members = numbers["members"]
        with hold([cache_key(Artifact.model_validate(value)) for value in members]):
            resume_state(Artifact(stage=GROUP, fingerprint=path.name), runtime).discard()
            _hand_out(finished, runtime)
