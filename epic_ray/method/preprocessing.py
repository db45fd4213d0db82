"""From the bytes of an image file to what the model is fed, and from a cell of its grid back to the image.

Letters: N cells, H x W grid. Boxes are (x0, y0, x1, y1) in pixels of the upright original, edges inclusive to
exclusive, so that a box of width 1 covers one pixel. Sizes of images are (width, height), as Pillow has them; sizes
of resizes, crops and grids are (height, width), as tensors have them.
"""

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

# Formats that Pillow decodes by itself. Left out on purpose: EPS and WMF (they start other programs), TGA (has no
# signature, so that it takes arbitrary bytes for an image).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO", "ICO")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_ON_THEIR_SIDE = (5, 6, 7, 8)

MAX_PIXELS = 178_956_970
"""Largest image that is decoded, in pixels: the point where Pillow itself speaks of a decompression bomb."""

_SCALED_AT_ONCE = 1 << 18

RESIZE_MODES = ("short", "squash", "cover", "contain")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


class ImageError(Exception):
    """An image that cannot be used. The message is the one-line reason that a status row carries."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in `data`, RGB, 8 bits a channel, upright, first frame.

    Pixels equal `Image.open(...).convert("RGB")`, hence those of torchvision's ImageFolder, with two exceptions. The
    EXIF orientation is applied, which ImageFolder does not do, because a person sees the image upright and boxes are
    drawn on what a person sees. Gray values of more than 8 bits are scaled, where Pillow would clip them: 16-bit
    values by 255/65535, other integers and floats outside 0..1 from the image's own range. Alpha is dropped.

    Raises ImageError, with the reason, for an empty, truncated, unknown or damaged file, and for one of more than
    `max_pixels` pixels, which is told from its header; MemoryError where the memory does not suffice. No warning of
    Pillow's escapes.
    """
    return _decode(data, max_pixels, None).image


class _Decoded(NamedTuple):
    """An upright image; (width, height) of the file's own; and the part of it (x0, y0, x1, y1) that is the picture."""

    image: Image.Image
    size_px: tuple[int, int]
    part: tuple[float, float, float, float] | None


def _decode(data: bytes, max_pixels: int, enough: Callable[[tuple[int, int]], tuple[int, int]] | None) -> _Decoded:
    """`enough` gives, for the (width, height) of the upright original, those that suffice: a JPEG may then come out at
    1/2, 1/4 or 1/8 of its size, but no smaller, reduced while it is decoded."""
    if not data:
        raise ImageError("empty file")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        image = _open(data, max_pixels)
        try:
            reduced = _reduce(image, enough) if enough else None
            image.load()
            orientation = _orientation(image)  # Pillow turns some formats upright as it loads them
            upright = _to_rgb(_turn_upright(image, orientation))
            if reduced is None:
                return _Decoded(upright, upright.size, None)
            size_px, spare = reduced
            return _Decoded(upright, size_px, _part(upright.size, orientation, spare) if any(spare) else None)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # damaged files make the decoders raise nearly anything
            if "out of memory" in str(error).lower() or isinstance(error.__cause__, MemoryError):
                raise MemoryError(_one_line(error)) from error  # Pillow's decoders say it by other errors
            truncated = "truncated" in str(error) or isinstance(error, EOFError)
            state = "truncated" if truncated else "damaged"
            raise ImageError(f"{state} {image.format}: {_one_line(error)}") from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image: {len(data)} bytes that begin with {data[:12]!r}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"decompression bomb: {_one_line(error)}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"damaged header: {_one_line(error)}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"decompression bomb: {width} x {height} pixels, more than {max_pixels}")
    return image


def _reduce(
    image: Image.Image, enough: Callable[[tuple[int, int]], tuple[int, int]]
) -> tuple[tuple[int, int], tuple[float, float]] | None:
    """Has a JPEG decoded at a fraction of its size, if that is enough; does nothing to other formats, and gives None.

    Gives (width, height) of the upright original, and the pixels at the right and at the bottom of what will be
    decoded that lie beyond the picture: its size is rounded up.
    """
    on_its_side = _orientation(image) in _ON_THEIR_SIDE
    width, height = image.size
    size_px = (height, width) if on_its_side else (width, height)
    width, height = enough(size_px)
    drafted = image.draft(None, (height, width) if on_its_side else (width, height))
    if drafted is None:
        return None
    return size_px, (image.width - drafted[1][2], image.height - drafted[1][3])


