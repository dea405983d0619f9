"""The parameter autoencoder (Sec. 3.2, Eq. 6-7): LoRA vectors to latents and back.

A vector is cut into L slices; each slice has its own linear map to C channels, 1-D convolutions with a residual
connection follow, and the decoder mirrors this. The slices' maps start from a principal component analysis of the
slice (between tasks and within tasks apart, see `_slice_basis`), so training starts where a linear method ends:
started at random, the same network learns the tasks' means and nothing of what varies inside a task.
`identity` is the row "without autoencoder": the vector itself, reshaped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, TypeAdapter
from torch import nn

from cpdiff_core.artifacts import ResumeState, read_json, read_tensors, write_json, write_tensors
from cpdiff_core.config import Config, RuntimeConfig, UserError
from cpdiff_core.generator.layers import PositionLinear, ResidualConv
from cpdiff_core.generator.training import TrainingConfig, train

_ROWS = 256
"""Vectors encoded or decoded at once outside training."""
_RESIDENT_BYTES = 16 * 2**30
"""Larger harvests stay on the CPU while training and send only the batch to the device."""


class ConvAutoencoderConfig(Config):
    """The 1-D CNN autoencoder of Eq. 6-7."""

    kind: Literal["conv"] = "conv"
    channels: int = Field(
        32, ge=1, description="Latent channels C (ours: 16 components inside tasks and the means of up to 17 tasks)."
    )
    length: int = Field(16, ge=1, description="Latent length L: the vector is cut into so many slices (ours).")
    num_blocks: int = Field(1, ge=0, description="Residual convolution blocks on either side (ours).")
    latent_noise_std: float = Field(0.001, ge=0, description="Noise on the latent (paper 0.001; released code 0.1).")
    input_noise_std: float = Field(0.0, ge=0, description="Noise on the input (paper none; released code 0.001).")
    max_parameters: int = Field(
        600_000_000, ge=1, description="C shrinks so that the slices' maps, 2 K C numbers, stay below this (ours)."
    )
    training: TrainingConfig = Field(
        TrainingConfig(steps=300, batch_size=64, learning_rate=1e-4), description="Optimisation (ours)."
    )


class IdentityAutoencoderConfig(Config):
    """No autoencoder: diffusion on the vector itself, reshaped to C x L and standardised."""

    kind: Literal["identity"] = "identity"
    length: int = Field(16, ge=1, description="Length L of the reshaped vector; C is K / L rounded up (ours).")


AutoencoderConfig = Annotated[ConvAutoencoderConfig | IdentityAutoencoderConfig, Field(discriminator="kind")]


class ParameterAutoencoder(nn.Module):
    """Encoder and decoder between normalised vectors w_BK and latents z_BCL of unit variance."""

    def __init__(self, config: ConvAutoencoderConfig | IdentityAutoencoderConfig, num_parameters: int) -> None:
        super().__init__()
        self.config = config
        self.num_parameters = num_parameters
        self.length = config.length
        self.slice_size = -(-num_parameters // config.length)
        padded = self.length * self.slice_size
        self.channels = self.slice_size
        if config.kind == "conv":
            self.channels = max(1, min(config.channels, self.slice_size, config.max_parameters // (2 * padded)))
            self.into = PositionLinear(self.length, self.slice_size, self.channels)
            self.out_of = PositionLinear(self.length, self.channels, self.slice_size)
            blocks = [ResidualConv(self.channels, self.length) for _ in range(2 * config.num_blocks)]
            self.encoder_blocks = nn.Sequential(*blocks[: config.num_blocks])
            self.decoder_blocks = nn.Sequential(*blocks[config.num_blocks :])
        self.register_buffer("center_K", torch.zeros(padded))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("latent_mean_CL", torch.zeros(self.channels, self.length))
        self.register_buffer("latent_std_CL", torch.ones(self.channels, self.length))

    center_K: torch.Tensor
    scale: torch.Tensor
    latent_mean_CL: torch.Tensor
    latent_std_CL: torch.Tensor

    def encoder(self, w_BK: torch.Tensor) -> torch.Tensor:
        """Eq. 6a, differentiable: w_BK -> z_BCL."""
        x_BLP = self._slices(w_BK)
        h_BCL = (self.into(x_BLP) if self.config.kind == "conv" else x_BLP).transpose(1, 2)
        if self.config.kind == "conv":
            h_BCL = self.encoder_blocks(h_BCL)
        return (h_BCL - self.latent_mean_CL) / self.latent_std_CL

    def decoder(self, z_BCL: torch.Tensor) -> torch.Tensor:
        """Eq. 6b, differentiable: z_BCL -> w_BK."""
        h_BCL = z_BCL * self.latent_std_CL + self.latent_mean_CL
        if self.config.kind == "conv":
            h_BCL = self.decoder_blocks(h_BCL)
        h_BLC = h_BCL.transpose(1, 2)
        x_BLP = self.out_of(h_BLC) if self.config.kind == "conv" else h_BLC
        return (x_BLP.flatten(1).float() * self.scale + self.center_K)[:, : self.num_parameters]

    @torch.no_grad()
    def encode(self, w_BK: torch.Tensor) -> torch.Tensor:
        """Latents of vectors (Eq. 6a), on the autoencoder's device.

        w_BK: vectors in normalised units, on any device. Returns z_BCL, of zero mean and unit variance over the
        vectors that the autoencoder was fitted on. Raises ValueError for another K.
        """
        if w_BK.shape[1:] != (self.num_parameters,):
            expected = self.num_parameters
            raise ValueError(f"vectors {tuple(w_BK.shape)}: this autoencoder is for K = {expected}; fit it anew")
        return torch.cat([self.encoder(part.to(self.scale.device)) for part in w_BK.split(_ROWS)])

    @torch.no_grad()
    def decode(self, z_BCL: torch.Tensor) -> torch.Tensor:
        """Vectors of latents (Eq. 6b), on the autoencoder's device.

        Returns w_BK in *normalised* units; `Normalizer.invert` gives weights. Raises ValueError for another C or L.
        """
        if z_BCL.shape[1:] != (self.channels, self.length):
            expected = (self.channels, self.length)
            raise ValueError(f"latents {tuple(z_BCL.shape)}: this autoencoder is for C x L = {expected}; fit it anew")
        return torch.cat([self.decoder(part.to(self.scale.device)) for part in z_BCL.split(_ROWS)])

    def save(self, folder: Path) -> None:
        """Write `autoencoder.safetensors` and `autoencoder.json`."""
        write_tensors(folder / "autoencoder.safetensors", self.state_dict())
        value = {"config": self.config.model_dump(mode="json"), "num_parameters": self.num_parameters}
        write_json(folder / "autoencoder.json", value)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> ParameterAutoencoder:
        """Read what `save` wrote in a sealed artifact. Raises UserError for a damaged file."""
        value = read_json(folder, "autoencoder.json")
        config = TypeAdapter(AutoencoderConfig).validate_python(value["config"])
        with torch.device("meta"):
            model = cls(config, value["num_parameters"])
        model.load_state_dict(read_tensors(folder, "autoencoder.safetensors", device), assign=True)
        return model.eval().requires_grad_(False)

    def _slices(self, w_BK: torch.Tensor) -> torch.Tensor:
        """Centred, scaled, padded with zeros and cut: [B, K] -> [B, L, P]."""
        padded = F.pad(w_BK, (0, self.center_K.numel() - self.num_parameters))
        return ((padded - self.center_K) / self.scale).unflatten(1, (self.length, self.slice_size))


def fit_autoencoder(
    config: ConvAutoencoderConfig | IdentityAutoencoderConfig,
    w_VK: torch.Tensor,
    task_V: torch.Tensor,
    *,
    seed: int,
    device: torch.device | str,
    runtime: RuntimeConfig,
    resume: ResumeState | None = None,
) -> tuple[ParameterAutoencoder, torch.Tensor]:
    """Fit on the vectors of all tasks together (Eq. 7). Returns the model and its loss at every step.

    w_VK: normalised vectors of all tasks; task_V: index of the task of each. The loss is the mean squared error in
    normalised units; `identity` has none. Raises UserError for no vectors, or for a loss that is not finite.
    """
    if w_VK.ndim != 2 or len(w_VK) == 0 or len(w_VK) != len(task_V):
        raise UserError(f"harvest of shape {tuple(w_VK.shape)} with {len(task_V)} task indices: give one per vector")
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ParameterAutoencoder(config, w_VK.shape[1])
    model.to(device)
    if w_VK.numel() * w_VK.element_size() <= _RESIDENT_BYTES:
        w_VK = w_VK.to(device)
    w_VK, task_V = w_VK.float(), task_V.to(w_VK.device)
    _center_and_scale(model, w_VK)
    losses = torch.zeros(0)
    if config.kind == "conv":
        _start_from_components(model, w_VK, task_V)
        loss_of, draw = _reconstruction(model, config, w_VK, device)
        options = {"seed": seed, "device": device, "runtime": runtime, "resume": resume}
        losses = train("autoencoder", model, loss_of, draw, config.training, **options)  # type: ignore[arg-type]
        losses = losses * float(model.scale) ** 2
    _standardise(model, w_VK)
    return model.eval().requires_grad_(False), losses


def _reconstruction(
    model: ParameterAutoencoder, config: ConvAutoencoderConfig, w_VK: torch.Tensor, device: torch.device
) -> tuple[Callable[..., torch.Tensor], Callable[[torch.Generator], tuple[torch.Tensor, ...]]]:
    """Eq. 7 in units of `model.scale`, and the draws it needs."""
    size = config.training.batch_size

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        rows_B = torch.randint(len(w_VK), (size,), generator=generator, device=device)
        w_BK = w_VK[rows_B.to(w_VK.device)].to(device)
        noise_BCL = torch.randn(size, model.channels, model.length, generator=generator, device=device)
        if config.input_noise_std == 0:
            return w_BK, noise_BCL
        return w_BK, noise_BCL, torch.randn(w_BK.shape, generator=generator, device=device)

    def loss_of(w_BK: torch.Tensor, noise_BCL: torch.Tensor, noise_BK: torch.Tensor | None = None) -> torch.Tensor:
        noisy_BK = w_BK if noise_BK is None else w_BK + config.input_noise_std * noise_BK
        z_BCL = model.encoder(noisy_BK) + config.latent_noise_std * noise_BCL
        return F.mse_loss(model.decoder(z_BCL) / model.scale, w_BK / model.scale)

    return loss_of, draw


@torch.no_grad()
def _center_and_scale(model: ParameterAutoencoder, w_VK: torch.Tensor) -> None:
    """Centre every coordinate and bring the whole to unit mean square, whatever the normalisation left."""
    model.center_K[: model.num_parameters] = w_VK.mean(0, dtype=torch.float64)
    square = sum(float(model._slices(part.to(model.scale.device)).square().sum()) for part in w_VK.split(_ROWS))
    scale = (square / w_VK.numel()) ** 0.5
    model.scale.fill_(scale if scale > 0 else 1.0)


@torch.no_grad()
def _start_from_components(model: ParameterAutoencoder, w_VK: torch.Tensor, task_V: torch.Tensor) -> None:
    """Set the first and last layer to each slice's components, with unit variance and in one common basis.

    Each slice's own components are turned (an orthogonal Procrustes problem) towards the components of the whole
    vector, so that a channel means the same at every position: a convolution presumes that, and without it the
    diffusion model draws every slice by itself and loses how slices move together.
    """
    rows = _at_most_per_task(task_V, total=600)  # the cost of the components grows with its cube
    x_VLP = torch.cat([model._slices(part.to(model.scale.device)) for part in w_VK[rows].split(_ROWS)])
    _, group_V = task_V[rows].to(x_VLP.device).unique(return_inverse=True)
    common_VC = _common_scores(x_VLP, group_V, model.channels)
    for layer in (model.into, model.out_of):
        layer.weight.zero_()
        layer.bias.zero_()
    for position in range(model.length):
        x_VP = x_VLP[:, position].double()
        basis_PC = _slice_basis(x_VP, group_V, model.channels)
        if basis_PC.shape[1] == 0:
            continue  # nothing varies here: the weights stay 0
        z_VC = x_VP @ basis_PC
        std_C = z_VC.std(0, correction=0)
        z_VC = F.pad(z_VC / std_C, (0, model.channels - len(std_C)))
        left, _, right = torch.linalg.svd(z_VC.T @ common_VC)
        turn_CC = (left @ right)[: len(std_C)]
        model.into.weight[position] = (basis_PC / std_C @ turn_CC).float()
        model.out_of.weight[position] = (basis_PC * std_C @ turn_CC).T.float()


def _common_scores(x_VLP: torch.Tensor, group_V: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Scores of the whole vectors on their own components, between tasks and then inside tasks, [V, C].

    Computed from the V x V matrix of inner products, which is all that fits for long vectors.
    """
    inner_VV = torch.zeros(len(x_VLP), len(x_VLP), dtype=torch.float64, device=x_VLP.device)
    for position in range(x_VLP.shape[1]):
        x_VP = x_VLP[:, position].double()
        inner_VV += x_VP @ x_VP.T
    same_VV = (group_V.unsqueeze(0) == group_V.unsqueeze(1)).double()
    means_VV = same_VV / same_VV.sum(1, keepdim=True)  # applied to vectors, replaces each by the mean of its task
    rest_VV = torch.eye(len(means_VV), dtype=torch.float64, device=means_VV.device) - means_VV
    scores: list[torch.Tensor] = []
    for operator_VV, count in ((means_VV, max(1, num_channels // 2)), (rest_VV, num_channels)):
        value, vector = torch.linalg.eigh(operator_VV @ inner_VV @ operator_VV)
        order = value.argsort(descending=True)[: min(count, num_channels - sum(part.shape[1] for part in scores))]
        scores.append(vector[:, order[value[order] > 1e-12 * inner_VV.trace()]])
    score_VC = torch.cat(scores, 1)
    return F.pad(score_VC, (0, num_channels - score_VC.shape[1]))


def _slice_basis(x_VP: torch.Tensor, group_V: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Orthonormal directions of one slice: the tasks' means first, then the principal components inside tasks.

    Components of the pooled vectors alone would go to the differences between tasks, which are hundreds of times
    larger than the variance inside a task. Returns at most `num_channels` columns, [P, <=C].
    """
    num_groups = int(group_V.max()) + 1
    member_GV = F.one_hot(group_V, num_groups).T.to(x_VP.dtype)
    mean_GP = member_GV @ x_VP / member_GV.sum(1, keepdim=True)
    largest = x_VP.square().sum().sqrt()
    between_PC = _principal(mean_GP - mean_GP.mean(0), max(1, num_channels // 2), largest)
    within_VP = x_VP - mean_GP[group_V]
    within_VP = within_VP - within_VP @ between_PC @ between_PC.T
    return torch.cat([between_PC, _principal(within_VP, num_channels - between_PC.shape[1], largest)], 1)


def _principal(x_VP: torch.Tensor, count: int, largest: torch.Tensor) -> torch.Tensor:
    """The first `count` principal directions that stand above float32's rounding, [P, <=count]."""
    if x_VP.shape[0] <= x_VP.shape[1]:
        value, vector = torch.linalg.eigh(x_VP @ x_VP.T)
        direction_PC = x_VP.T @ vector
    else:
        value, direction_PC = torch.linalg.eigh(x_VP.T @ x_VP)
    order = value.argsort(descending=True)[:count]
    kept = order[value[order].clamp_min(0).sqrt() > 1e-6 * largest]
    return F.normalize(direction_PC[:, kept], dim=0)


def _at_most_per_task(task_V: torch.Tensor, total: int) -> torch.Tensor:
    """Indices of at most about `total` vectors, spread evenly over every task's own."""
    tasks = task_V.unique()
    share = max(2, total // len(tasks))
    chosen = []
    for task in tasks:
        own = (task_V == task).nonzero().squeeze(1)
        pick = torch.linspace(0, len(own) - 1, min(share, len(own)), device=own.device).round().long()
        chosen.append(own[pick])
    return torch.cat(chosen)


@torch.no_grad()
def _standardise(model: ParameterAutoencoder, w_VK: torch.Tensor) -> None:
    """Give the latents of the fitted vectors zero mean and unit variance, coordinate by coordinate."""
    z_VCL = model.encode(w_VK)
    mean_CL, std_CL = z_VCL.mean(0), z_VCL.std(0, correction=0)
    # A channel without variance (fewer vectors than channels) stays at zero; its rounding is not blown up.
    flat = std_CL <= 1e-3 * std_CL.square().mean().sqrt()
    model.latent_mean_CL.copy_(mean_CL)
    model.latent_std_CL.copy_(torch.where(flat, torch.ones_like(std_CL), std_CL))


def within_task_variance_explained(w_VK: torch.Tensor, reconstruction_VK: torch.Tensor, task_V: torch.Tensor) -> float:
    """Share of the variance inside tasks that a reconstruction keeps: 1 - |w - w'|^2 / |w - mean of its task|^2.

    An error in a task's mean counts too, so a decoder of task means has 0 and a worse one is negative. Tasks whose
    vectors do not vary (N = 1) add to neither sum; 1.0 if none varies.
    """
    error = variance = 0.0
    for task in task_V.unique():
        own = task_V == task
        w_NK = w_VK[own].double()
        spread = float((w_NK - w_NK.mean(0)).square().sum())
        if spread > 0:
            variance += spread
            error += float((w_NK - reconstruction_VK[own].double()).square().sum())
    return 1.0 - error / variance if variance > 0 else 1.0


def pca_within_task_variance_explained(w_VK: torch.Tensor, task_V: torch.Tensor, num_components: int = 16) -> float:
    """The same figure for a PCA of `num_components` on the pooled vectors: the reference an autoencoder must reach."""
    x_VK = (w_VK - w_VK.mean(0)).double()
    value, vector = torch.linalg.eigh(x_VK @ x_VK.T)
    left_VC = vector[:, value.argsort(descending=True)[:num_components]]
    return within_task_variance_explained(x_VK, left_VC @ (left_VC.T @ x_VK), task_V)
