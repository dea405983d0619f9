"""Artifacts shared through object storage: one setting, CPDIFF_REMOTE, for example s3://bucket/root.

Every machine keeps a root of its own, as without it; the store is where they meet. A stage first looks there, and a
worker that lacks what a stage was made from fetches that. Each attempt is uploaded under a prefix of its own, and a
record, put only if there is none (If-None-Match), names the winner, so that two machines that compute the same stage at
once end with the same bytes. What is fetched is compared with its digests before it is used. Endpoint and credentials
are the usual ones of the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...), and are written nowhere.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cpdiff_core.artifacts import Artifact, verify
from cpdiff_core.config import Config, UserError, first_line
from tasks.environment import nested

VARIABLE = "CPDIFF_REMOTE"
WINNER = "winner.json"


class Store:
    """Artifacts below a prefix of any storage that fsspec knows and that can put if absent."""

    def __init__(self, url: str) -> None:
        from upath import UPath

        self.url = url.rstrip("/")
        self.path = UPath(self.url)
        self._fs = self.path.fs
        # s3fs would make a bucket that is not there, and a misspelt name would pass for an empty store.
        if self.path.protocol == "s3" and not self._fs.exists(bucket := self.path.path.split("/")[0]):
            raise FileNotFoundError(f"there is no bucket {bucket!r}")

    def winner(self, artifact: Artifact) -> str | None:
        """The prefix of the attempt that counts, or None. Asked of the store each time."""
        self._fs.invalidate_cache()
        try:
            value = json.loads(self._fs.cat_file(self._key(artifact, WINNER)))
        except FileNotFoundError:
            return None
        return str(value["attempt"])

    def upload(self, artifact: Artifact, folder: Path) -> tuple[str, bool]:
        """Upload `folder` as an attempt and return the one that counts, and whether it is this one."""
        attempt = uuid.uuid4().hex
        self._fs.put(f"{folder}/", self._key(artifact, attempt) + "/", recursive=True)
        record = json.dumps({"attempt": attempt}).encode()
        with suppress(FileExistsError):
            self._fs.pipe_file(self._key(artifact, WINNER), record, mode="create")
        found = self.winner(artifact)
        if found is None:
            raise OSError(f"{self.url}: the record of {artifact.stage}/{artifact.fingerprint} is not there after it was put")
        return found, found == attempt

    def download(self, artifact: Artifact, attempt: str, target: Path) -> None:
        """Fetch an attempt to the folder `target`, which must not exist. Raises UserError if a file is damaged."""
        self._fs.get(self._key(artifact, attempt) + "/", f"{target}/", recursive=True)
        if faults := verify(target):
            place = f"{self.url}/{artifact.stage}/{artifact.fingerprint}"
            raise UserError(f"{VARIABLE}: {place} is damaged ({faults[0].split(': ')[-2]}); delete it and run again")

    def _key(self, artifact: Artifact, name: str) -> str:
        return f"{self.path.path}/{artifact.stage}/{artifact.fingerprint}/{name}"


_stores: dict[str, Store] = {}


def store() -> Store | None:
    """The store that CPDIFF_REMOTE names at the moment, or None. A rerun's root below the root has a place of its own
    below the store, or else it would fetch what it is to compute again."""
    url = os.environ.get(VARIABLE)
    if not url:
        return None
    if (below := nested()) != Path():
        url = f"{url.rstrip('/')}/{below.as_posix()}"
    if url not in _stores:
        with _reported(url):
            _stores[url] = Store(url)
    return _stores[url]


def fetch(artifact: Artifact, target: Path, scratch: Path) -> bool:
    """Bring `artifact` from the store to the folder `target`; False if there is no store or it lacks it."""
    if (there := store()) is None:
        return False
    with _reported(there.url):
        attempt = there.winner(artifact)
        if attempt is None:
            return False
        there.download(artifact, attempt, scratch)
    _replace(target, scratch)
    return True


def share(artifact: Artifact, folder: Path, scratch: Path) -> None:
    """Bring `folder` to the store. If another machine was first, its bytes replace those of `folder`."""
    if (there := store()) is None:
        return
    with _reported(there.url):
        attempt, ours = there.upload(artifact, folder)
        if ours:
            return
        there.download(artifact, attempt, scratch)
    _replace(folder, scratch)


def _replace(target: Path, source: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = source.with_name(f"{source.name}-replaced")
        os.rename(target, old)
        shutil.rmtree(old)
    os.rename(source, target)


@contextmanager
def _reported(url: str) -> Iterator[None]:
    """Whatever the storage raises is one line for the user; nothing was recorded, so a rerun goes on."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{VARIABLE} {url!r}: needs another package ({error}); pip install 'cpdiff[s3]'") from error
    except Exception as error:
        raise UserError(f"{VARIABLE} {url!r}: {first_line(error)}; check it and run again: finished stages are kept") from error


def artifacts_in(value: Any) -> Iterator[Artifact]:
    """Every artifact in a stage's arguments."""
    if isinstance(value, Artifact):
        yield value
    elif isinstance(value, Config):
        for name in type(value).model_fields:
            yield from artifacts_in(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from artifacts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from artifacts_in(item)
