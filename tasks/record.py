"""Prefect's record of a finished stage, checked before Prefect reads it.

Prefect reads `result.json` as the record itself says: it may name another serializer, pickle among them, a function to
decode with, or a class to make. A root may be shared, so a record counts only if it is exactly what we would have
written ourselves; any other is removed, and the stage is computed again.
"""

from __future__ import annotations

import json
from typing import Any

from prefect.serializers import JSONSerializer
from prefect.utilities.importtools import to_qualified_name

from cpdiff_core.artifacts import Artifact

RECORD = "result.json"

_SERIALIZER: dict[str, Any] = JSONSerializer().model_dump(mode="json")


def cache_key(artifact: Artifact) -> str:
    """The key of `artifact` in Prefect's result storage and in `tasks.locks.hold`."""
    return f"{artifact.stage}/{artifact.fingerprint}/{RECORD}"


def is_sound(record: bytes, artifact: Artifact) -> bool:
    """Whether `record` says that this artifact, of this class, is complete, and asks for nothing else."""
    try:
        value = json.loads(record)
        serializer, expiration = value["metadata"]["serializer"], value["metadata"]["expiration"]
        result = json.loads(value["result"])
    except (ValueError, KeyError, TypeError):
        return False
    return (
        serializer == _SERIALIZER
        and expiration is None
        and result == {"__class__": to_qualified_name(type(artifact)), "data": artifact.model_dump(mode="json")}
    )
