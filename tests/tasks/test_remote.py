"""Two machines that share nothing but an S3 bucket (a real S3 API on loopback)."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from flaky_storage import Fault, flaky
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from toy_stages import Number, double, load, logged, number, run_on_with, run_worker

from cpdiff_core.artifacts import verify
from cpdiff_core.config import UserError
from tasks import remote
from tasks.stage import folder, is_done

moto_server = pytest.importorskip("moto.server", reason="pip install 'cpdiff[dev]'")
s3fs = pytest.importorskip("s3fs", reason="pip install 'cpdiff[s3]'")
ONE = Number(value=1)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty prefix, which CPDIFF_REMOTE names."""
    import boto3

    for name, value in {"URL": s3, "REGION": "us-east-1"}.items():
        monkeypatch.setenv({"URL": "AWS_ENDPOINT_URL", "REGION": "AWS_DEFAULT_REGION"}[name], value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    name = f"b{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    url = f"s3://{name}/root"
    monkeypatch.setenv(remote.VARIABLE, url)
    return url


def test_another_machine_fetches_instead_of_computing(artifact_root: Path, bucket: str, tmp_path: Path) -> None:
    artifact = double(number(ONE))
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "other"}):
        assert double(number(ONE)) == artifact
        assert load(artifact) == 2.0
        assert is_done(artifact)
        assert logged(tmp_path / "other") == []
    assert logged(artifact_root) == ["number 1", "double"]


def test_worker_fetches_what_its_stage_is_made_from(artifact_root: Path, bucket: str, tmp_path: Path) -> None:
    upstream = number(ONE)
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "other"}):
        assert load(double(upstream)) == 2.0
        assert logged(tmp_path / "other") == ["double"]
        assert verify(folder(upstream)) == []


def test_rerun_computes_anew_and_has_a_place_of_its_own_in_the_store(
    artifact_root: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFECT_LOCAL_STORAGE_PATH", str(artifact_root))
    artifact = number(ONE)
    rerun = artifact_root / "reruns" / "quickstart" / "1"
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: rerun}):
        assert number(ONE) == artifact
        assert logged(rerun) == ["number 1"]
        store = remote.store()
        assert store is not None
        assert store.url == f"{bucket}/reruns/quickstart/1"
        assert store.winner(artifact) is not None
    monkeypatch.setenv("PREFECT_LOCAL_STORAGE_PATH", str(tmp_path / "other"))
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "other" / "reruns" / "quickstart" / "1"}):
        assert number(ONE) == artifact, "another machine of the same rerun"
        assert logged(tmp_path / "other" / "reruns" / "quickstart" / "1") == []


def test_who_loses_the_race_takes_the_winners_bytes(artifact_root: Path, bucket: str, tmp_path: Path) -> None:
    artifact = number(ONE)
    store = remote.store()
    assert store is not None
    winner = store.winner(artifact)
    loser = tmp_path / "loser" / "number" / artifact.fingerprint
    shutil.copytree(folder(artifact), loser)
    (loser / "only-mine.txt").write_text("computed at the same time elsewhere")
    attempt, ours = store.upload(artifact, loser)
    assert (attempt, ours) == (winner, False), "If-None-Match"
    remote.share(artifact, loser, tmp_path / "scratch")
    assert not (loser / "only-mine.txt").exists()
    assert verify(loser) == []


def test_damaged_object_is_named_and_never_used(artifact_root: Path, bucket: str, tmp_path: Path) -> None:
    artifact = number(ONE)
    store = remote.store()
    assert store is not None
    key = f"{store.path.path}/{artifact.stage}/{artifact.fingerprint}/{store.winner(artifact)}/value.safetensors"
    store.path.fs.pipe_file(key, b"other bytes")
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "other"}):
        with pytest.raises(UserError, match=rf"CPDIFF_REMOTE: .*{artifact.fingerprint} is damaged"):
            number(ONE)
        assert not folder(artifact).exists()


def test_storage_that_fails_is_one_line_without_secrets_and_a_rerun_goes_on(
    artifact_root: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(remote.VARIABLE, "s3://there-is-no-such-bucket/root")
    with pytest.raises(UserError, match=r"^CPDIFF_REMOTE 's3://there-is-no-such-bucket/root': ") as caught:
        number(ONE)
    assert "\n" not in str(caught.value)
    assert "secret-of-the-test" not in str(caught.value)
    assert not is_done(number.artifact(ONE))
    monkeypatch.setenv(remote.VARIABLE, bucket)
    assert load(number(ONE)) == 1.0


@pytest.mark.parametrize("fault", ["503", "closed"])
@pytest.mark.parametrize("after", [0, 3, 9])
def test_storage_that_fails_for_a_while_changes_nothing(
    artifact_root: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Fault, after: int
) -> None:
    with flaky(os.environ["AWS_ENDPOINT_URL"]) as storage:
        monkeypatch.setenv("AWS_ENDPOINT_URL", storage.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(remote, "_stores", {})  # connections are kept
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        storage.fail(fault, after)
        with pytest.raises(UserError, match=r"^CPDIFF_REMOTE 's3://.*; check it and run again: finished stages are kept$"):
            double(number(ONE))
        assert storage.failed
        storage.heal()
        assert load(double(number(ONE))) == 2.0
        artifacts = (number.artifact(ONE), double(number(ONE)))
        assert [fault for artifact in artifacts for fault in verify(folder(artifact))] == []
        with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "other"}):
            assert load(double(number(ONE))) == 2.0
            assert logged(tmp_path / "other") == [], "all of it is in the store"


def test_workers_of_a_cluster_with_roots_of_their_own_meet_in_the_store(
    artifact_root: Path, bucket: str, scheduler: str, start, tmp_path: Path
) -> None:
    pytest.importorskip("prefect_dask", reason="pip install 'cpdiff[dask]'")
    s3 = {name: value for name, value in os.environ.items() if name.startswith("AWS_") or name == remote.VARIABLE}
    own = tmp_path / "own"
    start(run_worker, scheduler, s3 | {"PREFECT_LOCAL_STORAGE_PATH": str(own)})
    start(run_on_with, s3, scheduler, "double_apart", 1).join(60)
    assert logged(artifact_root) == ["number 1", "returned 2.0"]
    assert logged(own) == ["double"]
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: own}):
        assert verify(folder(number.artifact(ONE))) == [], "fetched, for it was computed in the flow"
        assert is_done(double.artifact(number.artifact(ONE)))


def test_no_secret_is_in_an_artifact(artifact_root: Path, bucket: str) -> None:
    made = folder(number(ONE))
    texts = [path.read_text(errors="replace") for path in made.iterdir()]
    assert not [text for text in texts if "secret-of-the-test" in text]
    assert json.loads((made / "provenance.json").read_text())["seconds"] >= 0