def _part(size: tuple[int, int], orientation: int, spare: tuple[float, float]) -> tuple[float, float, float, float]:
    """The picture in an upright image of `size`, of which `spare` lay beyond it at the file's right and bottom."""
    right, bottom = spare
    left, top, right, bottom = {
        2: (right, 0.0, 0.0, bottom),
        3: (right, bottom, 0.0, 0.0),
        4: (0.0, bottom, right, 0.0),
        5: (0.0, 0.0, bottom, right),
        6: (bottom, 0.0, 0.0, right),
        7: (bottom, right, 0.0, 0.0),
        8: (0.0, right, bottom, 0.0),
    }.get(orientation, (0.0, 0.0, right, bottom))
    return left, top, size[0] - right, size[1] - bottom


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # unreadable EXIF: it says nothing about orientation, and the pixels are fine
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_scale_to_8_bits(np.asarray(image)))
    image.info.pop("transparency", None)  # no part of the pixels; Pillow warns of some forms and fails on others
    return image.convert("RGB")


def _scale_to_8_bits(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ImageError("not an image: its gray values are not all finite")
    low, high = float(values.min()), float(values.max())
    zero, full = 0.0, 65535.0 if np.issubdtype(values.dtype, np.integer) else 1.0
    if low < 0 or high > full:
        zero, full = low, (high - low) or 1.0
    flat = values.ravel()
    scaled = np.empty(flat.shape, np.uint8)
    for start in range(0, flat.size, _SCALED_AT_ONCE):  # in float64, a whole large image takes gigabytes
        part = slice(start, start + _SCALED_AT_ONCE)
        scaled[part] = np.rint((flat[part].astype(np.float64) - zero) * (255.0 / full))
    return scaled.reshape(values.shape)


def _one_line(error: Exception) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__


@dataclass(frozen=True)
class Preprocessing:
    """The resize, centre crop and normalisation that a classifier was trained for.

    `apply` equals, pixel by pixel, the evaluation transforms of torchvision and of timm on Pillow images. The two
    libraries share the crop; they round differently where timm does not use torchvision's own resize, hence
    `resize_mode`.
    """

    resize: int | tuple[int, int] | None
    """Pixels of the short side, or (height, width), or None for no resize."""
    crop: tuple[int, int]
    """(height, width) of the model's input; a smaller image is padded, evenly."""
    interpolation: str = "bilinear"
    """One of `INTERPOLATIONS`; antialiased, as Pillow does it."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from each channel, on the scale 0..1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divides each channel after that."""
    resize_mode: str = ""
    """What `resize` asks for; "" means "short" for a number and "squash" for a pair.

    "short": the short side becomes `resize`, the long side follows, rounded down (torchvision; timm, square inputs).
    "squash": exactly (height, width), whatever the shape of the image (timm's `squash`).
    "cover": the smallest size of the same shape that covers (height, width), rounded (timm, inputs not square).
    "contain": the largest size of the same shape within (height, width), rounded; padding in the mean colour
    (timm's `border`).
    """
    scaled_decode: bool = False
    """JPEGs of at least twice the resized size are reduced while they are decoded: faster, and other pixels. [ours]"""

    def __post_init__(self) -> None:
        if not self.resize_mode:
            object.__setattr__(self, "resize_mode", "squash" if isinstance(self.resize, tuple) else "short")
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode {self.resize_mode!r}; one of {', '.join(RESIZE_MODES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r}; one of {', '.join(INTERPOLATIONS)}")
        if self.resize is not None and isinstance(self.resize, tuple) == (self.resize_mode == "short"):
            raise ValueError(f"resize {self.resize!r} does not go with resize_mode {self.resize_mode!r}")
        resize = self.resize if isinstance(self.resize, tuple) else (1 if self.resize is None else self.resize,)
        if min(*self.crop, *resize) < 1:
            raise ValueError(f"resize {self.resize!r} and crop {self.crop!r} must be at least one pixel")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean!r}, std {self.std!r}: three numbers each, std above 0")

    def load(self, data: bytes) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
        """The model's input, before normalisation, of an encoded image, and (width, height) of the upright original.

        Raises ImageError and MemoryError as `decode_image` and `apply` do.
        """
        decoded = _decode(data, MAX_PIXELS, self._resized_size if self.scaled_decode else None)
        return self._fit(*decoded), decoded.size_px

    def apply(self, image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
        """The model's input, before normalisation, of an upright RGB image.

        Raises ImageError for an image so elongated that its resized form would pass `MAX_PIXELS`.
        """
        return self._fit(image, image.size, None)

    def _resized_size(self, size_px: tuple[int, int]) -> tuple[int, int]:
        width, height = (int(x) for x in self._resized_sizes(np.array([size_px]))[0])
        if width * height > MAX_PIXELS:
            raise ImageError(f"too elongated: {size_px[0]} x {size_px[1]} pixels resize to {width} x {height}")
        return width, height

    def _fit(
        self, image: Image.Image, size_px: tuple[int, int], part: tuple[float, float, float, float] | None
    ) -> UInt8[np.ndarray, "h w 3"]:
        """An image of `size_px`, or the `part` of an image that is a reduced form of it, resized and cropped."""
        width, height = self._resized_size(size_px)
        if (width, height) != image.size or part:
            image = image.resize((width, height), Image.Resampling[self.interpolation.upper()], box=part)
        left, top = (int(x) for x in self._crop_offsets(np.array([[width, height]]))[0])
        return self._paste(np.asarray(image), top, left)

    def cell_boxes(
        self, cells: Int[np.ndarray, "n 2"], grid: tuple[int, int], image_sizes_px: Int[np.ndarray, "n 2"]
    ) -> Float[np.ndarray, "n 4"]:
        """The boxes (x0, y0, x1, y1), float32, of grid cells in their upright original images.

        `cells` are (row, column) in a `grid` of (rows, columns) laid over the crop; `image_sizes_px` the originals'
        (width, height). Mapped back through crop and resize and clipped to the image: a cell that lies wholly in
        padding gets a box without area at the image's edge. [ours]
        """
        boxes = self._unclipped_boxes(cells, grid, image_sizes_px)
        return boxes.clip(0, np.tile(image_sizes_px, 2)).astype(np.float32)

    def grid_box(self, image_size_px: tuple[int, int]) -> tuple[float, float, float, float]:
        """The region (x0, y0, x1, y1) of an upright original of (width, height) that the crop shows.

        Reaches outside the image where the crop was padded. [ours]
        """
        x0, y0, x1, y1 = self._unclipped_boxes(np.zeros((1, 2), np.int64), (1, 1), np.array([image_size_px]))[0]
        return float(x0), float(y0), float(x1), float(y1)

    def _unclipped_boxes(
        self, cells: Int[np.ndarray, "n 2"], grid: tuple[int, int], image_sizes_px: Int[np.ndarray, "n 2"]
    ) -> Float[np.ndarray, "n 4"]:
        sizes = image_sizes_px.astype(np.float64)
        resized = self._resized_sizes(image_sizes_px)
        offsets = self._crop_offsets(resized)
        cell_px = np.array([self.crop[1] / grid[1], self.crop[0] / grid[0]])
        first = cells[:, ::-1] * cell_px
        scale = sizes / resized
        return np.concatenate([(first + offsets) * scale, (first + cell_px + offsets) * scale], axis=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the same object back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The object that `to_dict` described. Raises ValueError for keys it does not know and values out of range."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown preprocessing keys: {', '.join(unknown)}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)

    def _resized_sizes(self, sizes_px: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n 2"]:
        """(width, height) after the resize, of images of the given (width, height)."""
        if self.resize is None:
            return sizes_px
        if not isinstance(self.resize, tuple):
            short = sizes_px.min(axis=1, keepdims=True)
            # torchvision cuts the long side's fraction off
            return (self.resize * sizes_px / short).astype(np.int64)
        target = np.array(self.resize[::-1])
        if self.resize_mode == "squash":
            return np.broadcast_to(target, sizes_px.shape)
        ratios = sizes_px / target
        ratio = ratios.min(axis=1) if self.resize_mode == "cover" else ratios.max(axis=1)
        # timm rounds, halves to even, as np.rint does
        return np.maximum(np.rint(sizes_px / ratio[:, None]), 1).astype(np.int64)

    def _crop_offsets(self, sizes_px: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n 2"]:
        """(left, top) of the crop in images of the given (width, height); negative where they are padded."""
        slack = sizes_px - np.array(self.crop[::-1])
        return np.where(slack < 0, -(-slack // 2), np.rint(slack / 2)).astype(np.int64)

    def _paste(self, pixels: UInt8[np.ndarray, "a b 3"], top: int, left: int) -> UInt8[np.ndarray, "h w 3"]:
        height, width = self.crop
        seen = pixels[max(top, 0) : top + height, max(left, 0) : left + width]
        if seen.shape[:2] == self.crop:
            return seen.copy()
        fill = [round(255 * m) for m in self.mean] if self.resize_mode == "contain" else [0, 0, 0]
        canvas = np.empty((height, width, 3), dtype=np.uint8)
        canvas[:] = np.array(fill, dtype=np.uint8)
        y, x = max(-top, 0), max(-left, 0)
        canvas[y : y + seen.shape[0], x : x + seen.shape[1]] = seen
        return canvas
