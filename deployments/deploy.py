"""Work pools, deployments and schedules, made or brought up to date by one command:

    python -m deployments.deploy [--gpus N] [--schedules on|off]

PREFECT_API_URL says on which server. Nothing of this machine is recorded: a worker imports the flows by module path, so
the package must be installed where it runs. New schedules are paused; a later call leaves them as they are unless
`--schedules` says otherwise.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from cpdiff_core.config import UserError
from flows.startup import check_users_server, told_in_a_line

POOLS = {"gpu": "flows that train or sample; one at a time per GPU", "cpu": "what only reads: comparisons"}

WORKER_ENVIRONMENT = {
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # nothing is ever unpickled
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Deployment:
    """One entry of the UI: a flow of deployments/forms.py, the pool it runs in and what starts it."""

    flow: str
    name: str
    pool: Literal["gpu", "cpu"]
    cron: str | None = None
    tags: tuple[str, ...] = ()


DEPLOYMENTS = (
    Deployment("run_experiment_form", "run-experiment", "gpu"),
    Deployment("reproduce_table_form", "reproduce-table", "gpu"),
    Deployment("run_benchmarks_form", "run-benchmarks", "gpu", cron="0 4 * * 0", tags=("weekly",)),
    Deployment("rerun_experiment_form", "nightly-reproduction", "gpu", cron="0 2 * * *", tags=("nightly",)),
    Deployment("generate_adapters_form", "generate-adapters", "gpu"),
    Deployment("compare_reruns_form", "compare-reruns", "cpu"),
)


def make_pools(gpus: int) -> None:
    """The two process pools; `gpu` runs as many flows at once as there are GPUs."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists

    with get_client(sync_client=True) as client:
        for name, description in POOLS.items():
            limit = gpus if name == "gpu" else None
            try:
                client.create_work_pool(
                    WorkPoolCreate(name=name, type="process", description=description, concurrency_limit=limit)
                )
            except ObjectAlreadyExists:
                update = WorkPoolUpdate(description=description)
                client.update_work_pool(name, update.model_copy(update={"concurrency_limit": limit}) if limit else update)


def is_active(flow_name: str, name: str) -> bool:
    """Whether the deployment is there and its schedules run."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(f"{flow_name}/{name}")
        except ObjectNotFound:
            return False
    return any(schedule.active for schedule in found.schedules)


def deploy(gpus: int = 1, schedules: Literal["on", "off"] | None = None) -> list[str]:
    """Make everything; returns one line per deployment."""
    from prefect.deployments.runner import EntrypointType
    from prefect.schedules import Cron

    from deployments import forms

    make_pools(gpus)
    lines = []
    for item in DEPLOYMENTS:
        flow = getattr(forms, item.flow)
        active = {"on": True, "off": False}[schedules] if schedules else is_active(flow.name, item.name)
        flow.to_deployment(
            name=item.name,
            work_pool_name=item.pool,
            entrypoint_type=EntrypointType.MODULE_PATH,
            tags=list(item.tags),
            description=flow.description.partition("\nArgs:")[0].strip(),  # the form itself describes its fields
            job_variables={"env": WORKER_ENVIRONMENT},
            schedules=[Cron(item.cron, timezone="UTC", active=active, slug=item.name)] if item.cron else [],
        ).apply()
        when = f"{item.cron} UTC, {'on' if active else 'paused'}" if item.cron else "on request"
        lines.append(f"{f'{flow.name}/{item.name}':<40} pool {item.pool}   {when}")
    return lines


def main(
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of all workers together: flows of the gpu pool at once.")] = 1,
    schedules: Annotated[str | None, typer.Option(help="on or off; unchanged if not given.")] = None,
) -> None:
    """Make or update the work pools, deployments and schedules on the server at PREFECT_API_URL."""
    if schedules not in (None, "on", "off"):
        raise UserError(f"--schedules {schedules!r}: must be on or off")
    if not os.environ.get("PREFECT_API_URL"):
        raise UserError("PREFECT_API_URL: is not set; start `prefect server start` and set it to http://127.0.0.1:4200/api")
    check_users_server()
    for line in deploy(gpus, schedules):  # type: ignore[arg-type]
        typer.echo(line)


if __name__ == "__main__":
    told_in_a_line(lambda: typer.run(main))
