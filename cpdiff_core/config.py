"""Configuration values and their identity.

Everything that changes a result is a frozen `Config`; everything that only changes where or how fast a result
is computed is `RuntimeConfig` and never enters a cache key. `fingerprint` turns a stage and its inputs into the
key. Local data and models are identified by their content (`LocalFile`), never by where they lie.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

_ALTERNATIVES = {"null": "none", "string": "a text", "integer": "a number", "number": "a number", "array": "a list"}

MAX_CANDIDATES = 10_000
MAX_THREADS = 1_024
"""More than these is a slip of the finger, which memory would tell late and not in a line."""


class UserError(ValueError):
    """A fault that the user can mend. The message is one line: the field, its value and the remedy."""


def first_line(error: BaseException, length: int = 200) -> str:
    """What a library's error says, for a line of ours: its first line with words, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:length]


def _in_words(model: type[Any]) -> str:
    """ConvAutoencoderConfig: Conv autoencoder."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*", model.__name__.removesuffix("Config"))
    return " ".join([words[0], *(word if word.isupper() else word.lower() for word in words[1:])])


@cache
def _number_fields(model: type[BaseModel]) -> frozenset[str]:
    """The fields of `model` that take numbers, alone or in lists and mappings, and neither true nor false."""
    kinds = {name: _types_in(field.annotation) for name, field in model.model_fields.items()}
    return frozenset(name for name, found in kinds.items() if (int in found or float in found) and bool not in found)


def _types_in(annotation: Any) -> list[Any]:
    """An annotation such as tuple[int, ...] | None and all that stands in it."""
    return [annotation, *(inner for part in get_args(annotation) for inner in _types_in(part))]


def _holds_truth(value: Any) -> bool:
    """Whether `value`, or something in a list or mapping of it, is true or false."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return isinstance(value, bool) or any(map(_holds_truth, items))


class Config(BaseModel):
    """A frozen value. Unknown fields are refused, so a misspelt name is an error and not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, model_title_generator=_in_words)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        """pydantic would read true as 1."""
        if isinstance(values, dict):
            for name in values:
                if name in _number_fields(cls) and _holds_truth(values[name]):
                    raise ValueError(f"{name} holds true or false where a number is wanted; give one")
        return values

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Alternatives of a field have names for people: a form writes them on tabs."""
        described = handler.resolve_ref_schema(handler(schema))
        for field in described.get("properties", {}).values():
            for choice in field.get("anyOf", ()):
                if "$ref" not in choice and "title" not in choice:
                    choice["title"] = _ALTERNATIVES.get(choice.get("type"), "another value")
        return described

    def identity(self) -> Any:
        """What of this value counts in a cache key; everything by default."""
        return {name: getattr(self, name) for name in type(self).model_fields}


def check_path(what: str, path: Path) -> None:
    """Raises UserError for a path with bytes that are no UTF-8, which neither safetensors nor JSON takes."""
    whole = str(path.resolve())
    try:
        whole.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} {whole!r}: its path is no UTF-8 text; rename or move it") from error


class LocalFile(Config):
    """A file on this machine. Its identity is its content: moving it changes nothing, changing a byte does."""

    path: str = Field(description="Where the file lies. Not part of the identity.")
    sha256: str = Field(description="Digest of the content.", pattern=r"^[0-9a-f]{64}$")

    def identity(self) -> Any:
        return self.sha256

    @classmethod
    def of(cls, path: Path) -> LocalFile:
        """Digest `path`. Raises UserError if it cannot be read, or has a name that no library could be told."""
        check_path("file", path)
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"file {str(path)!r}: cannot be read ({error.strerror}); check the path") from error
        return cls(path=str(path.resolve()), sha256=digest)


class RuntimeConfig(Config):
    """Where and how fast. Nothing here may change a result beyond rounding, and nothing here is in a cache key."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:<index>. auto takes a GPU if there is one.")
    data_dir: str | None = Field(None, description="Folder that relative data paths and glue/<task>/ start from.")
    num_threads: int | None = Field(
        None, ge=1, le=MAX_THREADS, description="CPU threads of one process; None: torch's choice, at most 8 beside a GPU."
    )
    adapters_per_batch: int | None = Field(
        None, ge=1, description="LoRA adapters trained or scored in one forward pass; None chooses by memory."
    )
    tokens_per_batch: int | None = Field(
        None, ge=64, description="Tokens in one scoring batch; None chooses by device."
    )
    compile: bool | None = Field(None, description="Compile and capture the training steps; None does so on a GPU.")
    capture_steps: bool = Field(True, description="On a GPU, run each fine-tuning step as one captured CUDA graph.")
    resume_seconds: float = Field(30.0, gt=0, description="How often a long stage saves its resume state.")
    progress: bool = Field(True, description="Show live progress on stderr.")


def canonical(value: Any) -> Any:
    """`value` as plain JSON data that is the same in every process.

    Raises TypeError for what has no such form (sets, paths, callables, arrays) and ValueError for NaN or infinity.
    """
    if isinstance(value, Config):
        return canonical(value.identity())
    if isinstance(value, Enum):
        return canonical(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} has no place in a cache key")
        return value
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("only dictionaries with text keys can enter a cache key")
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    raise TypeError(f"a {type(value).__name__} cannot enter a cache key")


def fingerprint(stage: str, version: int, inputs: dict[str, Any]) -> str:
    """The cache key of one stage: 20 hex digits over its name, its version and all its inputs, defaults included."""
    text = json.dumps(canonical([stage, version, inputs]), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
