"""A style as the base and the generator take it: encoded images and captions, and features of style images."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch

from cpdiff_core.artifacts import write_json, write_tensors
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.glue.stacks import device_of
from cpdiff_core.domains.style.base import Captions, ImageCodec, StyleBase, caption, encode_captions, spec_of
from cpdiff_core.domains.style.denoising import ENCODED_FILE
from cpdiff_core.domains.style.features import FeatureConfig, image_features
from cpdiff_core.domains.style.pretraining import caption_rows
from cpdiff_core.domains.style.sampling import draw_prompts
from cpdiff_core.domains.style.styles import ResolvedStyle, SplitName, StyleSplits, split_images
from cpdiff_core.generator.conditions import StyleImageCondition

CLASS_FILE = "classes.json"
FEATURE_FILE = "features.safetensors"
CONDITION_FILE = "condition.safetensors"
SPLITS: tuple[SplitName, ...] = ("train", "selection", "report")


def encode_style(
    out: Path, base: StyleBase, style: ResolvedStyle, splits: StyleSplits, root: Path, runtime: RuntimeConfig
) -> None:
    """Write the training images in the base's space and the captions of their classes, the empty one last."""
    device = device_of(runtime)
    spec = spec_of(base, root)
    images = split_images(style, splits, "train", spec.image_size)
    classes, caption_N = caption_rows(images)
    captions = encode_captions(base, root, [caption(name) for name in classes], device)
    encoded = ImageCodec(base, root, device).encode(images.images_NCHW)
    write_tensors(
        out / ENCODED_FILE,
        {"images": encoded, "caption_N": caption_N, "states_PTE": captions.states_PTE, "mask_PT": captions.mask_PT},
    )
    write_json(out / CLASS_FILE, {"classes": classes, "of_images": list(images.classes)})


def prompt_captions(tensors: dict[str, torch.Tensor], classes: dict[str, list[str]], num: int) -> tuple[list[str], Captions]:
    """`num` prompts in the style's own mix of classes, and their captions with the empty one last."""
    prompts = draw_prompts(classes["of_images"], num)
    rows = [classes["classes"].index(name) for name in prompts] + [len(classes["classes"])]
    return prompts, Captions(tensors["states_PTE"], tensors["mask_PT"]).rows(torch.tensor(rows))


def encode_features(
    out: Path, features: FeatureConfig, style: ResolvedStyle, splits: StyleSplits, size: int, runtime: RuntimeConfig
) -> None:
    """Write the features of the real images of every split, at the size that the base draws."""
    device = device_of(runtime)
    parts = {split: split_images(style, splits, split, size).images_NCHW for split in SPLITS}
    every = image_features(features, torch.cat(list(parts.values())), device, f"features of {style.name}", runtime)
    write_tensors(out / FEATURE_FILE, dict(zip(parts, every.split([len(part) for part in parts.values()]), strict=True)))


def style_condition(
    condition: StyleImageCondition, features: FeatureConfig, style: ResolvedStyle, splits: StyleSplits, size: int,
    seed: int, runtime: RuntimeConfig,
) -> tuple[torch.Tensor, torch.Tensor, int]:  # fmt: skip
    """(y_PE of training images, y_E of one held-out image, its row in the selection split).

    A style with fewer training images than `num_images` repeats some, so that all have P.
    """
    rng = np.random.default_rng([seed, zlib.crc32(style.name.encode()), 0x636F6E])
    train = split_images(style, splits, "train", size).images_NCHW
    held = split_images(style, splits, "selection", size).images_NCHW
    order = torch.from_numpy(rng.permutation(len(train))[: condition.num_images])
    row = int(rng.integers(len(held)))
    device, label = device_of(runtime), f"conditions of {style.name}"
    y_PE = image_features(features, train[order], device, label, runtime)
    y_1E = image_features(features, held[row : row + 1], device, label, runtime)
    return y_PE[torch.arange(condition.num_images) % len(order)], y_1E[0], row


def held_out_condition(
    features: FeatureConfig, style: ResolvedStyle, splits: StyleSplits, size: int, seed: int, runtime: RuntimeConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y_1E, image_1CHW) of one image of the selection split: all that a generator is shown of an unseen style."""
    held = split_images(style, splits, "selection", size).images_NCHW
    row = int(np.random.default_rng([seed, zlib.crc32(style.name.encode()), 0x6F6E65]).integers(len(held)))
    image_1CHW = held[row : row + 1]
    return image_features(features, image_1CHW, device_of(runtime), f"condition of {style.name}", runtime), image_1CHW
