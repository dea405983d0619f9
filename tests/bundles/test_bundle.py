"""A portable generator: exported, moved, loaded, damaged, and used on the wrong base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_model

from cpdiff_core.artifacts import read_tensors
from cpdiff_core.bundle import POOLED, Generator, seal_generator
from cpdiff_core.config import UserError
from cpdiff_core.export import write_generator_card
from cpdiff_core.generator.conditions import build_prompt
from cpdiff_core.generators import copy_generator


def test_moved_generator_gives_the_candidates_of_the_run_bit_for_bit(bundled, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    copy_generator(bundled.folder, exported)
    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(exported, moved)
    generator = Generator.load(moved)
    assert "Adapter generator tiny" in (moved / "README.md").read_text()
    for task in ("left", "right"):
        w_MK = read_tensors(bundled.candidates[task], "candidates.safetensors")["w_MK"]
        assert torch.equal(generator.generate(task, num=len(w_MK)).w_MK, w_MK)
    assert not torch.equal(generator.generate("left", num=3).w_MK, generator.generate("left", num=3, seed=1).w_MK)


def test_card_tells_scores_of_every_candidate_and_names_no_path(bundled) -> None:
    card = Generator.load(bundled.folder).card
    scores = json.loads((bundled.scores["left"] / "scores.json").read_text())["scores"]["accuracy"]
    assert [round(item.estimate, 9) for item in card.task("left").candidates] == [round(score, 9) for score in scores]
    text = "".join(path.read_text() for path in bundled.folder.glob("*.json") if path.name == "generator.json")
    assert str(bundled.base.folder.parent) not in text
    readme = (bundled.folder / "README.md").read_text()
    assert readme.startswith("---\n")
    assert f"trained on {card.made['device']} at commit {card.made['commit']}, until 20" in readme
    assert f"cpdiff export-generator {card.name} --out FOLDER" in readme


def test_card_of_a_generator_made_without_a_git_clone_names_no_commit(bundled, tmp_path: Path) -> None:
    card = Generator.load(bundled.folder).card
    made = {key: value for key, value in card.made.items() if key != "commit"}
    write_generator_card(tmp_path, card.model_copy(update={"made": made}))
    assert f"was trained on {made['device']}, until {made['finished']}." in (tmp_path / "README.md").read_text()


def test_compact_generator_is_smaller_and_nearly_the_same(bundled, tmp_path: Path) -> None:
    copy_generator(bundled.folder, tmp_path / "small", compact=True)
    small, full = Generator.load(tmp_path / "small"), Generator.load(bundled.folder)
    sizes = [(folder / "diffusion.safetensors").stat().st_size for folder in (tmp_path / "small", bundled.folder)]
    assert sizes[0] < 0.6 * sizes[1]
    a, b = (generator.generate("left", num=3).w_MK for generator in (small, full))
    assert 0 < (a - b).norm() < 0.01 * b.norm()
    copy_generator(tmp_path / "small", tmp_path / "again")
    assert torch.equal(Generator.load(tmp_path / "again").generate("left", num=3).w_MK, a)


def test_condition_known_by_description_by_name_or_unseen(bundled) -> None:
    generator = Generator.load(bundled.folder)
    by_name, by_text = generator.condition(task="left"), generator.condition("  the task LEFT. ")
    assert by_text.task == "left"
    assert torch.equal(by_name.y_1E, by_text.y_1E)
    examples = ["w1 fine -> yes", "w2 cold -> no"]
    own = generator.condition(task="left", examples=examples)
    assert own.text == build_prompt(generator.card.condition.encoder, "The task left.", examples)
    assert own.task == "left"
    unseen = generator.condition("Say whether it rains.", ["wet -> yes", "dry -> no"])
    assert unseen.task is None
    generated = generator.generate(unseen, num=2)
    assert generated.statistics == POOLED
    stds = [generator.normalizer.tensors()[f"{task}/std"] for task in ("left", "right")]
    means = [generator.normalizer.tensors()[f"{task}/mean"] for task in ("left", "right")]
    units = (generator.generate(generator.condition("x", ["a -> b"]), num=1, seed=3).w_MK - sum(means) / 2) / (
        (stds[0] ** 2 + stds[1] ** 2) / 2
    ).sqrt()
    z = generator.diffusion.sample(generator.condition("x", ["a -> b"]).y_1E, 1, 3, generator.card.sampling)[0]
    torch.testing.assert_close(units, generator.autoencoder.decode(z))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"description": " "}, "is empty"),
        ({"description": "a\x07b"}, "control character"),
        ({"description": "a\udcffb"}, "which is no character; give the text in UTF-8"),
        ({"description": "word " * 600}, "tokens"),
        ({"task": "middle"}, "left, right"),
        ({"description": "Something else."}, "--example 2 times"),
        ({}, "nothing says what the adapters are for; give --task with one of left, right, or --task-info"),
        ({"description": ""}, "is empty"),
    ],
)
def test_condition_that_cannot_be_used_is_an_error_that_says_why(bundled, arguments, message) -> None:
    examples = ["a -> b", "c -> d"] if arguments.get("description", "").startswith(("word", " ")) else []
    with pytest.raises(UserError, match=message):
        Generator.load(bundled.folder).condition(examples=examples, **arguments)


def damaged(folder: Path, name: str, change) -> Path:
    """`folder` with the tensors of one file changed and sealed again, as a wrong tool would leave it."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    seal_generator(folder)
    return folder


def test_faults_of_a_folder_are_each_one_clear_error(bundled, tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        copy_generator(bundled.folder, tmp_path / name)
        return tmp_path / name

    state = load_file(bundled.folder / "diffusion.safetensors")
    key = next(name for name in state if name.endswith("weight"))
    missing = damaged(fresh("missing"), "diffusion.safetensors", lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=f"missing .*{key}"):
        Generator.load(missing)
    extra = damaged(fresh("extra"), "autoencoder.safetensors", lambda t: t.update(stray=torch.zeros(2)))
    with pytest.raises(UserError, match=r"unexpected .*stray"):
        Generator.load(extra)
    truncated = fresh("truncated")
    data = (truncated / "heads.safetensors").read_bytes()
    (truncated / "heads.safetensors").write_bytes(data[:-3])
    with pytest.raises(UserError, match=r"heads.safetensors.*truncated or altered"):
        Generator.load(truncated)
    rank = fresh("rank")
    card = json.loads((rank / "generator.json").read_text())
    card["lora"]["rank"] = 3
    (rank / "generator.json").write_text(json.dumps(card))
    seal_generator(rank)
    with pytest.raises(UserError, match="rank 3"):
        Generator.load(rank)
    with pytest.raises(UserError, match=r"generator\.json"):
        Generator.load(tmp_path)
    with pytest.raises(UserError, match="not in this package"):
        Generator.load("builtin/nothing")
    with pytest.raises(UserError, match="not empty"):
        copy_generator(bundled.folder, rank)


def test_wrong_base_is_refused_and_the_right_one_found_anywhere(bundled, tmp_path: Path) -> None:
    card = Generator.load(bundled.folder).card
    other = save_model(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="is not the one that the adapters are for"):
        card.base.find(str(other))
    copied = shutil.copytree(bundled.base.folder, tmp_path / "copied")
    assert card.base.find(str(copied)).files[0].sha256 == bundled.base.files[0].sha256
