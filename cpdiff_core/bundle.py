"""A portable generator: one folder that makes adapters on any machine, without the data it was trained on.

It holds what sampling needs (Sec. 3.2-3.3: normaliser, decoder, diffusion, condition encoder) and what using the
result needs: base model by digest, layout of the vectors, a head per task, a few training adapters to compare with,
and what every task's generated adapters scored. A cached stage writes such a folder and `cpdiff export-generator`
copies it; `Generator.load` reads either.

A compact folder keeps weights in half precision and leaves the encoder out, which generation does not use. Its
candidates differ from the full generator's by rounding; those of a full folder are the very ones of the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from cpdiff_core.artifacts import MANIFEST, read_json, read_tensors, seal, sha256_of, write_json, write_tensors
from cpdiff_core.cards import GeneratorCard
from cpdiff_core.config import UserError
from cpdiff_core.generator.autoencoder import AutoencoderConfig, ParameterAutoencoder
from cpdiff_core.generator.conditions import (
    ConditionConfig,
    FewShotCondition,
    LearnedCondition,
    OneHotCondition,
    StyleImageCondition,
    TaskInfoCondition,
    build_prompt,
    check_text,
    encode_texts,
)
from cpdiff_core.generator.diffusion import DiffusionConfig, LatentDiffusion, SamplingConfig
from cpdiff_core.generator.normalization import NormalizationConfig, Normalizer

CARD_FILE = "generator.json"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
POOLED = "pooled over the training tasks"
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Condition:
    """y_1E: what the generator is told. task: the training task whose statistics and head apply; None: unseen."""

    y_1E: torch.Tensor
    task: str | None
    text: str | None


@dataclass(frozen=True)
class Candidates:
    """w_MK: generated vectors in weights. statistics: the task whose normalisation they carry, or POOLED."""

    w_MK: torch.Tensor
    condition: Condition
    statistics: str
    seed: int


class Generator:
    """A fitted generator, ready to use."""

    def __init__(
        self, card: GeneratorCard, normalizer: Normalizer, autoencoder: ParameterAutoencoder,
        diffusion: LatentDiffusion, y_QE: torch.Tensor, heads: Mapping[str, Mapping[str, torch.Tensor]],
        references: Mapping[str, torch.Tensor],
    ) -> None:  # fmt: skip
        self.card, self.normalizer, self.autoencoder, self.diffusion = card, normalizer, autoencoder, diffusion
        self.y_QE, self.heads, self.references = y_QE, dict(heads), dict(references)
        size, vectors = card.layout.num_parameters, autoencoder.num_parameters
        if size != vectors or any(factor.rank != card.lora.rank for factor in card.layout.factors):
            raise UserError(
                f"generator {card.name!r}: rank {card.lora.rank} and a layout of K = {size} do not match its "
                f"autoencoder of K = {vectors}; export it anew"
            )

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Generator:
        """Read a generator folder, or `builtin/<name>`. Raises UserError that names what is missing or unfit."""
        path, value = read_card(folder)
        where = f"generator {str(folder)!r}"
        if value.get("kind") == "style":
            raise UserError(f"{where}: makes adapters for styles, not for texts; give it --style-image")
        with another_version(where):
            card = GeneratorCard.model_validate(value)
            normalizer, autoencoder, diffusion = load_parts(path, card.compact, device, where)
        heads: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in read_tensors(path, "heads.safetensors").items():
            task, _, name = key.partition("/")
            heads.setdefault(task, {})[name] = tensor
        y_QE = read_tensors(path, "conditions.safetensors")["y_QE"]
        return cls(card, normalizer, autoencoder, diffusion, y_QE, heads, read_tensors(path, "references.safetensors"))

    def save(self, folder: Path) -> None:
        """Write a folder that `load` reads. Nothing is sealed: the stage, or `seal_generator`, does that."""
        write_json(folder / CARD_FILE, self.card.model_dump(mode="json"))
        save_parts(folder, self.normalizer, self.autoencoder, self.diffusion, self.card.compact)
        write_tensors(folder / "conditions.safetensors", {"y_QE": self.y_QE})
        heads = {f"{task}/{name}": tensor for task, head in self.heads.items() for name, tensor in head.items()}
        write_tensors(folder / "heads.safetensors", heads)
        write_tensors(folder / "references.safetensors", self.references)

    def condition(
        self, description: str | None = None, examples: Sequence[str] = (), task: str | None = None
    ) -> Condition:
        """The condition for a task in words, or for a training task by name.

        A description that equals a training task's, but for case and spaces, is that task's. A training task without
        examples gets the run's own held-out prompt. Raises UserError for what this generator's condition cannot take.
        """
        config = self.card.condition
        known, own = task_meant(self.card.name, config, self.card.tasks, description, examples, task)
        if known is not None and own:
            row = self.card.task_names.index(known.name)
            return Condition(self.y_QE[row : row + 1], known.name, known.prompt)
        assert not isinstance(config, OneHotCondition | LearnedCondition | StyleImageCondition)
        given = description if description is not None or known is None else known.description
        text = build_prompt(config.encoder, None if isinstance(config, FewShotCondition) else given, examples)
        return Condition(encode_texts(config.encoder, [text]), known.name if known else None, text)

    def generate(
        self, condition: Condition | str, num: int = 20, seed: int | None = None, sampling: SamplingConfig | None = None
    ) -> Candidates:
        """M = `num` candidates for a condition, or for a description or the name of a training task.

        The weights are those of the training task's statistics; for a task never seen, of statistics pooled over the
        training tasks. The same seed, device, thread count and `num` give the same bits.
        """
        if isinstance(condition, str):
            named = condition in self.card.task_names
            condition = self.condition(task=condition) if named else self.condition(condition)
        if num < 1:
            raise UserError(f"num {num}: at least one candidate")
        seed = self.card.seed if seed is None else seed
        device = next(self.diffusion.parameters()).device
        y_1E = condition.y_1E.to(device)
        z_MCL = self.diffusion.sample(y_1E, num, seed, sampling or self.card.sampling)[0]
        normalized_MK = self.autoencoder.decode(z_MCL).cpu()
        if condition.task is not None:
            return Candidates(self.normalizer.invert(condition.task, normalized_MK), condition, condition.task, seed)
        return Candidates(pooled(self.normalizer).invert("", normalized_MK), condition, POOLED, seed)

    def nearest_task(self, condition: Condition) -> str:
        """The training task whose prompt lies nearest in the space of the (centred) condition embeddings."""
        center_E = self.diffusion.projection.center_E.cpu()
        similarity_Q = torch.cosine_similarity(condition.y_1E.cpu() - center_E, self.y_QE - center_E)
        return self.card.tasks[int(similarity_Q.argmax())].name


class Described(Protocol):
    """A training task, of a generator's card or of the experiment that is to make one."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...


