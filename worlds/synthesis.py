"""The inverse of a world's encoder, written into the decoder of an ordinary `AutoencoderKL` as the initial weights of its training.

A decoder doubles the resolution by repeating every position as 2 x 2 copies and convolving, which by itself can't produce four
different patches: a copy must first know which of the four it is. Ramp channels along the rows and columns provide this; they are
made from the zeros that convolutions are padded with. A repeated ramp rises at every second position only, so its differences mark even
and odd positions. Every copy gets the data of all four patches: the first one, and the differences of the other three to it. The marks
switch unwanted differences off (SiLU far below zero) and let the right one through (far above zero, where SiLU is the identity), which
gives exactly the principal components' linear reconstruction. Two channels with large constants fix the variance that the norms
divide by, so that the norms act as constants.

The residual blocks that this construction doesn't need add zero at first and are trained (`trainable`); all other weights stay fixed.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .autoencoder import Autoencoder, Components

BIG, LIFT, SWITCH = 512.0, 32.0, 64.0
"""The value of the constant channels, a bias at which SiLU is the identity, and how far a difference is lowered to switch it off."""
PLUS, MINUS, ZERO, LEFT, RIGHT, TOP, BOTTOM = range(-7, 0)
"""The last seven channels at every resolution: two constants, a zero, and ramps that rise from each side."""
EVEN_X, ODD_X, EVEN_Y, ODD_Y = range(-11, -7)
"""The four channels before those, after each enlargement: switches, large at even or odd columns and rows."""
RAMPS = ((LEFT, (1, 0)), (RIGHT, (1, 2)), (TOP, (0, 1)), (BOTTOM, (2, 1)))
"""Each ramp with the tap (row, column) of a 3 x 3 kernel that reads the neighbor on the side where the ramp starts."""
OFF = ((ODD_Y, EVEN_X), (EVEN_Y, ODD_X), (EVEN_Y, EVEN_X))
"""The switches that turn off the second, third and fourth patch's difference to the first (patches in reading order)."""


def widths(kept: tuple[int, ...]) -> tuple[int, ...]:
    """The fewest channels that each resolution can have, finest first: for its data, the switches and the last seven channels."""
    levels = (3, *kept)
    return tuple(
        max(4 * levels[k - 1] + 11 if k else 0, 3 * levels[k] + 5 if k < len(kept) else 0, levels[k] + 7) for k in range(len(levels))
    )


