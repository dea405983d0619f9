"""Between two styles, and on the way to one (Sec. 4.4): interpolation and sampling trajectories of generated styles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cpdiff_core.artifacts import read_json, read_tensors, write_json, write_tensors
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.glue.stacks import device_of
from cpdiff_core.domains.style.base import ImageCodec, spec_of
from cpdiff_core.domains.style.denoising import ENCODED_FILE
from cpdiff_core.domains.style.distances import frechet_distance
from cpdiff_core.domains.style.encoding import CLASS_FILE, FEATURE_FILE, prompt_captions
from cpdiff_core.domains.style.features import image_features
from cpdiff_core.domains.style.sampling import sample_images
from cpdiff_core.domains.style.stack import build_stack
from cpdiff_core.evaluation.geometry import embed
from cpdiff_core.evaluation.style_scores import SHOWN_IMAGES, StyleScoringConfig
from cpdiff_core.generator.autoencoder import ParameterAutoencoder
from cpdiff_core.generator.diffusion import LatentDiffusion, SamplingConfig
from cpdiff_core.generator.normalization import Normalizer
from cpdiff_core.lora.vectors import interpolate, min_l2, soup

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
INTERPOLATION_FILE, TRAJECTORY_FILE = "interpolation.json", "trajectory.safetensors"


def interpolated_weights(a_K: torch.Tensor, b_K: torch.Tensor) -> torch.Tensor:
    """(1 - lambda) theta_1 + lambda theta_2 for every lambda, w_LK; the ends are the two vectors, bit for bit."""
    return torch.stack([interpolate(a_K, b_K, lam) for lam in LAMBDAS])


@torch.no_grad()
def interpolated_conditions(
    diffusion: LatentDiffusion, autoencoder: ParameterAutoencoder, normalizer: Normalizer, styles: tuple[str, str],
    y_2E: torch.Tensor, sampling: SamplingConfig, seed: int,
) -> torch.Tensor:  # fmt: skip
    """The vector generated from (1 - lambda) y_1 + lambda y_2 for every lambda, with one fixed noise, w_LK.

    The statistics of the normalisation are interpolated as the condition is.
    """
    rows = []
    for lam in LAMBDAS:
        z_1CL = diffusion.sample(interpolate(y_2E[0], y_2E[1], lam)[None], 1, seed, sampling)[0]
        normalized_1K = autoencoder.decode(z_1CL).cpu()
        ends = [normalizer.invert(style, normalized_1K)[0] for style in styles]
        rows.append(interpolate(ends[0], ends[1], lam))
    return torch.stack(rows)


def score_interpolation(
    out: Path, first: StyleScoringConfig, second: StyleScoringConfig, w_LK_by_kind: dict[str, torch.Tensor], root: Path,
    runtime: RuntimeConfig,
) -> None:  # fmt: skip
    """Images of every vector for the first style's prompts, and their distance to the real images of both styles."""
    device = device_of(runtime)
    dtype = torch.bfloat16 if first.precision == "bf16" else torch.float32
    stack, spec = build_stack(first.base, root, first.lora, device, dtype), spec_of(first.base, root)
    codec = ImageCodec(first.base, root, device)
    encoded = read_tensors(first.encoded.under(root), ENCODED_FILE)
    classes = read_json(first.encoded.under(root), CLASS_FILE)
    _, captions = prompt_captions(encoded, classes, first.images.num_images)
    real = {
        config.style: read_tensors(config.real.under(root), FEATURE_FILE)["report"] for config in (first, second)
    }
    seed = 2 * first.images.seed + 1  # the noise of the report
    tensors, distances = {}, {}
    for kind, w_LK in w_LK_by_kind.items():
        label = f"interpolation of {kind}"
        x_LNCHW = sample_images(stack, spec, w_LK, captions, first.images, seed, device, f"sample {label}", runtime)
        images = codec.decode(x_LNCHW.flatten(0, 1))
        x_LND = image_features(first.features, images, device, f"features {label}", runtime).unflatten(
            0, x_LNCHW.shape[:2]
        )
        tensors[kind] = images.unflatten(0, x_LNCHW.shape[:2])[:, :SHOWN_IMAGES]
        distances[kind] = {style: [frechet_distance(x_ND, y) for x_ND in x_LND] for style, y in real.items()}
    write_tensors(out / "images.safetensors", tensors)
    value = {"lambdas": LAMBDAS, "num_images": first.images.num_images, "distance": distances}
    write_json(out / INTERPOLATION_FILE, value)


@torch.no_grad()
def trajectory_plane(
    diffusion: LatentDiffusion, autoencoder: ParameterAutoencoder, normalizer: Normalizer, style: str,
    w_NK: torch.Tensor, y_E: torch.Tensor, sampling: SamplingConfig, num: int, seed: int,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """t-SNE of `num` decoded trajectories with the originals and their soup, and distances to the nearest original.

    Returns `paths` [num, steps, 2], `originals` [n, 2], `soup` [1, 2], `t` [steps], `distance` [num, steps].
    """
    steps: list[int] = []
    decoded: list[torch.Tensor] = []

    def look(t: int, x_BMCL: torch.Tensor, z_BMCL: torch.Tensor) -> None:
        steps.append(t)
        decoded.append(normalizer.invert(style, autoencoder.decode(x_BMCL[0]).cpu()))

    final_MCL = diffusion.sample(y_E[None], num, seed, sampling, look)[0]
    steps.append(0)
    decoded.append(normalizer.invert(style, autoencoder.decode(final_MCL).cpu()))
    w_MTK = torch.stack(decoded, dim=1)
    distance_MT = min_l2(w_MTK.flatten(0, 1), w_NK).unflatten(0, w_MTK.shape[:2])
    # The soup goes last among the originals: `embed` keeps the first and the last of those it thins out.
    plane = embed({style: torch.cat([w_NK, soup(w_NK)])}, {style: w_MTK.flatten(0, 1)}, seed)
    fixed = torch.from_numpy(np.ascontiguousarray(plane[f"{style}/training"]))
    paths = torch.from_numpy(np.ascontiguousarray(plane[f"{style}/generated"])).unflatten(0, w_MTK.shape[:2])
    return {
        "paths": paths, "originals": fixed[:-1], "soup": fixed[-1:], "t": torch.tensor(steps), "distance": distance_MT,
    }  # fmt: skip
