"""A world's autoencoder: an `AutoencoderKL` whose encoder weights are computed in closed form and whose decoder is trained.

The encoder computes a principal component analysis of square patches, exactly, in the layers of an ordinary AutoencoderKL
(`Autoencoder.write_encoder`). That makes latents a fixed, known, linear function of the picture: the base, the hypernetworks and the
decoder can be trained at the same time, and a better decoder never requires a new base.

The resolution is halved level by level: the channels of 2 x 2 neighboring positions are concatenated, and the leading principal
components of the result are kept. A level that keeps all components needs no PCA.

Each latent channel is divided by the square root of its standard deviation (half-whitened): coarse structure stays stronger than fine
detail at every noise level, as in pictures, but fine detail isn't lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from hyperdreambooth.checkpoint import read_tensors, save_tensors


@dataclass(frozen=True)
class Components:
    """Latents = matrix @ patch - offset, where a patch is flattened in the order channel, row, column. `bases` are the principal
    components of each earlier level that keeps fewer numbers than it gets (see `Autoencoder.kept`), by level.
    """

    matrix: Tensor
    offset: Tensor
    bases: dict[int, Tensor]

    def save(self, file: Path) -> None:
        save_tensors(file, {"matrix": self.matrix, "offset": self.offset, **{f"basis.{k}": v for k, v in self.bases.items()}})

    @staticmethod
    def load(file: Path) -> Components:
        tensors, _ = read_tensors(file)
        bases = {int(name.removeprefix("basis.")): value for name, value in tensors.items() if name.startswith("basis.")}
        return Components(tensors["matrix"], tensors["offset"], bases)

    @property
    def side(self) -> int:
        """Side of a patch in pixels."""
        return round((self.matrix.shape[1] / 3) ** 0.5)

    def encode(self, pictures: Tensor) -> Tensor:
        """The written encoder's result as one matrix product: pictures (N, 3, H, W) -> latents (N, C, H / side, W / side)."""
        return F.conv2d(pictures, self.matrix.unflatten(1, (3, self.side, self.side)), -self.offset, stride=self.side)

    def linear_round_trip(self) -> Callable[[Tensor], Tensor]:
        """Pictures -> latents -> pictures by the pseudo-inverse: the linear reconstruction, without a decoder."""
        inverse = torch.linalg.pinv(self.matrix)

        def apply(pictures: Tensor) -> Tensor:
            latents = self.encode(pictures) + self.offset[:, None, None]
            patches = torch.einsum("pc,nchw->nphw", inverse, latents)
            return F.fold(patches.flatten(2), pictures.shape[-2:], self.side, stride=self.side)

        return apply


