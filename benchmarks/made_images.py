"""Pictures that are made up, as JPEGs; needs neither Ray nor the rest of epic-ray."""

import io

import numpy as np
from PIL import Image


def synthetic_jpeg(seed: int, size: tuple[int, int] = (500, 375)) -> bytes:
    """A picture with coarse and fine structure; at 500 x 375 of about the bytes of an ImageNet file."""
    rng, (width, height) = np.random.default_rng(seed), size
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
    pixels = pixels + rng.integers(-24, 24, (height, width, 1), np.int16)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
