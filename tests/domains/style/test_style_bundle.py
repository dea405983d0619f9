"""A portable style generator and `cpdiff generate --style-image`: against PEFT and diffusers, moved, damaged, misused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from style_pictures import encoded, picture, write_pictures

from cpdiff_core.bundle import POOLED, Generator, seal_generator
from cpdiff_core.compose import compose
from cpdiff_core.config import UserError
from cpdiff_core.domains.style.base import Captions, load_transformer
from cpdiff_core.domains.style.stack import StackedPixArt
from cpdiff_core.generators import copy_generator, load_generator
from cpdiff_core.lora.peft_folder import read_adapter
from cpdiff_core.style_bundle import StyleGenerator
from cpdiff_core.style_delivery import StyleRequest, deliver_style

NUM = 3


@pytest.fixture(scope="module")
def generator(style_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> StyleGenerator:
    """Exported and moved."""
    folder = tmp_path_factory.mktemp("exported") / "generator"
    copy_generator(style_bundle, folder)
    moved = folder.parent / "elsewhere" / "moved"
    shutil.move(folder, moved)
    loaded = load_generator(moved)
    assert isinstance(loaded, StyleGenerator)
    return loaded


@pytest.fixture(scope="module")
def delivered(generator: StyleGenerator, style_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an image of a style never seen gives, chosen on a folder and merged."""
    path = tmp_path_factory.mktemp("delivered")
    picture(4242).save(path / "mine.png")
    write_pictures(path / "mine", 7, 42)
    request = StyleRequest(style_image=str(path / "mine.png"), num=NUM, select=str(path / "mine"), merge=True)
    lines = deliver_style(generator, request, path / "out", style_run.runtime)
    assert lines[0].startswith("UNSEEN CONDITION")
    assert any(line.startswith("chosen: candidate-") for line in lines)
    return path / "out"


def inputs(num: int = 4) -> dict[str, object]:
    torch.manual_seed(5)
    return {
        "hidden_states": torch.randn(num, 3, 8, 8), "encoder_hidden_states": torch.randn(num, 12, 384),
        "timestep": torch.tensor([3, 250, 600, 990])[:num], "encoder_attention_mask": torch.ones(num, 12),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def test_moved_generator_gives_the_candidates_of_the_run_bit_for_bit(generator: StyleGenerator, style_run) -> None:
    for folder, made in style_run.inputs("generate_candidates").items():
        w_MK = load_file(folder / "candidates.safetensors")["w_MK"]
        found = generator.generate(made["task"], num=len(w_MK))
        assert torch.equal(found.w_MK, w_MK)
        assert found.statistics == made["task"]
    assert len(style_run.inputs("generate_candidates")) == 2
    text = "".join(path.read_text() for path in generator.base_folder.parent.glob("*.json"))
    assert str(style_run.root) not in text
    assert str(style_run.data) not in text


def test_same_image_gives_the_same_bits_in_another_process(generator: StyleGenerator, tmp_path: Path) -> None:
    picture(7).save(tmp_path / "a.png")
    here = generator.generate(tmp_path / "a.png", num=2)
    assert here.statistics == POOLED
    assert here.condition.style is None
    code = (
        "import sys; from pathlib import Path; from safetensors.torch import save_file; "
        "from cpdiff_core.style_bundle import StyleGenerator; "
        "save_file({'w': StyleGenerator.load(sys.argv[1]).generate(Path(sys.argv[2]), num=2).w_MK}, sys.argv[3])"
    )
    folder = generator.base_folder.parent
    subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "a.png"), str(tmp_path / "w.safetensors")], check=True
    )
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], here.w_MK)
    assert not torch.equal(generator.generate(tmp_path / "a.png", num=2, seed=1).w_MK, here.w_MK)