def _split(out: nn.Conv2d, matrix: Tensor) -> None:
    """Writes a stride-2 convolution over 2 x 2 positions: matrix (out, 4 * in), one block of columns per position in reading order."""
    out.weight.zero_()
    out.bias.zero_()  # type: ignore[union-attr]
    inputs = matrix.shape[1] // 4
    for block in range(4):
        out.weight[: len(matrix), :inputs, block // 2, block % 2] = matrix[:, block * inputs : (block + 1) * inputs]


@dataclass(frozen=True)
class Autoencoder:
    """The sizes of a world's autoencoder."""

    size: int
    """Side of a picture in pixels."""
    kept: tuple[int, ...]
    """How many numbers are kept of a patch with a side of 2, 4, 8 ... pixels; the last is the number of latent channels."""
    widths: tuple[int, ...]
    """Channels at each resolution, one entry more than `kept`."""
    groups: int = 8
    """Groups of each GroupNorm."""

    @property
    def channels(self) -> int:
        return self.kept[-1]

    @property
    def side(self) -> int:
        """Side of a patch in pixels."""
        return 1 << len(self.kept)

    def build(self) -> AutoencoderKL:
        """E.g. 64 x 64 x 3 pixels -> 8 x 8 x 32 latents."""
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * len(self.widths),
            up_block_types=("UpDecoderBlock2D",) * len(self.widths),
            block_out_channels=self.widths,
            layers_per_block=1,
            latent_channels=self.channels,
            norm_num_groups=self.groups,
            sample_size=self.size,
            scaling_factor=1.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=True,
        )

    def analysis(self, level: int, bases: dict[int, Tensor]) -> Tensor:
        """The matrix from a patch with a side of 2^level pixels to the numbers that level keeps: (kept, 3 * 4^level), orthonormal rows."""
        rows = torch.eye(3)
        for k in range(1, level + 1):
            half = 1 << (k - 1)
            placed = torch.zeros(4, len(rows), 3, 2, half, 2, half)
            for block in range(4):
                placed[block, :, :, block // 2, :, block % 2] = rows.unflatten(1, (3, half, half))
            rows = placed.flatten(2).flatten(0, 1)
            if k in bases:
                rows = bases[k] @ rows
        return rows

    def halved(self, level: int, bases: dict[int, Tensor]) -> Tensor:
        """The matrix from a patch of `level` to that level's input, the four quarters as the previous level keeps them:
        (4 * previous kept, 3 * 4^level).
        """
        return self.analysis(level, {k: v for k, v in bases.items() if k < level})

    def principal_components(self, batches: Callable[[], Iterable[Tensor]]) -> Components:
        """PCA of patches of pictures (N, 3, H, W); `batches()` is called once per level and yields all pictures each time.

        The last level's components are centered and scaled by 1 / sqrt(std); earlier bases are orthonormal.
        """
        bases: dict[int, Tensor] = {}
        last = len(self.kept)
        for level, kept in enumerate(self.kept, 1):
            whole = 4 * (3 if level == 1 else self.kept[level - 2])
            if kept == whole and level < last:
                continue
            side, rows = 1 << level, self.halved(level, bases).double()
            moment, mean, count = torch.zeros(len(rows), len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.float64), 0
            for pictures in batches():
                x = F.unfold(pictures, side, stride=side).mT.reshape(-1, 3 * side * side).double() @ rows.mT
                moment, mean, count = moment + x.mT @ x, mean + x.sum(0), count + len(x)
            moment, mean = moment / count, mean / count
            values, vectors = torch.linalg.eigh(moment - torch.outer(mean, mean) if level == last else moment)
            values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
            vectors = vectors * vectors[vectors.abs().argmax(0), torch.arange(kept)].sign()  # the same sign on every machine
            if level < last:
                bases[level] = vectors.mT.float()
        deviations = values.sqrt()
        scale = deviations.rsqrt() / deviations.sqrt().square().mean().sqrt()  # overall variance 1
        components = (vectors * scale).mT
        return Components((components @ rows).float(), (components @ mean).float(), bases)

    @torch.no_grad()
    def write_encoder(self, vae: AutoencoderKL, components: Components) -> None:
        """Writes `components` into the encoder: space-to-depth by strided convolutions, with all residual branches set to zero.

        The last GroupNorm and SiLU are made linear: constant channels of +-K in every group fix its variance (to one part in K^2), a
        zero channel carries the group's mean, which is subtracted again, and a bias of B keeps SiLU in the range where it is the identity.
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
        last = len(self.kept)
        for level in range(1, last):
            whole = 4 * (3 if level == 1 else self.kept[level - 2])
            _split(encoder.down_blocks[level - 1].downsamplers[0].conv, components.bases.get(level, torch.eye(whole)))
        down = encoder.down_blocks[last - 1].downsamplers[0].conv
        _split(down, components.matrix @ self.halved(last, components.bases).mT)
        down.bias[: self.channels] = -components.offset
        self._write_output(encoder)

    def _write_output(self, encoder: nn.Module) -> None:
        groups, width = encoder.conv_norm_out.num_groups, encoder.conv_norm_out.num_channels // encoder.conv_norm_out.num_groups
        data = self.channels // groups
        big, gain, lift = 512.0, 64.0, 32.0
        shortcut = encoder.down_blocks[-1].resnets[0].conv_shortcut
        shortcut.weight.zero_()
        encoder.conv_norm_out.weight.fill_(1.0)
        encoder.conv_norm_out.bias.fill_(lift)
        encoder.conv_out.weight.zero_()
        encoder.conv_out.bias.zero_()
        # of a group's spare channels, two stay 0 (the first of them carries the mean), the others are half +big, half -big
        spread = (width - data - 2) / width * big * big
        deviation = spread**0.5
        for group in range(groups):
            start = group * width
            for offset in range(data):
                channel = group * data + offset
                shortcut.weight[start + offset, channel] = 1
                encoder.conv_norm_out.weight[start + offset] = gain
                encoder.conv_out.weight[channel, start + offset, 1, 1] = deviation / gain
                encoder.conv_out.weight[channel, start + data, 1, 1] = -deviation / gain
            encoder.conv_norm_out.weight[start + data] = gain
            for spare in range(width - data - 2):
                shortcut.bias[start + data + 2 + spare] = big if spare % 2 else -big
        encoder.conv_out.bias[self.channels :] = -30.0  # log variance: samples of the latent distribution equal its mode


def reconstruction_losses(decoder: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Per picture, for a batch of latents and pictures: L1 and MSE, L1 of the image gradients (sharpness) and MSE at 1/8 size (colors)."""
    latents, target = (tensor.to(next(decoder.parameters()).device) for tensor in batch)
    error = decoder(latents) - target
    horizontal, vertical = error.diff(dim=-1), error.diff(dim=-2)
    small = F.avg_pool2d(error, 8)
    return (
        error.abs().flatten(1).mean(1)
        + 2 * error.square().flatten(1).mean(1)
        + 0.5 * (horizontal.abs().flatten(1).mean(1) + vertical.abs().flatten(1).mean(1))
        + 2 * small.square().flatten(1).mean(1)
    )