Task = TypeVar("Task", bound=Described)


def task_meant(
    generator: str, config: ConditionConfig, tasks: Sequence[Task], description: str | None, examples: Sequence[str],
    task: str | None,
) -> tuple[Task | None, bool]:  # fmt: skip
    """(the training task that is meant, or None for one never seen; whether with the run's own prompt). Needs no generator.

    Raises UserError for what a condition of this kind cannot take.
    """
    names = ", ".join(item.name for item in tasks)
    where = f"generator {generator!r}: its condition is {config.kind}"
    words = None if description is None else _plain(description)
    described = next((item for item in tasks if _plain(item.description) == words), None)
    known = described if task is None else next((item for item in tasks if item.name == task), None)
    if task is not None and known is None:
        raise UserError(f"task {task!r}: is not among this generator's tasks: {names}")
    for text in (*([] if description is None else [description]), *examples):
        check_text(text)
    if isinstance(config, StyleImageCondition):
        raise UserError(f"{where}, which reads pictures; this command makes adapters for text models")
    if isinstance(config, OneHotCondition | LearnedCondition) and (known is None or examples):
        raise UserError(f"{where}, which knows no texts; give --task with one of {names}")
    if known is not None and not examples and (description is None or known is described):
        return known, True
    if isinstance(config, TaskInfoCondition) and examples:
        raise UserError(f"{where}, a description alone; leave --example out")
    if known is None and not examples and description is None:
        raise UserError(
            f"generator {generator!r}: nothing says what the adapters are for; give --task with one of {names}, or "
            "--task-info, the task in words"
        )
    if isinstance(config, OneHotCondition | LearnedCondition):
        raise UserError(f"{where}, which knows no texts; leave --task-info out")
    if not isinstance(config, TaskInfoCondition) and not examples:
        raise UserError(f"{where}; give --example {config.num_examples} times, each as 'text -> answer'")
    if not isinstance(config, FewShotCondition) and description is None and known is None:
        raise UserError(f"{where}; give --task-info, the task in words")
    return known, False


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def pooled(normalizer: Normalizer) -> Normalizer:
    """Statistics for a task that has none: the tasks' mean of means and root mean square of stds."""
    tensors = normalizer.tensors()
    pairs = [[tensors[name] for name in sorted(tensors) if name.endswith(f"/{kind}")] for kind in ("mean", "std")]
    mean = torch.stack(pairs[0]).mean(0)
    std = torch.stack(pairs[1]).square().mean(0).sqrt()
    config = normalizer.config.model_copy(update={"scope": "batch"})
    return Normalizer.from_tensors(config, normalizer.tasks, {"all/mean": mean, "all/std": std})


def seal_generator(folder: Path) -> None:
    """Digest the files of a finished generator folder; `load` compares them."""
    seal(folder)


_ENCODER = ("into.", "encoder_blocks.")


