"""What is laid over a photo: a channel's activation as heat, and the outline of its peak cell."""

from collections.abc import Sequence
from functools import lru_cache

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

STRONGEST_ALPHA = 0.62


def heat_overlay(
    image: Image.Image, heat: np.ndarray, grid_box_xyxy_px: tuple[float, float, float, float]
) -> Image.Image:
    """The image with `heat` (H, W) laid over `grid_box_xyxy_px` (pixels of this image; it may reach outside).

    Smoothed bilinearly between cell centres, coloured from 0 to the map's own maximum (inferno), the more opaque the
    stronger; nothing where the heat is 0 or below. Raises ValueError for a heat that is no finite (H, W) map, or a box
    without area.
    """
    if heat.ndim != 2 or heat.size == 0 or not np.isfinite(heat).all():
        raise ValueError(f"heat must be a finite (H, W) map, not of shape {heat.shape}")
    check_box(grid_box_xyxy_px)
    x0, y0, x1, y1 = grid_box_xyxy_px
    positive = np.clip(heat, 0, None).astype(np.float64)
    relative = (positive / max(positive.max(), np.finfo(np.float64).tiny)).astype(np.float32)
    across = _bilinear_weights(image.width, x0, x1, heat.shape[1])
    down = _bilinear_weights(image.height, y0, y1, heat.shape[0])
    strength = down @ relative @ across.T
    alpha = STRONGEST_ALPHA * strength[:, :, None] ** 1.3  # weak activation leaves the photo nearly as it is
    # from a quarter of the scale upwards: its near-black start would read as shadow, not as weak activation
    colour = colour_table()[np.rint((0.25 + 0.75 * strength) * 255).astype(np.uint8)]
    mixed = np.asarray(image.convert("RGB")) * (1 - alpha) + colour * alpha
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def outline(image: Image.Image, box_xyxy_px: tuple[float, float, float, float], width_px: int = 3) -> Image.Image:
    """The image with a light stroke between dark ones just outside the box; at the image's edge, just inside it."""
    check_box(box_xyxy_px)
    framed = image.convert("RGB") if image.mode != "RGB" else image.copy()
    draw = ImageDraw.Draw(framed)
    x0, y0, x1, y1 = (round(edge) for edge in box_xyxy_px)
    # moved inwards where the strokes would fall outside the picture
    x0, y0 = min(max(x0, width_px), image.width - 1), min(max(y0, width_px), image.height - 1)
    x1, y1 = max(min(x1, image.width - width_px), x0), max(min(y1, image.height - width_px), y0)
    for offset in range(width_px):
        light = 0 < offset < width_px - 1
        grown = (x0 - 1 - offset, y0 - 1 - offset, x1 + offset, y1 + offset)
        draw.rectangle(grown, outline="#ffffff" if light else "#000000")
    return framed


def check_box(box_xyxy_px: Sequence[float]) -> None:
    """Raises ValueError for a box that is not finite or has no area."""
    x0, y0, x1, y1 = box_xyxy_px
    if not (np.isfinite(box_xyxy_px).all() and x0 < x1 and y0 < y1):
        raise ValueError(f"a box is (x0, y0, x1, y1) in pixels with x0 < x1 and y0 < y1, not {box_xyxy_px}")


def _bilinear_weights(pixels: int, start: float, stop: float, cells: int) -> np.ndarray:
    """(pixels, cells): each pixel's weights of the two nearest cell centres; 0 for pixels outside start..stop."""
    centres = np.arange(pixels) + 0.5
    position = np.clip((centres - start) / (stop - start) * cells - 0.5, 0, cells - 1)
    weights = np.clip(1 - np.abs(position[:, None] - np.arange(cells)), 0, None)
    return (weights * ((centres >= start) & (centres <= stop))[:, None]).astype(np.float32)


@lru_cache
def colour_table() -> np.ndarray:
    """(256, 3): the colours of the heat, weak to strong, in 0..255. From inferno, perceptually even."""
    return (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.float32)
