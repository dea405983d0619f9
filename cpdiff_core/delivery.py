"""From a condition to adapters on disk: generate, score if there is data, write PEFT folders with cards.

A training task brings its head and its statistics. A task that the generator has never seen has neither: a head is
fitted as a probe on a few examples of it and the statistics are pooled, and since a generator that learns weights by
heart says nothing about new tasks, the result is compared, on examples that the head has not seen, with no adapter,
with the nearest training task's adapter and with a shuffled condition. Without such examples
nothing can be made of an adapter, so the request is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from cpdiff_core.artifacts import check_out, write_json
from cpdiff_core.bundle import Candidates, Condition, Described, Generator, task_meant
from cpdiff_core.config import MAX_CANDIDATES, Config, RuntimeConfig, UserError
from cpdiff_core.domains.glue.data import ResolvedTask, resolve_task
from cpdiff_core.domains.glue.metrics import MetricName
from cpdiff_core.domains.glue.stacks import Head
from cpdiff_core.domains.glue.text_tasks import FileData, TextTask
from cpdiff_core.export import AdapterFacts, data_terms, nearest_adapter, write_merged, write_peft_folder
from cpdiff_core.generator.conditions import ConditionConfig
from cpdiff_core.judging import Judgement, choose_on_data, compare_unseen

SUMMARY = "generation.json"


class AdapterRequest(Config):
    """What adapters are asked for. Field names are those of the command line."""

    task: str | None = Field(None, description="A task that the generator was trained on, by name: its head applies.")
    task_info: str | None = Field(None, description="The task in words; for a training task in place of its own.")
    examples: tuple[str, ...] = Field((), description="Examples for the condition, each 'text -> answer'.")
    num: int = Field(
        20, ge=1, le=MAX_CANDIDATES,
        description="Candidates M (paper: 20). As many as in the generator's own run come with its scores and choice.",
    )
    seed: int | None = Field(None, ge=0, description="Of the noise; the seed of the generator's own run if None.")
    select: str | None = Field(
        None, description="CSV, JSON lines or Parquet file on which the best candidate is chosen."
    )
    few: str | None = Field(None, description="The same for a task never seen: a few labelled examples of it.")
    labels: tuple[str, ...] | None = Field(None, description="Class names of a task never seen.")
    regression: bool = Field(False, description="The task never seen is a regression.")
    text_columns: tuple[str, ...] | None = Field(
        None, description="Text columns of the file; those of the training task if None, or text for a task never seen."
    )
    label_column: str = Field("label", description="Column of the file with the answers.")
    merge: bool = Field(False, description="Also write the base with the chosen adapter merged into it.")
    base: str | None = Field(None, description="Folder or hub id of the base model, if not where the generator says.")


def deliver(generator: Generator, request: AdapterRequest, out: Path, runtime: RuntimeConfig) -> list[str]:
    """Write candidate folders, `generation.json` and, if asked for, the merged model below `out`.

    Returns lines to print. Raises UserError for what cannot be done.
    """
    check_out(out)
    condition = generator.condition(request.task_info, request.examples, request.task)
    if (
        request.merge
        and request.num > 1
        and not (request.select or request.few or _is_own(generator, condition, request))
    ):
        raise UserError("--merge: which of the candidates? choose one with --select DATA, or generate --num 1")
    known = condition.task is not None
    task, head = _known(generator, condition, request) if known else (_unseen(generator, condition, request), None)
    base = generator.card.base.find(request.base) if request.select or request.merge or not known else None
    candidates = generator.generate(condition, request.num, request.seed)
    if not known:
        assert base is not None
        assert task is not None
        head, scored = compare_unseen(generator, base, task, candidates, runtime)
    elif request.select:
        assert base is not None
        assert task is not None
        scored = choose_on_data(generator, base, task, head, candidates, runtime)
    else:
        scored = _from_the_run(generator, condition, request)
    folders = _write(generator, request, task, head, candidates, scored, out)
    if request.merge:
        assert base is not None
        labels = task.task.labels if task else generator.card.task(condition.task or "").labels
        write_merged(out / "merged", folders[scored.chosen or 0], base, labels)
    return _lines(candidates, scored, folders, request.merge, out)


def check_request(generator: str, config: ConditionConfig, tasks: Sequence[Described], request: AdapterRequest) -> None:
    """What can be told of a request to a generator that may still have to be computed, for hours. Raises UserError.

    generator, config, tasks: its name, its condition and the tasks that it is trained on.
    """
    known, _ = task_meant(generator, config, tasks, request.task_info, request.examples, request.task)
    if known is not None:
        _check_known(known.name, request)
    else:
        names = ", ".join(item.name for item in tasks)
        _check_unseen(request, f"the known tasks are {names}; if you mean one of them, name it with --task")


def _is_own(generator: Generator, condition: Condition, request: AdapterRequest) -> bool:
    """Whether the request gives the very candidates of the run, whose scores and choice the card knows."""
    if condition.task is None:
        return False
    task = generator.card.task(condition.task)
    return (
        bool(task.candidates) and not request.examples and request.num == len(task.candidates)
        and request.seed in (None, generator.card.seed) and condition.text == task.prompt
    )  # fmt: skip


def _known(
    generator: Generator, condition: Condition, request: AdapterRequest
) -> tuple[ResolvedTask | None, Head | None]:
    assert condition.task is not None
    _check_known(condition.task, request)
    if not request.select:
        return None, generator.heads.get(condition.task)
    if condition.task not in generator.heads:
        raise UserError(
            f"--select: the generator has no head for {condition.task!r}, so nothing can be scored; leave it out"
        )
    card = generator.card.task(condition.task)
    columns = request.text_columns or card.text_columns
    data = FileData(train=request.select, validation=request.select)
    try:
        task = card.text_task(data, text_columns=columns, label_column=request.label_column)
    except ValidationError as error:
        raise _wrong_columns(error) from error
    return resolve_task(task, None), generator.heads[condition.task]


def _check_known(task: str, request: AdapterRequest) -> None:
    if request.few or request.labels or request.regression:
        raise UserError(
            f"--few, --labels, --regression: the generator knows {task!r} and its head; use --select to choose on your data"
        )


def _check_unseen(request: AdapterRequest, hint: str) -> None:
    if not request.few or not (request.labels or request.regression):
        raise UserError(
            "task never seen: no head fits it and nothing tells whether its adapters are any good, so a few labelled "
            f"examples are needed: --few DATA with --labels a,b (or --regression); {hint}"
        )
    if request.labels and request.regression:
        raise UserError("--labels and --regression: give one of the two")
    if request.select:
        raise UserError("--select: is for tasks that the generator knows; for a task never seen --few serves for both")


def _wrong_columns(error: ValidationError) -> UserError:
    fault = error.errors()[0]
    field = ".".join(map(str, fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ")
    return UserError(f"--labels, --text-columns or --label-column: {field + ': ' if field else ''}{message}")


def _unseen(generator: Generator, condition: Condition, request: AdapterRequest) -> ResolvedTask:
    """The unseen task on the few examples, or the refusal with its reasons."""
    nearest = generator.nearest_task(condition)
    _check_unseen(request, f"the nearest known task is {nearest!r}, if you mean that, give --task {nearest}")
    metric: MetricName = "spearmanr" if request.regression else "accuracy"
    try:
        task = TextTask(
            name="unseen-task", text_columns=request.text_columns or ("text",), label_column=request.label_column,
            labels=None if request.regression else request.labels, metrics=(metric,),
            data=FileData(train=request.few, validation=request.few), description=condition.text or "unseen",
        )  # fmt: skip
    except ValidationError as error:
        raise _wrong_columns(error) from error
    return resolve_task(task, None)


def _from_the_run(generator: Generator, condition: Condition, request: AdapterRequest) -> Judgement:
    """Without data: what the generator's own run knows of these very candidates, or nothing."""
    if not _is_own(generator, condition, request):
        return Judgement(None, None, tuple(() for _ in range(request.num)), ())
    task = generator.card.task(condition.task or "")
    arms = tuple(
        score.model_copy(update={"arm": f"{score.arm}, on the run's validation data"}) for score in task.scores
    )
    single = [s.model_copy(update={"arm": "this adapter, on the run's validation data"}) for s in task.candidates]
    by = f"best of {request.num} on the run's selection split"
    return Judgement(task.chosen, by, tuple((score, *arms) for score in single), arms)


