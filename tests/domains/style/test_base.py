"""The tiny base learns; PixArt-alpha's sizes; a diffusers folder with T5 and VAE; captions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from style_bases import saved_tiny_base
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from cpdiff_core.config import RuntimeConfig, UserError, fingerprint
from cpdiff_core.domains.style.base import (
    BLOCK_PATTERN,
    TARGET_MODULES,
    TEMPLATES,
    Captions,
    EmbeddedBase,
    ImageCodec,
    PixArtBase,
    PretrainedBase,
    StyleBase,
    TinyPixArtConfig,
    caption,
    embedded_quality,
    encode_captions,
    load_transformer,
    resolve_base,
    spec_of,
)
from cpdiff_core.domains.style.pretraining import caption_rows, computing_weights, pretrain, save_base
from cpdiff_core.domains.style.sampling import ImageSamplingConfig, sample_images
from cpdiff_core.domains.style.stack import build_stack
from cpdiff_core.domains.style.styles import excerpt, load_images, resolve_style
from cpdiff_core.generator.training import TrainingConfig
from cpdiff_core.lora.layout import LoraSpec, adapt, layout_of

CPU, ROOT, QUIET = torch.device("cpu"), Path("unused"), RuntimeConfig(progress=False)
XL = {
    "sample_size": 64, "num_layers": 28, "attention_head_dim": 72, "num_attention_heads": 16, "in_channels": 4,
    "out_channels": 8, "patch_size": 2, "cross_attention_dim": 1152, "caption_channels": 4096,
    "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "use_additional_conditions": False,
}  # fmt: skip


@pytest.mark.parametrize("rank", [1, 4])
def test_pixart_xl_has_516096_lora_parameters_per_rank(rank: int) -> None:
    with torch.device("meta"):
        model = PixArtTransformer2DModel(**XL)
        assert sum(p.numel() for p in model.parameters()) == 610_856_096
        layout = layout_of(adapt(model, LoraSpec(rank=rank), TARGET_MODULES, 0), BLOCK_PATTERN)
    assert layout.num_parameters == 516_096 * rank
    assert len(layout.factors) == 224
    assert {factor.block for factor in layout.factors} == set(range(28))


def test_tiny_base_has_16_layers_width_lora_parameters_per_rank() -> None:
    size = TinyPixArtConfig(sample_size=32, num_layers=6, num_attention_heads=4, attention_head_dim=32)
    with torch.device("meta"):
        layout = layout_of(adapt(size.build(), LoraSpec(rank=4), TARGET_MODULES, 0), BLOCK_PATTERN)
    assert layout.num_parameters == 16 * 6 * 128 * 4


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_base_learns_four_photographs_and_draws_the_one_that_is_asked_for(tmp_path: Path, precision: str) -> None:
    images = load_images(resolve_style(excerpt("photo"), None), 16)
    first = [images.classes.index(name) for name in ("dog", "guitar", "house", "person")]
    four = images.rows(torch.tensor(first).numpy())
    size = TinyPixArtConfig(sample_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=32)
    config = PretrainedBase(
        size=size, caption_dropout=0.0,
        training=TrainingConfig(steps=400, batch_size=32, learning_rate=4e-3, ema_decay=0.98, precision=precision),
    )  # fmt: skip
    classes = caption_rows(four)[0]
    texts = [caption(name, template) for name in classes for template in TEMPLATES]
    captions = encode_captions(StyleBase(kind="tiny"), ROOT, texts, CPU)
    images_flipped = torch.cat([four.images_NCHW, four.images_NCHW.flip(3)]).float()
    model, losses = pretrain(config, four, captions, seed=0, device=CPU, runtime=QUIET)
    assert losses[:10].mean() > 0.4
    assert losses[-30:].mean() < 0.2
    save_base(model, tmp_path)
    base = StyleBase(kind="tiny", folder=str(tmp_path))
    stack = build_stack(base, ROOT, LoraSpec(), CPU, torch.float32)
    own = Captions(captions.states_PTE[[0, 3, 6, 9, 12]], captions.mask_PT[[0, 3, 6, 9, 12]])
    sampling = ImageSamplingConfig(num_images=4, num_inference_steps=20, guidance_scale=1.0)
    zeros = torch.zeros(1, stack.layout.num_parameters)
    drawn = sample_images(stack, spec_of(base, ROOT), zeros, own, sampling, 0, CPU, "", QUIET)[0]
    pixels = ImageCodec(base, ROOT, CPU).decode(drawn).float()
    nearest = torch.cdist(pixels.flatten(1), images_flipped.flatten(1)).argmin(1) % 4
    assert nearest.tolist() == [first.index(images.classes.index(name)) for name in classes]


def test_bfloat16_weights_are_rounded_ones_whose_gradients_reach_the_float32_ones() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    own = computing_weights(model, "float32")
    assert all(own[name] is weight for name, weight in model.named_parameters())
    halved = computing_weights(model, "bfloat16")
    loss = sum((weight.float() ** 2).sum() for weight in halved.values())
    loss.backward()
    for name, weight in model.named_parameters():
        assert torch.equal(halved[name], weight.bfloat16())
        assert torch.equal(weight.grad, 2 * weight.bfloat16().float().bfloat16().float())


def test_saved_base_gives_the_same_predictions_within_half_precision(tmp_path: Path) -> None:
    base, model = saved_tiny_base(tmp_path)
    loaded = load_transformer(base, ROOT)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tmp_path.glob("*.*"):
        (moved / file.name).write_bytes(file.read_bytes())
    files = [file.model_copy(update={"path": str(moved / Path(file.path).name)}) for file in base.files]
    other = StyleBase(kind="tiny", files=tuple(files), folder=str(moved))
    assert fingerprint("x", 1, {"base": other}) == fingerprint("x", 1, {"base": base})


def test_damaged_base_is_one_line(tmp_path: Path) -> None:
    base, _ = saved_tiny_base(tmp_path)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"short")
    with pytest.raises(UserError, match=r"base model in .* cannot be loaded"):
        load_transformer(base, ROOT)


def test_embedded_base_is_small_and_of_the_documented_size() -> None:
    base = resolve_base(EmbeddedBase())
    assert spec_of(base, ROOT).image_size == 32
    assert sum(Path(file.path).stat().st_size for file in base.files) < 4_500_000
    assert sum(p.numel() for p in load_transformer(base, ROOT).parameters()) == 1_814_448
    measured = embedded_quality()
    assert measured["ratio"] == pytest.approx(measured["frechet"]["estimate"] / measured["floor"]["estimate"])
    assert measured["num_images"] == measured["num_real"] == 512


def test_caption_names_content_alone() -> None:
    assert caption("Guinea_Pig") == "a picture of a guinea pig"


def test_captions_end_with_the_empty_one_and_mask_what_is_padding() -> None:
    found = encode_captions(StyleBase(kind="tiny"), ROOT, ["a dog", "a picture of a dog"], CPU)
    assert found.mask_PT.sum(1).tolist() == [4, 7, 2]
    assert found.states_PTE.shape[::2] == (3, 384)


def test_missing_part_of_a_diffusers_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"base\.name .*: no such folder"):
        resolve_base(PixArtBase(name=str(tmp_path / "gone")))
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError, match="has no folder 'vae'"):
        resolve_base(PixArtBase(name=str(tmp_path)))


def pixart_folder(path: Path) -> PixArtAlphaPipeline:
    """A PixArt-alpha pipeline with tiny parts and a learned variance, as diffusers saves it."""
    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(("<pad>", "<unk>", "</s>", "a", "picture", "of", "dog", "house"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    pipeline = PixArtAlphaPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
        ),
        text_encoder=T5EncoderModel(T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
        vae=AutoencoderKL(
            block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=4, sample_size=16,
        ),
        transformer=PixArtTransformer2DModel(
            **XL | {"sample_size": 8, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
                    "cross_attention_dim": 16, "caption_channels": 16}
        ),
        scheduler=DDPMScheduler(beta_start=1e-4, beta_end=0.02),
    )  # fmt: skip
    pipeline.save_pretrained(path)
    return pipeline


def test_pixart_folder_encodes_samples_and_decodes_as_its_own_pipeline_would(tmp_path: Path) -> None:
    pipeline = pixart_folder(tmp_path)
    base = resolve_base(PixArtBase(name=str(tmp_path)))
    spec = spec_of(base, ROOT)
    assert (spec.size, spec.image_size, spec.channels) == (8, 16, 4)
    assert spec.process.prediction_type == "epsilon"
    captions = encode_captions(base, ROOT, ["a picture of a dog"], CPU)
    ids = pipeline.tokenizer(["a picture of a dog"], return_tensors="pt")["input_ids"]
    pipeline.text_encoder.eval()
    expected = pipeline.text_encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(captions.states_PTE[:1, : ids.shape[1]], expected, atol=1e-5, rtol=1e-5)
    codec = ImageCodec(base, ROOT, CPU)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    latents = pipeline.vae.encode(images / 127.5 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(codec.encode(images), latents, atol=1e-5, rtol=1e-4)
    stack = build_stack(base, ROOT, LoraSpec(), CPU, torch.float32)
    zeros = torch.zeros(1, stack.layout.num_parameters)
    sampling = ImageSamplingConfig(num_images=4, num_inference_steps=3, guidance_scale=4.5)
    x_1NCHW = sample_images(stack, spec, zeros, captions, sampling, 0, CPU, "", QUIET)
    assert x_1NCHW.shape == (1, 1, 4, 8, 8)
    assert codec.decode(x_1NCHW[0]).shape == (1, 3, 16, 16)
