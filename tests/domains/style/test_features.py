"""EfficientNet-Lite0 against timm, Inception against pytorch_fid, ResNet-18 against torchvision."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from pytorch_fid import inception as pytorch_fid
from safetensors.torch import save_file

from cpdiff_core.config import LocalFile, RuntimeConfig, UserError
from cpdiff_core.domains.style import features
from cpdiff_core.domains.style.efficientnet import SameConv2d, load_efficientnet_lite0
from cpdiff_core.domains.style.features import (
    EfficientNetLite0Features,
    InceptionFeatures,
    ResNet18Features,
    image_features,
    load_features,
)
from cpdiff_core.domains.style.styles import excerpt, load_images, resolve_style

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [96, 65])
def test_lite0_equals_timm_with_the_same_weights(size: int) -> None:
    ours = load_efficientnet_lite0()
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    named = dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True))
    assert all(a.rpartition(".")[2] == b.rpartition(".")[2] for a, b in zip(named, ours.state_dict(), strict=True))
    theirs.load_state_dict(named)
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_same_padding_puts_what_is_odd_at_the_end() -> None:
    conv = SameConv2d(1, 1, 3, stride=2)
    torch.nn.init.ones_(conv.weight)
    ones = torch.ones(1, 1, 4, 4)
    # Output 2 x 2 needs 5 input rows: none before, one after.
    assert conv(ones).tolist() == [[[[9.0, 6.0], [6.0, 4.0]]]]


def test_lite0_features_tell_photographs_of_classes_apart() -> None:
    images = load_images(resolve_style(excerpt("photo"), None), 32)
    rows = [i for i, name in enumerate(images.classes) if name in ("guitar", "person")][:80]
    x = image_features(
        EfficientNetLite0Features(), images.images_NCHW[rows], CPU, "", RuntimeConfig(progress=False)
    )
    person = torch.tensor([images.classes[i] == "person" for i in rows])
    nearest = (torch.cdist(x, x) + 1e9 * torch.eye(len(x))).argmin(1)
    assert (person[nearest] == person).float().mean() > 0.85


def test_inception_equals_pytorch_fid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = features.inception_architecture().state_dict()
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, str(path))
    weights = LocalFile.of(path)
    monkeypatch.setattr(features, "INCEPTION_SHA256", weights.sha256)
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: state)
    reference = pytorch_fid.InceptionV3([3]).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(x)[0].flatten(1)
        found = load_features(InceptionFeatures(weights=weights), CPU)(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_inception_with_other_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pt_inception.pth"
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"Inception of pytorch-fid: weights .* have sha256"):
        load_features(InceptionFeatures(weights=LocalFile.of(path)), CPU)


def test_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features, "INCEPTION_URL", "http://127.0.0.1:9/none.pth")
    with pytest.raises(UserError, match=r"cannot be fetched from http://127\.0\.0\.1:9/none\.pth .*efficientnet_lite0"):
        load_features(InceptionFeatures(), CPU)


def test_resnet18_equals_torchvision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = torchvision.models.resnet18(weights=None).eval()
    path = tmp_path / "resnet18.pth"
    torch.save(reference.state_dict(), path)
    image = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    reference.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = reference(normalise(image / 255))
    found = image_features(ResNet18Features(weights=LocalFile.of(path)), image, CPU, "", RuntimeConfig(progress=False))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
