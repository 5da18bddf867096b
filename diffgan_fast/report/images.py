"""Grids of images, and strips that show the same images at several noise levels."""

import math
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .. import files
from ..data import to_uint8

GAP = 2  # pixels between cells
GREY = 128  # of gaps, empty cells and labels: seen on black and on white
CELL = 64  # default upscaling: cells as large as fit into this many pixels
LABEL = 20  # height of a strip's row of labels


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be [N, C, H, W] with N >= 1 and C 1 or 3, not {list(images.shape)}")
    if not images.is_floating_point() or not torch.isfinite(images).all():
        raise ValueError(f"images must be finite floats in [-1, 1], not {images.dtype} or NaN or infinity")


def grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """One picture of all images, row by row, each pixel a square of scale x scale, 2 grey pixels between cells.

    Args:
        images: float ``[N, C, H, W]`` in [-1, 1] (values outside are clamped), C 1 or 3, N >= 1.
        columns: cells in a row; None makes the grid about square.
        scale: whole factor of enlargement; None fills cells of up to 64 pixels.

    Returns:
        an image of mode "L" (C = 1) or "RGB", ``columns·(W·scale + 2) - 2`` pixels wide; cells left over are grey.

    Raises:
        ValueError: images of another shape, type or with values that are not finite; columns or scale below 1.
    """
    _check(images)
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    scale = max(1, CELL // max(height, width)) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be 1 or more, not {columns} and {scale}")
    pixels = to_uint8(images.detach()).permute(0, 2, 3, 1).cpu().numpy()
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    down, right = height * scale + GAP, width * scale + GAP
    canvas = np.full((math.ceil(n / columns) * down - GAP, columns * right - GAP, channels), GREY, np.uint8)
    for i, cell in enumerate(pixels):
        top, left = i // columns * down, i % columns * right
        canvas[top : top + height * scale, left : left + width * scale] = cell
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def _save(picture: Image.Image, path) -> Path:
    buffer = BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return files.write(path, buffer.getvalue())


def save_grid(images: Tensor, path: str | os.PathLike, columns: int | None = None, scale: int | None = None) -> Path:
    """Write :func:`grid` to a PNG file, which appears whole or not at all; missing folders are made.

    Returns:
        the path.

    Raises:
        ValueError: as :func:`grid`.
    """
    return _save(grid(images, columns, scale), path)


def strip(sequence, path: str | os.PathLike, scale: int | None = None) -> Path:
    """Write a strip of the same images at several noise levels: a row for each image, a column for each level.

    Args:
        sequence: pairs (t, images), left to right; t is an int, or a str that is printed as it is; images are
            float ``[N, C, H, W]`` in [-1, 1], of one shape throughout.
        path: the PNG file, with labels on a transparent ground; it appears whole or not at all.
        scale: as for :func:`grid`.

    Returns:
        the path.

    Raises:
        ValueError: an empty sequence, images of several shapes, or as :func:`grid`.
    """
    levels, batches = zip(*sequence, strict=True) if sequence else ((), ())
    if len({tuple(images.shape) for images in batches}) != 1:
        raise ValueError(f"strip needs images of one shape, not {[list(images.shape) for images in batches]}")
    for images in batches:
        _check(images)
    picture = grid(torch.stack(batches, 1).flatten(0, 1), columns=len(batches), scale=scale)
    canvas = Image.new("RGBA", (picture.width, picture.height + LABEL))
    canvas.paste(picture, (0, LABEL))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    cell = (picture.width + GAP) / len(batches)
    for i, level in enumerate(levels):
        text = level if isinstance(level, str) else f"t = {level}"
        draw.text((i * cell + (cell - GAP) / 2, LABEL / 2), text, (GREY, GREY, GREY, 255), font, anchor="mm")
    return _save(canvas, path)
