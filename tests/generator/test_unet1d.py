"""What the U-Net must be able to see: its own time step, its condition and its position."""

import pytest
import torch

from cpdiff_core.generator.unet1d import UNet1d, UNetConfig

SMALL = UNetConfig(width=16, multipliers=(1, 2), time_width=16)


def network(config: UNetConfig = SMALL, channels: int = 5, length: int = 8) -> UNet1d:
    torch.manual_seed(0)
    unet = UNet1d(config, channels, length, 3)
    for parameter in unet.parameters():  # away from its zero start, as after training
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


def inputs(batch: int = 4, channels: int = 5, length: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x_BCL = torch.randn(batch, channels, length, generator=generator)
    return x_BCL, torch.tensor([3, 250, 600, 999])[:batch], torch.randn(batch, 3, generator=generator)


def test_prediction_starts_at_zero() -> None:
    assert torch.equal(UNet1d(SMALL, 5, 8, 3)(*inputs()), torch.zeros(4, 5, 8))


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2)])
@pytest.mark.parametrize("length", [1, 7, 8])
@pytest.mark.parametrize("blocks", [1, 2])
def test_shape_is_kept_for_any_length_and_depth(multipliers: tuple[int, ...], length: int, blocks: int) -> None:
    config = UNetConfig(width=16, multipliers=multipliers, blocks_per_level=blocks)
    assert network(config, length=length)(*inputs(length=length)).shape == (4, 5, length)


def test_each_sample_is_treated_by_itself_with_its_own_time_step() -> None:
    """The released code used the first sample's time step for the whole batch."""
    unet, (x_BCL, t_B, y_BD) = network(), inputs()
    alone = torch.cat([unet(x_BCL[i : i + 1], t_B[i : i + 1], y_BD[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(unet(x_BCL, t_B, y_BD), alone, atol=1e-5, rtol=1e-4)
    later = unet(x_BCL, t_B.roll(1), y_BD)
    assert float((later - alone).abs().amax(dim=(1, 2)).min()) > 1e-3


def test_condition_reaches_every_position_and_channel() -> None:
    unet, (x_BCL, t_B, y_BD) = network(), inputs()
    difference = unet(x_BCL, t_B, y_BD.roll(1, 0)) - unet(x_BCL, t_B, y_BD)
    assert float(difference.abs().amax(0).min()) > 1e-4


def test_positions_are_told_apart() -> None:
    """A plain convolution commutes with a shift away from the borders; this network must not."""
    unet, (x_BCL, t_B, y_BD) = network(length=32), inputs(length=32)
    shifted = unet(x_BCL.roll(4, 2), t_B, y_BD).roll(-4, 2)
    assert float((shifted - unet(x_BCL, t_B, y_BD))[:, :, 12:20].abs().max()) > 1e-2


def test_input_at_one_end_reaches_the_other_through_the_lower_levels() -> None:
    unet, (x_BCL, t_B, y_BD) = network(UNetConfig(width=16, multipliers=(1, 1, 1)), length=16), inputs(length=16)
    x_BCL.requires_grad_(True)
    unet(x_BCL, t_B, y_BD)[:, :, -1].sum().backward()
    assert x_BCL.grad is not None
    assert float(x_BCL.grad[:, :, 0].abs().max()) > 0