@torch.no_grad()
def test_peft_and_diffusers_alone_load_the_folder_and_give_the_output_of_the_stack(
    generator: StyleGenerator, delivered: Path
) -> None:
    w_MK = generator.generate(delivered.parent / "mine.png", num=NUM).w_MK
    given = inputs()
    stack = StackedPixArt(load_transformer(generator.base(), Path()), generator.card.layout, generator.card.lora.scaling)
    captions = Captions(given["encoder_hidden_states"], given["encoder_attention_mask"])
    apart = 0.0
    for m in range(NUM):
        base = PixArtTransformer2DModel.from_pretrained(delivered / "base")
        plain = base(**given).sample
        adapted = PeftModel.from_pretrained(base, str(delivered / f"candidate-{m}")).eval()
        found = adapted(**given).sample
        expected = stack(w_MK[m : m + 1], given["hidden_states"], given["timestep"], captions)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        apart = max(apart, float((found - plain).abs().max()))
    assert apart > 1e-4
    summary = json.loads((delivered / "generation.json").read_text())
    chosen = PeftModel.from_pretrained(
        PixArtTransformer2DModel.from_pretrained(delivered / "base"), str(delivered / summary["chosen"])
    ).eval()
    merged = PixArtTransformer2DModel.from_pretrained(delivered / "merged", subfolder="transformer").eval()
    torch.testing.assert_close(merged(**given).sample, chosen(**given).sample, atol=1e-4, rtol=1e-4)


def test_the_best_on_the_users_images_is_chosen_and_everything_is_told(generator, delivered: Path) -> None:
    summary = json.loads((delivered / "generation.json").read_text())
    scores = [item["scores"][0]["estimate"] for item in summary["candidates"]]
    assert summary["chosen"] == f"candidate-{scores.index(min(scores))}"
    assert len(set(scores)) == NUM
    assert summary["unseen_condition"]
    assert summary["statistics"] == POOLED
    assert [arm["arm"].split(",")[0] for arm in summary["arms"]] == ["no-LoRA", f"LoRA of {summary['nearest_style']}"]
    assert {arm["num_real"] for arm in summary["arms"]} == {7}
    card = (delivered / summary["chosen"] / "README.md").read_text()
    for expected in ("**A style never seen.**", "mine.png", "pipeline_tag: text-to-image", "optimistic", "PixArtTransformer"):
        assert expected in card
    with Image.open(delivered / "contact_sheet.png") as sheet:  # image, no-LoRA, nearest, candidates; 6 prompts, 64 px each
        assert sheet.size == (6 * 66 - 2, (3 + NUM) * 66 - 2)


def test_interpolated_adapters_end_exactly_at_the_two(delivered: Path, tmp_path: Path) -> None:
    pair = [delivered / "candidate-0", delivered / "candidate-1"]
    for weight, end in ((0.0, pair[0]), (1.0, pair[1])):
        compose("interpolate", pair, [weight], tmp_path / str(weight))
        found, expected = read_adapter(tmp_path / str(weight)), read_adapter(end)
        assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in expected.tensors.items())
    assert "text-to-image" in (tmp_path / "0.0" / "README.md").read_text()


