"""The benchmark flow: what its run shows, and the file that the next one is compared with."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from cpdiff_core.config import RuntimeConfig
from flows.benchmark import run_benchmarks, table


def test_benchmark_shows_progress_and_leaves_a_table_and_a_file(artifact_root: Path) -> None:
    path = Path(run_benchmarks(("several_gpus",), runtime=RuntimeConfig(device="cpu", progress=False)))
    assert path.parent == artifact_root / "benchmarks"
    works = pd.read_csv(path).work.tolist()
    assert works[0] == "large matrix product"
    assert works[0] in table(path)
    with get_client(sync_client=True) as client:
        keys = ArtifactFilterKey(any_=["benchmarks", "benchmarks-progress"])
        found = {item.key: item for item in client.read_artifacts(artifact_filter=ArtifactFilter(key=keys))}
    assert found["benchmarks-progress"].data == 100.0
    assert all(work in str(found["benchmarks"].data) for work in works)
    assert str(found["benchmarks"].description).startswith("Speed on CPU")


def test_styles_are_measured_beside_the_plain_loop(artifact_root: Path) -> None:
    path = Path(run_benchmarks(("style",), steps=5, runtime=RuntimeConfig(device="cpu", progress=False)))
    rows = pd.read_csv(path).set_index("work")
    compared = rows[rows.ratio.notna()]
    assert [name.rsplit(", ", 1)[-1] for name in compared.index] == ["eager", "stacked", "stacked"]
    assert list(compared.reference_name) == ["plain loop by diffusers", *["one after another through PEFT"] * 2]
    assert (compared.ratio == compared.reference / compared.ours).all()
    assert ((rows.rate_share[1:] > 0) & (rows.rate_share[1:] < 1)).all()