def clear(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()


def linearize(norm: nn.GroupNorm, x: Tensor, ignored: tuple[int, ...]) -> Tensor:
    """Makes norm and SiLU together add `LIFT` and change nothing else, for inputs like x (`ignored` channels: 0); returns their output."""
    norm.weight.fill_(x.flatten(1).std(1, correction=0).mean().item())
    norm.bias.fill_(LIFT + x.mean().item())
    norm.weight[list(ignored)] = 0
    norm.bias[list(ignored)] = 0
    return nn.functional.silu(norm(x))


def write_ramps(resnet: nn.Module, x: Tensor, first: bool) -> None:
    """Makes each ramp rise over two more positions: the `first` block starts it from the padding, the second from the ramp so far."""
    clear(resnet)
    linearize(resnet.norm1, x, (PLUS, MINUS))
    for ramp, tap in RAMPS:
        if first:
            resnet.conv1.weight[ramp, ZERO, *tap] = 1 / LIFT
        else:
            resnet.conv1.weight[ramp, ramp, *tap] = 1
            resnet.conv1.weight[ramp, ZERO, *tap] = -1
        resnet.conv1.bias[ramp] = 1
        resnet.conv2.weight[ramp, ramp, *tap] = 1
        resnet.conv2.weight[ramp, ZERO, *tap] = -1
        resnet.conv2.bias[ramp] = 1
    resnet.conv1.bias[PLUS], resnet.conv1.bias[MINUS] = BIG, -BIG
    linearize(resnet.norm2, resnet.conv1(nn.functional.silu(resnet.norm1(x))), (PLUS, MINUS))


def write_enlargement(conv: nn.Conv2d, depth: int, children: Tensor, offset: Tensor) -> None:
    """Writes the convolution after an enlargement: the four patches in which `children` (4 * kept, channels) splits each one, as the
    first patch and three differences to it; the switches; and ramps of twice as many steps.

    Each enlargement halves the ramps' steps; `depth` is the number of earlier enlargements.
    """
    clear(conv)
    first = children[: len(children) // 4].repeat(4, 1)
    shift = offset[: len(children) // 4].repeat(4)
    first[: len(children) // 4] = 0
    shift[: len(children) // 4] = 0
    conv.weight[: len(children), : children.shape[1], 1, 1] = children - first
    conv.bias[: len(children)] = offset - shift  # type: ignore[operator]
    opposite = {LEFT: RIGHT, RIGHT: LEFT, TOP: BOTTOM, BOTTOM: TOP}
    switches = {LEFT: EVEN_X, RIGHT: ODD_X, TOP: EVEN_Y, BOTTOM: ODD_Y}
    for ramp, tap in RAMPS:
        # the residual blocks' ramps rise near one side only; a ramp minus its opposite, plus 7, rises everywhere and starts at 1
        parts = {ramp: 1.0, opposite[ramp]: -1.0, PLUS: 7 / BIG} if depth == 0 else {ramp: 1.0}
        for channel, weight in parts.items():
            conv.weight[ramp, channel, 1, 1] = weight / 2
            conv.weight[ramp, channel, *tap] = weight / 2
            conv.weight[switches[ramp], channel, 1, 1] = weight * SWITCH * 2**depth
            conv.weight[switches[ramp], channel, *tap] = -weight * SWITCH * 2**depth
    for constant in (PLUS, MINUS):
        conv.weight[constant, constant, 1, 1] = 1


def write_choice(resnet: nn.Module, kept: int, x: Tensor) -> None:
    """Writes the choice among the four patches: the first, plus that of the three differences which isn't switched off."""
    clear(resnet)
    linearize(resnet.norm1, x, (PLUS, MINUS))
    for patch, switches in enumerate(OFF):
        rows = slice(patch * kept, (patch + 1) * kept)
        carrier = 3 * kept + patch  # the same pre-activation without data, to be subtracted
        resnet.conv1.weight[rows, kept + patch * kept : 2 * kept + patch * kept, 1, 1] = torch.eye(kept)
        resnet.conv1.weight[rows, ZERO, 1, 1] = 1
        resnet.conv1.weight[carrier, ZERO, 1, 1] = 2
        for switch in switches:
            resnet.conv1.weight[rows, switch, 1, 1] = -1
            resnet.conv1.weight[carrier, switch, 1, 1] = -1
        resnet.conv2.weight[:kept, rows, 1, 1] = torch.eye(kept)
        resnet.conv2.weight[:kept, carrier, 1, 1] = -1
    plus, minus = 3 * kept + 3, 3 * kept + 4
    resnet.conv1.bias[plus], resnet.conv1.bias[minus] = BIG, -BIG
    linearize(resnet.norm2, resnet.conv1(nn.functional.silu(resnet.norm1(x))), (plus, minus))
    for channel in range(kept):
        resnet.conv_shortcut.weight[channel, channel] = 1
    for special in range(-7, 0):
        resnet.conv_shortcut.weight[special, special] = 1


def write_free(resnet: nn.Module, x: Tensor) -> None:
    """Writes a residual block that adds zero at first, and whose first norm scales every data channel to unit standard deviation."""
    clear(resnet.conv2)
    deviation = x.std((0, 2, 3))
    resnet.norm1.weight.copy_(x.flatten(1).std(1, correction=0).mean() / torch.where(deviation > 1e-3, deviation, 1.0))
    resnet.norm1.weight[-7:] = 0


def half_whitened(children: Tensor, offset: Tensor, x: Tensor) -> Tensor:
    """Factors (kept,) that half-whiten the patches' channels, 1 / sqrt(std), measured on x (N, C, h, w), the input of `children`."""
    found = torch.einsum("kc,nchw->nkhw", children, x[:, : children.shape[1]]) + offset[:, None, None]
    return found.unflatten(1, (4, -1)).std((0, 1, 3, 4)).rsqrt()


@torch.no_grad()
def write_decoder(autoencoder: Autoencoder, vae: AutoencoderKL, components: Components, latents: Tensor) -> None:
    """Writes the reconstruction by `components` into the decoder; `latents` (N, C, h, w) of some pictures serve to measure scales.

    Each resolution's data channels are half-whitened, as latents are: otherwise a training step would be too large for fine detail.
    """
    decoder, last, levels = vae.decoder, len(autoencoder.kept), (3, *autoencoder.kept)
    clear(decoder.conv_in)
    for channel in range(autoencoder.channels):
        decoder.conv_in.weight[channel, channel, 1, 1] = 1
    decoder.conv_in.bias[PLUS], decoder.conv_in.bias[MINUS] = BIG, -BIG
    x = decoder.conv_in(latents)
    clear(decoder.mid_block.attentions[0].to_out[0])
    for index, resnet in enumerate(decoder.mid_block.resnets):
        write_ramps(resnet, x, first=index == 0)
        x = resnet(x, None)
    scale = torch.ones(autoencoder.channels)
    for depth, block in enumerate(decoder.up_blocks):
        level = last - depth
        for index, resnet in enumerate(block.resnets):
            if depth and index == 0:
                write_choice(resnet, levels[level], x)
            else:
                write_free(resnet, x)
            x = resnet(x, None)
        if level:
            if depth:
                children = components.bases.get(level, torch.eye(4 * levels[level - 1])).mT / scale
                offset = torch.zeros(len(children))
            else:
                children = torch.linalg.pinv(components.matrix @ autoencoder.halved(last, components.bases).mT)
                offset = children @ components.offset
            scale = half_whitened(children, offset, x) if level > 1 else torch.ones(3)
            write_enlargement(block.upsamplers[0].conv, depth, scale.repeat(4)[:, None] * children, scale.repeat(4) * offset)
            x = block.upsamplers[0](x)
    linearize(decoder.conv_norm_out, x, (PLUS, MINUS))
    clear(decoder.conv_out)
    for color in range(3):
        decoder.conv_out.weight[color, color, 1, 1] = 1
        decoder.conv_out.weight[color, ZERO, 1, 1] = -1


def trainable(decoder: nn.Module) -> nn.Module:
    """Freezes the decoder except its free residual blocks, whose output doesn't change the ramps and constants; returns it."""
    decoder.requires_grad_(False)
    for depth, block in enumerate(decoder.up_blocks):
        for resnet in block.resnets[1:] if depth else block.resnets:
            resnet.requires_grad_(True)
            for parameter in resnet.conv2.parameters():
                mask = torch.ones_like(parameter)
                mask[-7:] = 0
                parameter.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))
    # on CPUs, torch crashes in the backward pass of a norm whose weight needs a gradient and whose input doesn't
    decoder.up_blocks[0].register_forward_pre_hook(lambda module, inputs: (inputs[0].requires_grad_(), *inputs[1:]))
    return decoder