def read_card(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """(the folder of a generator, or of `builtin/<name>`, and its card), after every file's digest has been compared."""
    path = _located(folder)
    _verify(path, f"generator {str(folder)!r}")
    return path, read_json(path, CARD_FILE)


@contextmanager
def another_version(where: str) -> Iterator[None]:
    """What a folder of an older or newer format raises, as one line."""
    try:
        yield
    except (ValidationError, KeyError) as error:
        reason = error.errors()[0]["loc"] if isinstance(error, ValidationError) else error
        raise UserError(f"{where}: was written by another version of cpdiff ({reason}); export it anew") from error


def load_parts(
    path: Path, compact: bool, device: str | torch.device, where: str
) -> tuple[Normalizer, ParameterAutoencoder, LatentDiffusion]:
    """The fitted parts of a generator folder, whatever it makes adapters for."""
    value = read_json(path, "normalizer.json")
    scaled = NormalizationConfig.model_validate(value["config"])
    normalizer = Normalizer.from_tensors(scaled, value["tasks"], read_tensors(path, "normalizer.safetensors"))
    return normalizer, _autoencoder(path, compact, device, where), _diffusion(path, device, where)


def save_parts(
    folder: Path, normalizer: Normalizer, autoencoder: ParameterAutoencoder, diffusion: LatentDiffusion, compact: bool
) -> None:
    """What `load_parts` reads; in half precision and without the encoder if `compact`."""
    value = {"config": normalizer.config.model_dump(mode="json"), "tasks": list(normalizer.tasks)}
    write_json(folder / "normalizer.json", value)
    write_tensors(folder / "normalizer.safetensors", normalizer.tensors())
    autoencoder.save(folder)
    diffusion.save(folder)
    if compact:
        write_tensors(folder / "autoencoder.safetensors", _halved(autoencoder, without=_ENCODER))
        write_tensors(folder / "diffusion.safetensors", _halved(diffusion))


def _located(folder: str | Path) -> Path:
    text = str(folder)
    if text.startswith("builtin/"):
        path = BUILTIN_FOLDER / text.removeprefix("builtin/")
        if not (path / CARD_FILE).is_file():
            known = sorted(f"builtin/{item.parent.name}" for item in BUILTIN_FOLDER.glob(f"*/{CARD_FILE}"))
            raise UserError(f"generator {text!r}: is not in this package; it has {', '.join(known) or 'none'}")
        return path
    path = Path(os.path.expanduser(folder))
    if not os.path.isfile(path / CARD_FILE):
        raise UserError(f"generator {text[:200]!r}: is no folder with {CARD_FILE}; make one with `cpdiff export-generator`")
    return path


def _verify(path: Path, where: str) -> None:
    """Compare every file with the manifest."""
    remedy = "copy or export the folder again"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: entry["sha256"] for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {MANIFEST} is missing or damaged; {remedy}") from error
    for name, digest in expected.items():
        if not (path / name).is_file():
            raise UserError(f"{where}: file {name!r} is missing; {remedy}")
        if sha256_of(path / name) != digest:
            raise UserError(f"{where}: file {name!r} is truncated or altered; {remedy}")


def _autoencoder(path: Path, compact: bool, device: str | torch.device, where: str) -> ParameterAutoencoder:
    value = read_json(path, "autoencoder.json")
    with torch.device("meta"):
        config = TypeAdapter(AutoencoderConfig).validate_python(value["config"])
        model = ParameterAutoencoder(config, value["num_parameters"])
    if compact and model.config.kind == "conv":
        del model.into, model.encoder_blocks
    return _filled(model, path, "autoencoder.safetensors", device, where)


def _diffusion(path: Path, device: str | torch.device, where: str) -> LatentDiffusion:
    value = read_json(path, "diffusion.json")
    condition = TypeAdapter(ConditionConfig).validate_python(value["condition"])
    with torch.device("meta"):
        model = LatentDiffusion(DiffusionConfig.model_validate(value["config"]), condition, **value["shape"])
    return _filled(model, path, "diffusion.safetensors", device, where)


def _filled(model: Module, path: Path, name: str, device: str | torch.device, where: str) -> Module:
    """`model` with the tensors of a file, in float32. Raises UserError for a missing, extra or misshapen one."""
    tensors = {key: tensor.float() for key, tensor in read_tensors(path, name, device).items()}
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if expected != found:
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        wrong = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
        raise UserError(
            f"{where}: {name} does not fit its description: missing {missing[:2]}, unexpected {extra[:2]}, "
            f"of another shape {wrong[:2]}; export it anew"
        )
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def _halved(model: nn.Module, without: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Parameters in half precision; buffers, the statistics, as they are."""
    parameters = {name for name, _ in model.named_parameters()}
    return {
        name: tensor.half() if name in parameters else tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(without or ("\0",))
    }
