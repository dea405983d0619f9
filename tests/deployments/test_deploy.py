"""Deployments on a real server: made twice, with forms that a person understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import get_parameter_defaults

from cpdiff_core.experiments import EXPERIMENTS, QUICKSTART
from cpdiff_core.style_experiments import STYLE_EXPERIMENTS
from deployments import forms
from deployments.deploy import DEPLOYMENTS, Deployment, deploy


def deployed() -> dict[str, DeploymentResponse]:
    with get_client(sync_client=True) as client:
        names = {item.name for item in DEPLOYMENTS}
        return {item.name: item for item in client.read_deployments() if item.name in names}


@pytest.fixture(scope="module")
def lines(prefect_server: str) -> list[str]:
    return deploy(gpus=2)


def test_deploying_twice_changes_nothing_and_new_schedules_are_paused(lines: list[str]) -> None:
    first = deployed()
    assert first.keys() == {item.name for item in DEPLOYMENTS}
    scheduled = {name: [slot.active for slot in item.schedules] for name, item in first.items() if item.schedules}
    assert scheduled == {"run-benchmarks": [False], "nightly-reproduction": [False]}
    assert deploy(gpus=2) == lines
    second = deployed()
    assert {name: item.id for name, item in first.items()} == {name: item.id for name, item in second.items()}
    assert [len(second[name].schedules) for name in scheduled] == [1, 1]


def test_schedules_are_switched_on_by_one_call_and_stay_on(lines: list[str]) -> None:
    deploy(gpus=2, schedules="on")
    deploy(gpus=2)
    assert [slot.active for slot in deployed()["nightly-reproduction"].schedules] == [True]
    deploy(gpus=2, schedules="off")
    assert [slot.active for slot in deployed()["nightly-reproduction"].schedules] == [False]


def test_nothing_of_this_machine_is_recorded(lines: list[str]) -> None:
    for item in deployed().values():
        assert item.path in (None, ".")
        assert not item.pull_steps
        assert item.entrypoint is not None
        assert item.entrypoint.startswith("deployments.forms.")


def test_every_deployment_says_what_it_is_and_leaves_the_fields_to_the_form(lines: list[str]) -> None:
    for item in deployed().values():
        assert item.description
        assert "Args" not in item.description, "the pages run the lines together"


def test_gpu_pool_runs_one_flow_per_gpu(lines: list[str]) -> None:
    with get_client(sync_client=True) as client:
        assert client.read_work_pool("gpu").concurrency_limit == 2
        assert client.read_work_pool("cpu").concurrency_limit is None


def properties(name: str) -> dict[str, Any]:
    return deployed()[name].parameter_openapi_schema["properties"]


def test_every_field_of_every_form_is_described_and_has_a_default(lines: list[str]) -> None:
    for item in DEPLOYMENTS:
        for field, schema in properties(item.name).items():
            assert schema.get("description"), f"{item.name}: {field}"
            assert "default" in schema, f"{item.name}: {field}"
            assert "<" not in schema["description"], "the pages take it for HTML and leave it out"


@pytest.mark.parametrize("item", DEPLOYMENTS, ids=lambda item: item.name)
def test_a_run_accepts_the_defaults_of_its_form_and_refuses_what_is_none(item: Deployment) -> None:
    flow = getattr(forms, item.flow)
    flow.validate_parameters(get_parameter_defaults(flow.fn))
    wrong = {name: ["wrong"] for name in ("experiment", "table", "parts", "generator") if name in flow.parameters.properties}
    with pytest.raises(ParameterTypeError):
        flow.validate_parameters(get_parameter_defaults(flow.fn) | wrong)


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ("reproduce_table", {"num_threads": 10**18}), ("run_benchmarks", {"steps": 10**18}),
        ("generate_adapters", {"request": {"task": "sst2", "num": 10**18}}),
    ],
)  # fmt: skip
def test_a_number_that_no_machine_has_room_for_is_refused_by_the_form(form: str, fault: dict[str, Any]) -> None:
    flow = getattr(forms, f"{form}_form")
    with pytest.raises(ParameterTypeError, match="less than or equal to"):
        flow.validate_parameters(get_parameter_defaults(flow.fn) | fault)


def test_a_generator_is_told_by_its_own_field(artifact_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_LOCAL_STORAGE_PATH", str(artifact_root))
    state = forms.generate_adapters_form("ü", return_state=True)
    assert "generator 'ü': must be a plain name" in str(state.message)


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (QUICKSTART.model_dump(mode="json") | {"num_checkpoints": 900}, "num_checkpoints 900 is more than"),
        ({"tasks": "none"}, "configuration: tasks (value 'none')"),
        ("quickstrat", "'quickstrat' is no experiment"),
        ('{"tasks": "none"}', "configuration: tasks (value 'none')"),
        ('{"name": "x",', "configuration: line 1: is not JSON ("),
        ("[" * 3, "is no experiment"),
    ],
)
def test_wrong_experiment_is_told_in_one_line(experiment: Any, message: str) -> None:
    with pytest.raises(ParameterTypeError) as caught:
        forms.run_experiment_form.validate_parameters({"experiment": experiment, "device": "auto", "num_threads": None})
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_experiments_are_a_dropdown_of_names_or_a_whole_configuration(lines: list[str]) -> None:
    by_name, as_json, whole = properties("run-experiment")["experiment"]["anyOf"]
    assert set(by_name["enum"]) == {*EXPERIMENTS, *STYLE_EXPERIMENTS}
    assert as_json["title"] == "as JSON"
    assert whole["$ref"].endswith("ExperimentConfig")
    assert properties("run-benchmarks")["steps"]["anyOf"][0]["minimum"] == 5


def test_alternatives_of_a_field_have_names_that_a_person_understands(lines: list[str]) -> None:
    for item in DEPLOYMENTS:
        for field, schema in properties(item.name).items():
            for choice in schema.get("anyOf", ()):
                assert choice.get("title"), f"{item.name}: {field}"


def test_every_field_of_every_part_of_a_form_is_described_and_its_alternatives_have_names(lines: list[str]) -> None:
    for item in DEPLOYMENTS:
        for part in deployed()[item.name].parameter_openapi_schema.get("definitions", {}).values():
            assert part["title"][0].isupper()
            assert "Config" not in part["title"]
            for field, schema in part["properties"].items():
                assert field == "kind" or "$ref" in schema or schema.get("description"), f"{part['title']}: {field}"
                for choice in schema.get("anyOf", ()):
                    assert "$ref" in choice or choice.get("title"), f"{part['title']}: {field}"


def test_a_configuration_as_json_is_the_experiment_itself(lines: list[str]) -> None:
    text = QUICKSTART.model_dump_json(indent=2)
    given = {"experiment": text, "device": "auto", "num_threads": None}
    assert forms.run_experiment_form.validate_parameters(given)["experiment"] == QUICKSTART


def test_generators_are_a_dropdown_whose_default_needs_nothing_from_outside(lines: list[str]) -> None:
    names = properties("generate-adapters")["generator"]["anyOf"][0]["enum"]
    assert properties("generate-adapters")["generator"]["default"] == "quickstart"
    assert "quickstart" in names
    assert set(names) < EXPERIMENTS.keys(), "no styles, and none that generates a part of an adapter"
