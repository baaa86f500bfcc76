"""3x3 convolutions whose training is faster on processors with matrix units (AMX).

oneDNN, with which torch computes convolutions on a CPU, multiplies tiles of up to 16 pixels of a row, and sums the
gradient of the weights over up to 32 pixels of a row. In a row of 7 pixels most of a tile is empty, and the gradient of
the weights takes three to four times as long as the forward pass. Here several images are laid side by side, with
columns of zeros between them, so that rows are 64 pixels long. The results are the same up to rounding.

This module must not depend on data sets or on training.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cifar_core.processor import has_matrix_units

_ROW = 64
"""Pixels of a row of images side by side."""
_NARROW = 8
"""Images of up to this width are always laid side by side for the gradient of the weights."""
_WIDE = 15
_MANY_CHANNELS = 64
"""Images of up to the width `_WIDE` are laid side by side if inputs and outputs have at least this many channels. With
fewer, the copies take longer than what they save."""
_TINY = 5
"""Images of up to this width are laid side by side for the forward pass and the gradient of the input as well."""


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 with padding 1 and without bias: `nn.Conv2d`, trained faster where this pays.

    It pays with bfloat16 autocast on a CPU with matrix units, for small images. Otherwise, and in evaluation, this is
    exactly `nn.Conv2d`.

    Args:
        channels_in: channels of the input.
        channels: channels of the output.
    """

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self._pays(x):
            return _Convolution.apply(x.bfloat16(), self.weight.bfloat16())  # type: ignore[no-any-return]
        return super().forward(x)

    def _pays(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or not has_matrix_units():
            return False
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return False
        if x.dim() != 4 or self.bias is not None:  # a single image; batch normalisation fused into this layer
            return False
        width = x.shape[-1]
        return width <= _NARROW or (width <= _WIDE and min(self.in_channels, self.out_channels) >= _MANY_CHANNELS)


class _Convolution(torch.autograd.Function):
    """Input [N, C, H, W] and weights [K, C, 3, 3], both bfloat16, to [N, K, H, W]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401 (torch has no type for it)
        ctx.shape = x.shape
        if x.shape[-1] > _TINY:
            ctx.save_for_backward(x, weight)
            return nn.functional.conv2d(x, weight, padding=1)
        x = side_by_side(x)
        ctx.save_for_backward(x, weight)
        return apart(nn.functional.conv2d(x, weight, padding=1), ctx.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        rows, input_needed = side_by_side(gradient), ctx.needs_input_grad[0]
        if x.shape != ctx.shape:
            for_input, for_weight = _gradients(rows, x, weight, (input_needed, True))
            return (None if for_input is None else apart(for_input, ctx.shape)), for_weight
        for_input = _gradients(gradient, x, weight, (True, False))[0] if input_needed else None
        return for_input, _gradients(rows, side_by_side(x), weight, (False, True))[1]


def side_by_side(images: Tensor) -> Tensor:
    """Images in rows: [N, C, H, W] -> [R, C, H, M * (W + 1)] in channels-last format, M images in each of R rows.

    One column of zeros follows each image, and the last row is filled up with zeros. With padding 1, a 3x3 convolution
    of the rows is that of the images in all other columns.
    """
    count, channels, height, width = images.shape
    in_row = max(1, _ROW // (width + 1))
    full, rest = divmod(count, in_row)
    rows = images.new_empty(full + (rest > 0), height, in_row, width + 1, channels)
    rows[:, :, :, width:] = 0
    pixels = images.permute(0, 2, 3, 1)
    rows[:full, :, :, :width] = pixels[: full * in_row].view(full, in_row, height, width, channels).transpose(1, 2)
    if rest:
        rows[full, :, :rest, :width] = pixels[full * in_row :].transpose(0, 1)
        rows[full, :, rest:] = 0
    return rows.flatten(2, 3).permute(0, 3, 1, 2)


def apart(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `side_by_side`.

    Args:
        rows: [R, K, H, M * (W + 1)].
        shape: N, C, H and W of the images; the channels are those of the rows.
    """
    count, _, _, width = shape
    row_count, channels, height, row_width = rows.shape
    pixels = rows.permute(0, 2, 3, 1).view(row_count, height, row_width // (width + 1), width + 1, channels)
    return pixels[:, :, :, :width].transpose(1, 2).flatten(0, 1)[:count].permute(0, 3, 1, 2)


def _gradients(gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor]:
    """The gradients of input and weights; of the two, only those that are wanted are computed."""
    step, no_offset = [1, 1], [0, 0]
    for_input, for_weight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, step, step, step, False, no_offset, 1, [*wanted, False]
    )
    return for_input, for_weight