def test_image_of_any_kind_is_the_condition_of_its_rgb_square(generator: StyleGenerator, tmp_path: Path) -> None:
    image = picture(3, (24, 24))
    grey = image.convert("L")
    forms = {
        "rgb.png": encoded(image, "PNG"), "cmyk.tif": encoded(image.convert("CMYK"), "TIFF"), "grey.png": encoded(grey, "PNG"),
        "alpha.png": encoded(image.convert("RGBA"), "PNG"),
        "palette.gif": encoded(grey, "GIF", save_all=True, append_images=[image]),
    }  # fmt: skip
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
    found = {name: generator.condition(tmp_path / name).y_1E for name in forms}
    for name in ("cmyk.tif", "alpha.png"):
        torch.testing.assert_close(found[name], found["rgb.png"], atol=0.05, rtol=0.05)
    assert torch.equal(found["grey.png"], found["palette.gif"])  # of an animation the first frame
    assert not torch.equal(found["grey.png"], found["rgb.png"])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(encoded(picture(1, (200, 200)), "PNG")[:300]), "truncated or damaged"),
        (lambda path: path.write_text("hello"), "no image that can be read"),
        (lambda path: Image.new("1", (20_000, 6_000)).save(path, "PNG"), "100 million pixels"),
    ],
)
def test_unusable_image_is_one_line_and_nothing_is_written(generator, style_run, tmp_path: Path, write, message) -> None:
    path = tmp_path / "style.png"
    write(path)
    with pytest.raises(UserError, match=message) as fault:
        deliver_style(generator, StyleRequest(style_image=str(path)), tmp_path / "out", style_run.runtime)
    assert "\n" not in str(fault.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_refused_with_the_reason(generator, style_run, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    write_pictures(tmp_path / "one", 1, 0)
    image = str(tmp_path / "a.png")
    faults = [
        ({}, "--style-image FILE or --task NAME"),
        ({"style_image": image, "task": "ink"}, "give one of the two"),
        ({"task": "pastel"}, r"is not among this generator's 4 styles: ink, oil, chalk, made"),
        ({"style_image": image, "merge": True}, "--merge: which"),
        ({"style_image": image, "select": str(tmp_path / "empty")}, "no image in"),
        ({"style_image": image, "select": str(tmp_path / "nowhere")}, "no image in"),
        ({"style_image": image, "select": str(tmp_path / "one")}, "at least two"),
        ({"style_image": image, "base": str(tmp_path)}, "cannot be read"),
    ]
    for values, message in faults:
        with pytest.raises(UserError, match=message):
            deliver_style(generator, StyleRequest(**values), tmp_path / "out", style_run.runtime)
    assert not (tmp_path / "out").exists()


def test_base_with_other_weights_and_damaged_folders_are_refused(style_bundle: Path, tmp_path: Path) -> None:
    copy_generator(style_bundle, tmp_path / "other")
    weights = tmp_path / "other" / "base" / "transformer-1-of-1.safetensors"
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"base/transformer-1-of-1.*truncated or altered"):
        load_generator(tmp_path / "other")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    seal_generator(tmp_path / "other")
    with pytest.raises(UserError, match="is not the one that the adapters are for"):
        load_generator(tmp_path / "other").base()
    card = json.loads((tmp_path / "other" / "generator.json").read_text())
    card["lora"]["rank"] = 3
    (tmp_path / "other" / "generator.json").write_text(json.dumps(card))
    seal_generator(tmp_path / "other")
    with pytest.raises(UserError, match="rank 3"):
        load_generator(tmp_path / "other")
    with pytest.raises(UserError, match="adapters for styles, not for texts"):
        Generator.load(style_bundle)


def test_compact_generator_is_smaller_and_nearly_the_same(style_bundle: Path, generator, tmp_path: Path) -> None:
    copy_generator(style_bundle, tmp_path / "small", compact=True)
    small = StyleGenerator.load(tmp_path / "small")
    a, b = (each.generate("oil", num=2).w_MK for each in (small, generator))
    assert 0 < (a - b).norm() < 0.01 * b.norm()
    assert "half precision" in (tmp_path / "small" / "README.md").read_text()


def test_command_line_writes_the_same_adapters_and_names_the_wrong_option(
    generator: StyleGenerator, delivered: Path, tmp_path: Path
) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli", "generate", str(generator.base_folder.parent), *options]
        return subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False)

    image = str(delivered.parent / "mine.png")
    done = run("--style-image", image, "--num", str(NUM), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "contact sheet:" in done.stdout
    for m in range(NUM):
        pair = [folder / f"candidate-{m}" / "adapter_model.safetensors" for folder in (tmp_path / "out", delivered)]
        assert pair[0].read_bytes() == pair[1].read_bytes()
    refused = run("--task-info", "Paint it.", "--out", str(tmp_path / "no"))
    assert refused.returncode == 2
    assert "makes adapters for styles; give it --style-image" in refused.stderr