def _write(
    generator: Generator, request: AdapterRequest, task: ResolvedTask | None, head: Head | None, candidates: Candidates,
    scored: Judgement, out: Path,
) -> list[Path]:  # fmt: skip
    """One PEFT folder per candidate, and what the command did as JSON."""
    card, condition, num = generator.card, candidates.condition, len(candidates.w_MK)
    known = card.task(condition.task) if condition.task else None
    terms = [data_terms(known)] if known else [data_terms(each) for each in card.tasks]
    shared: dict[str, Any] = {
        "generator": card.name, "base": card.base, "lora": card.lora, "max_length": card.max_length,
        "target_modules": card.target_modules,
        "prompt": condition.text, "task": known.name if known else "unseen-task", "unseen_condition": known is None,
        "description": request.task_info or (known.description if known else None),
        "labels": task.task.labels if task else known.labels if known else None,
        "text_columns": task.task.text_columns if task else known.text_columns if known else (),
        "statistics": candidates.statistics, "num": num, "seed": candidates.seed, "precision": card.precision,
        "head": "probe, fitted on the few examples" if not known else card.head if head else "none came along",
        "verdict": known.verdict if known else None, "data_terms": "; ".join(terms),
        "rounded": card.compact and request.select is None and known is not None,
    }  # fmt: skip
    folders = [out / f"candidate-{m:0{len(str(num - 1))}d}" for m in range(num)]
    nearest = nearest_adapter(generator, candidates.w_MK) if generator.references else [None] * num
    for m, folder in enumerate(folders):
        facts = AdapterFacts(
            **shared, index=m, chosen_by=scored.chosen_by if m == scored.chosen else None, nearest=nearest[m],
            scores=scored.by_candidate[m],
        )  # fmt: skip
        write_peft_folder(folder, candidates.w_MK[m], card.layout, facts, head)
    write_json(
        out / SUMMARY,
        {
            "request": request.model_dump(mode="json"), "generator": card.name, "unseen_condition": known is None,
            "task": shared["task"], "statistics": candidates.statistics, "seed": candidates.seed,
            "prompt": condition.text, "chosen_by": scored.chosen_by,
            "chosen": None if scored.chosen is None else folders[scored.chosen].name,
            "arms": [score.model_dump(mode="json") for score in scored.arms],
            "candidates": [
                {
                    "folder": folder.name,
                    "scores": [score.model_dump(mode="json") for score in scored.by_candidate[m][:1]],
                    "nearest": near.model_dump(mode="json") if (near := nearest[m]) else None,
                }
                for m, folder in enumerate(folders)
            ],
        },
    )  # fmt: skip
    return folders


def _lines(
    candidates: Candidates, scored: Judgement, folders: list[Path], merge: bool, out: Path
) -> list[str]:
    lines = []
    if candidates.condition.task is None:
        lines.append(
            "UNSEEN CONDITION: the generator was not trained on this task; expect little, read the comparison."
        )
    lines += [
        f"{score.arm}: {score.metric} {score.estimate:.1f} [{score.low:.1f}, {score.high:.1f}]" for score in scored.arms
    ]
    if scored.chosen is not None:
        best = scored.by_candidate[scored.chosen][0]
        lines.append(f"chosen: {folders[scored.chosen].name}, {scored.chosen_by}; {best.metric} {best.estimate:.1f}")
    else:
        lines.append("not scored and not chosen: give --select DATA to score the candidates on your examples")
    written = "1 PEFT folder" if len(folders) == 1 else f"{len(folders)} PEFT folders"
    lines.append(f"{written} in {out}" + (f", merged model in {out / 'merged'}" if merge else ""))
    return lines
