"""The toon base's autoencoder: an `AutoencoderKL` whose encoder is written down and whose decoder is learnt.

The encoder computes a principal component analysis of 8 x 8 pixel patches, exactly, in the layers of an ordinary
AutoencoderKL (`write_encoder`). That makes latents a fixed, known, linear function of the picture: the base, the
hypernetworks and the decoder can be trained at the same time, and a better decoder never asks for a new base.

Latents are scaled by the square root of their standard deviation (half-whitened): coarse structure stays stronger than
fine detail at every noise level, as in pictures, but fine detail isn't lost.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 32
PATCH = 8


def build() -> AutoencoderKL:
    """64 x 64 x 3 pixels -> 8 x 8 x 32 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 48, 96, 128),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )


def principal_components(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """PCA of 8 x 8 patches of pictures (N, 3, H, W): (components, offset), latents = components @ patch - offset.

    components (32, 192) with rows scaled by 1 / sqrt(std), offset (32,). A patch is ordered channel, row, column.
    """
    patches = F.unfold(pictures, PATCH, stride=PATCH).mT.reshape(-1, 3 * PATCH * PATCH).double()
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(centred))
    values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    vectors = vectors * vectors[vectors.abs().argmax(0), torch.arange(CHANNELS)].sign()  # a sign that every machine agrees on
    deviations = values.sqrt()
    scale = deviations.rsqrt() / deviations.sqrt().square().mean().sqrt()  # overall variance 1
    components = (vectors * scale).mT
    return components.float(), (components @ mean).float()


def _split(out: nn.Conv2d, into: dict[tuple[int, int], Tensor]) -> None:
    """Writes a stride-2 convolution that sees 2 x 2 pixels: a matrix (out, in) for each of the four."""
    out.weight.zero_()
    out.bias.zero_()  # type: ignore[union-attr]
    for (row, column), matrix in into.items():
        out.weight[: matrix.shape[0], : matrix.shape[1], row, column] = matrix


@torch.no_grad()
def write_encoder(vae: AutoencoderKL, components: Tensor, offset: Tensor) -> None:
    """Writes `components @ patch - offset` into the encoder: space-to-depth by strided convolutions, residual branches off.

    The last GroupNorm and SiLU are made linear: constants of +-K in every group fix its variance (to one part in K^2), one
    of them carries the group's mean, which is subtracted again, and a bias of B holds SiLU where it is the identity.
    """
    encoder = vae.encoder
    for module in encoder.modules():
        if hasattr(module, "conv1") and hasattr(module, "conv2"):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            if module.conv_shortcut is not None:
                module.conv_shortcut.weight.zero_()
                module.conv_shortcut.bias.zero_()
                for channel in range(module.conv_shortcut.in_channels):
                    module.conv_shortcut.weight[channel, channel] = 1
    attention = encoder.mid_block.attentions[0]
    attention.to_out[0].weight.zero_()
    attention.to_out[0].bias.zero_()
    encoder.conv_in.weight.zero_()
    encoder.conv_in.bias.zero_()
    for channel in range(3):
        encoder.conv_in.weight[channel, channel, 1, 1] = 1

    # space to depth: 3 -> 12 -> 48 channels; channel index of a pixel = ((row, column) of the block) * inputs + input
    for block, inputs in ((0, 3), (1, 12)):
        parts = {}
        for row in range(2):
            for column in range(2):
                place = torch.zeros(4 * inputs, inputs)
                first = (2 * row + column) * inputs
                place[first : first + inputs] = torch.eye(inputs)
                parts[row, column] = place
        _split(encoder.down_blocks[block].downsamplers[0].conv, parts)
    # the third one projects at once: of a patch's pixel (y, x), bit 2 selects the tap, bits 1 and 0 the channel
    weights = components.reshape(CHANNELS, 3, PATCH, PATCH)
    last = {}
    for row in range(2):
        for column in range(2):
            matrix = torch.zeros(CHANNELS, 48)
            for y in range(4):
                for x in range(4):
                    second, first = 2 * (y >> 1) + (x >> 1), 2 * (y & 1) + (x & 1)
                    matrix[:, second * 12 + first * 3 : second * 12 + first * 3 + 3] = weights[:, :, 4 * row + y, 4 * column + x]
            last[row, column] = matrix
    _split(encoder.down_blocks[2].downsamplers[0].conv, last)
    encoder.down_blocks[2].downsamplers[0].conv.bias[:CHANNELS] = -offset

    groups, width = encoder.conv_norm_out.num_groups, encoder.conv_norm_out.num_channels // encoder.conv_norm_out.num_groups
    data = CHANNELS // groups
    big, gain, lift = 512.0, 64.0, 32.0
    shortcut = encoder.down_blocks[3].resnets[0].conv_shortcut
    shortcut.weight.zero_()
    encoder.conv_norm_out.weight.fill_(1.0)
    encoder.conv_norm_out.bias.fill_(lift)
    encoder.conv_out.weight.zero_()
    encoder.conv_out.bias.zero_()
    # half of a group's spare channels are +big, half -big; two more stay 0, the first of them carries the mean
    spread = (width - data - 2) / width * big * big
    deviation = spread**0.5
    for group in range(groups):
        start = group * width
        for offset_ in range(data):
            channel = group * data + offset_
            shortcut.weight[start + offset_, channel] = 1
            encoder.conv_norm_out.weight[start + offset_] = gain
            encoder.conv_out.weight[channel, start + offset_, 1, 1] = deviation / gain
            encoder.conv_out.weight[channel, start + data, 1, 1] = -deviation / gain
        encoder.conv_norm_out.weight[start + data] = gain
        for spare in range(width - data - 2):
            shortcut.bias[start + data + 2 + spare] = big if spare % 2 else -big
    encoder.conv_out.bias[CHANNELS:] = -30.0  # log variance: the latent distribution is its mode


def reconstruction_losses(decoder: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """L1, L1 of the gradients (crispness) and MSE of a small copy (colors), of latents and pictures."""
    latents, target = batch
    error = decoder(latents) - target
    horizontal, vertical = error.diff(dim=-1), error.diff(dim=-2)
    small = F.avg_pool2d(error, 8)
    return (
        error.abs().flatten(1).mean(1)
        + 2 * error.square().flatten(1).mean(1)
        + 0.5 * (horizontal.abs().flatten(1).mean(1) + vertical.abs().flatten(1).mean(1))
        + 2 * small.square().flatten(1).mean(1)
    )


def encode(components: Tensor, offset: Tensor, pictures: Tensor) -> Tensor:
    """What the written encoder computes, as one matrix product: pictures (N, 3, H, W) -> latents (N, 32, H/8, W/8)."""
    return F.conv2d(pictures, components.reshape(CHANNELS, 3, PATCH, PATCH), -offset, stride=PATCH)
