"""Decoding, the evaluation transforms, and boxes back in the original image."""

import contextlib
import io
import json
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from epic_ray.method.preprocessing import ImageError, Preprocessing, decode_image


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(height // 3, 1), max(width // 3, 1), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _bytes(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _by_pillow(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


# ---------------------------------------------------------------- decoding


WRITABLE = {
    "PNG": ["RGB", "L", "1", "P", "LA", "RGBA"],
    "JPEG": ["RGB", "L", "CMYK"],
    "TIFF": ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["RGB", "L", "P", "RGBA"],
    "BMP": ["RGB", "L", "1", "P", "RGBA"],
}


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in WRITABLE.items() for mode in modes])
def test_an_ordinary_image_decodes_as_pillow_and_imagefolder_do(form, mode):
    image = _noise(31, 22).convert(mode.removesuffix("A")).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = _bytes(image, form)
    decoded = decode_image(data)
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), _by_pillow(data))


def test_a_palette_with_transparency_drops_it_and_warns_nobody():
    image = _noise(20, 20).quantize(16)
    data = _bytes(image, transparency=bytes(range(0, 160, 10)))
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_exif_rotated_image_comes_upright(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _bytes(_noise(30, 17), form, exif=exif)
    decoded = decode_image(data)
    assert decoded.size == ((30, 17) if orientation < 5 else (17, 30))
    np.testing.assert_array_equal(np.asarray(decoded), _by_pillow(data))


def test_unreadable_exif_leaves_the_pixels_as_they_are():
    data = _bytes(_noise(30, 17), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff\x01\x12")
    assert decode_image(data).size == (30, 17)


def test_sixteen_bit_gray_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(32, 32)
    gray = np.asarray(decode_image(_bytes(Image.fromarray(values))))[:, :, 0]
    np.testing.assert_array_equal(gray, np.rint(values / 257))
    big_endian = Image.frombytes("I;16B", (32, 32), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(decode_image(_bytes(big_endian, "TIFF")))[:, :, 0], gray)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535, 32768]], dtype=np.int32), [0, 255, 128]),
        (np.array([[-1000, 99000, 49000]], dtype=np.int32), [0, 255, 128]),
        (np.array([[0.0, 1.0, 0.2]], dtype=np.float32), [0, 255, 51]),
        (np.array([[-10.0, 10.0, 6.0]], dtype=np.float32), [0, 255, 204]),
        (np.array([[7.0, 7.0, 7.0]], dtype=np.float32), None),
    ],
)
def test_32_bit_gray_is_scaled_from_its_range(values, expected):
    data = _bytes(Image.fromarray(values), "TIFF")
    if expected is None:
        assert len(decode_image(data).getcolors()) == 1
    else:
        assert np.asarray(decode_image(data))[0, :, 0].tolist() == expected


def test_a_large_gray_image_is_scaled_by_one_range():
    values = np.linspace(-1e6, 3e6, 700 * 900).astype(np.int32).reshape(700, 900)
    gray = np.asarray(decode_image(_bytes(Image.fromarray(values), "TIFF")))[:, :, 0]
    np.testing.assert_array_equal(gray, np.rint((values + 1e6) * (255 / 4e6)))


def test_gray_values_that_are_not_numbers_are_refused():
    with pytest.raises(ImageError, match="not all finite"):
        decode_image(_bytes(Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32)), "TIFF"))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    data = _bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"^empty file$"),
        (b"<html>404 not found</html>", r"^not an image: 26 bytes that begin with b'<html>"),
        (_bytes(_noise(200, 200), "JPEG")[:-600], r"^truncated JPEG: "),
        (_bytes(_noise(200, 200), "PNG")[:-600], r"^truncated PNG: "),
        (_bytes(_noise(200, 200), "GIF")[:-600], r"^truncated GIF: "),
        (_bytes(_noise(40, 40), "JPEG")[:12], r"^(not an image|damaged header|truncated)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "^not an image"),
    ],
    ids=["empty", "text", "jpeg", "png", "gif", "header", "eps"],
)
def test_a_bad_file_is_refused_with_its_reason_in_one_line(data, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


def test_too_many_pixels_are_refused_before_they_are_decoded():
    data = _bytes(Image.new("1", (3000, 2000)))
    with pytest.raises(ImageError, match=r"decompression bomb: 3000 x 2000 pixels, more than 5999999"):
        decode_image(data, max_pixels=5_999_999)
    assert decode_image(data, max_pixels=6_000_000).size == (3000, 2000)


def test_a_bomb_beyond_pillows_own_limit_is_refused_too():
    small = _bytes(Image.new("1", (8, 8)))
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + small[24:29]
    bomb = small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
    with pytest.raises(ImageError, match="decompression bomb"):
        decode_image(bomb)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("load_prepare", MemoryError()),
        ("load_prepare", OSError("out of memory error when reading image file")),
        ("load_prepare", ValueError("Pixel allocation failed: Out of memory")),
        ("getexif", MemoryError()),
    ],
)
def test_a_lack_of_memory_is_no_fault_of_the_image(monkeypatch, method, error):
    def fail(image: Image.Image) -> None:
        raise error

    data = _bytes(_noise(20, 20))
    assert decode_image(data).size == (20, 20)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, method, fail)
    with pytest.raises(MemoryError):
        decode_image(data)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_damage_to_a_file_gets_out_as_anything_but_an_image_error(data):
    form = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]))
    content = bytearray(_bytes(_noise(24, 16), form))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert decode_image(bytes(content), max_pixels=10_000_000).mode == "RGB"


# ---------------------------------------------------------------- transforms

SIZES = [(224, 224), (500, 375), (375, 500), (333, 257), (257, 334), (101, 640), (17, 23), (232, 233), (1, 50)]


def _assert_equals(preprocessing, transform, sizes=SIZES):
    """`transform` ends in a tensor: either the uint8 pixels, or normalised ones."""
    from torchvision.transforms import functional

    for k, size in enumerate(sizes):
        image = _noise(*size, seed=k)
        ours = preprocessing.apply(image)
        assert ours.shape == (*preprocessing.crop, 3)
        theirs = transform(image)
        if theirs.dtype.is_floating_point:
            tensor = functional.normalize(functional.to_tensor(ours), preprocessing.mean, preprocessing.std)
            np.testing.assert_allclose(tensor.numpy(), theirs.numpy(), rtol=0, atol=1e-6)
        else:
            np.testing.assert_array_equal(ours, theirs.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("weights", ["resnet50.V1", "resnet50.V2", "swin_v2_s.V1", "convnext_tiny.V1"])
def test_pixels_equal_torchvisions_transforms(weights):
    from torchvision import models

    name, version = weights.split(".")
    transform = models.get_model_weights(name)[f"IMAGENET1K_{version}"].transforms()
    preprocessing = Preprocessing(
        resize=transform.resize_size[0],
        crop=(transform.crop_size[0], transform.crop_size[0]),
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )
    _assert_equals(preprocessing, transform)


@pytest.mark.parametrize(
    ("options", "preprocessing"),
    [
        ({"input_size": (3, 224, 224), "crop_pct": 0.875}, Preprocessing(256, (224, 224), "bicubic")),
        ({"input_size": (3, 224, 224), "crop_pct": 0.9}, Preprocessing(248, (224, 224), "bicubic")),
        ({"input_size": (3, 288, 288), "crop_pct": 0.95}, Preprocessing(303, (288, 288), "bilinear")),
        (
            {"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": "squash"},
            Preprocessing((248, 248), (224, 224), "bicubic"),
        ),
        (
            {"input_size": (3, 192, 256), "crop_pct": 0.9},
            Preprocessing((213, 284), (192, 256), "bicubic", resize_mode="cover"),
        ),
        (
            {"input_size": (3, 224, 224), "crop_pct": 0.94, "crop_mode": "border"},
            Preprocessing((238, 238), (224, 224), "lanczos", resize_mode="contain"),
        ),
    ],
    ids=["center .875", "center .9", "bilinear .95", "squash", "not square", "border"],
)
def test_pixels_equal_timms_transforms(options, preprocessing):
    from timm.data import create_transform

    transform = create_transform(
        **options,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        normalize=False,
    )
    sizes = SIZES if preprocessing.resize_mode != "contain" else SIZES[:-1]
    _assert_equals(preprocessing, transform, sizes)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_odd_sizes_round_as_torchvision_rounds(width, height, resize, crop_height, crop_width):
    from torchvision import transforms

    theirs = transforms.Compose(
        [
            transforms.Resize(resize),
            transforms.CenterCrop((crop_height, crop_width)),
            transforms.PILToTensor(),
        ]
    )
    _assert_equals(Preprocessing(resize, (crop_height, crop_width)), theirs, [(width, height)])


def test_an_absurdly_long_image_is_refused_instead_of_filling_the_memory():
    with pytest.raises(ImageError, match="too elongated: 1 x 9000"):
        Preprocessing(256, (224, 224)).apply(Image.new("RGB", (1, 9000)))


def test_the_record_of_a_preprocessing_survives_json():
    for value in (Preprocessing(256, (224, 200)), Preprocessing(None, (32, 32)), Preprocessing((40, 50), (32, 32))):
        assert Preprocessing.from_dict(json.loads(json.dumps(value.to_dict()))) == value
    with pytest.raises(ValueError, match="unknown preprocessing keys: cropp"):
        Preprocessing.from_dict({"cropp": [1, 1]})


@pytest.mark.parametrize(
    "options",
    [
        {"resize": 0},
        {"interpolation": "cubic"},
        {"resize_mode": "crop"},
        {"resize_mode": "cover"},
        {"mean": (0.5,)},
        {"std": (0.2, 0.0, 0.2)},
    ],
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"resize|interpolation|mean"):
        Preprocessing(**{"resize": 256, "crop": (224, 224), **options})


# ---------------------------------------------------------------- boxes

ALL_MODES = [
    Preprocessing(64, (56, 56)),
    Preprocessing(64, (56, 84)),
    Preprocessing((64, 72), (56, 60)),
    Preprocessing((60, 90), (56, 84), resize_mode="cover"),
    Preprocessing((64, 64), (56, 56), resize_mode="contain"),
    Preprocessing(None, (120, 100)),
    Preprocessing(40, (56, 56)),
]


@pytest.mark.parametrize("preprocessing", ALL_MODES, ids=lambda p: f"{p.resize_mode}-{p.resize}-{p.crop}")
@pytest.mark.parametrize("size", [(301, 203), (187, 255), (99, 131)])
def test_the_box_of_the_cells_that_see_a_patch_lies_on_the_patch(preprocessing, size):
    width, height = size
    x0, y0, x1, y1 = width * 2 // 5, height * 3 // 7, width * 3 // 5, height * 2 // 3
    image = Image.new("RGB", size, "black")
    image.paste((255, 0, 0), (x0, y0, x1, y1))
    _assert_box(preprocessing, image, (x0, y0, x1, y1))


def test_the_box_lies_on_the_patch_of_an_exif_rotated_photo_as_a_person_sees_it():
    upright = Image.new("RGB", (203, 301), "black")
    upright.paste((255, 0, 0), (60, 150, 121, 222))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    decoded = decode_image(_bytes(stored, exif=exif))
    _assert_box(Preprocessing(64, (56, 56)), decoded, (60, 150, 121, 222))


def _assert_box(preprocessing, image, expected):
    """With cells of one pixel, the cells that are more than half red box the patch to within a pixel or so."""
    red = preprocessing.apply(image)[:, :, 0]
    cells = np.argwhere(red > 127)
    sizes = np.tile(np.array([image.size]), (len(cells), 1))
    boxes = preprocessing.cell_boxes(cells, preprocessing.crop, sizes)
    assert boxes.dtype == np.float32
    pixel = max(np.max(boxes[:, 2] - boxes[:, 0]), np.max(boxes[:, 3] - boxes[:, 1]))
    union = [*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)]
    np.testing.assert_allclose(union, expected, atol=0.6 * pixel + 0.51)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(ALL_MODES), st.integers(20, 400), st.integers(20, 400), st.integers(1, 8), st.integers(1, 8))
def test_the_cells_of_a_grid_tile_the_seen_part_of_the_image(preprocessing, width, height, rows, columns):
    cells = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    boxes = preprocessing.cell_boxes(cells, (rows, columns), np.tile(np.array([[width, height]]), (len(cells), 1)))
    grid = boxes.reshape(rows, columns, 4)
    assert (boxes >= 0).all()
    assert (boxes[:, [0, 2]] <= width).all()
    assert (boxes[:, [1, 3]] <= height).all()
    np.testing.assert_allclose(grid[:, 1:, 0], grid[:, :-1, 2], atol=1e-3)
    np.testing.assert_allclose(grid[1:, :, 1], grid[:-1, :, 3], atol=1e-3)


def test_each_box_is_mapped_with_its_own_images_size():
    preprocessing = Preprocessing(64, (64, 64))
    boxes = preprocessing.cell_boxes(np.array([[0, 0], [1, 1]]), (2, 2), np.array([[64, 64], [256, 128]]))
    assert boxes.tolist() == [[0, 0, 32, 32], [128, 64, 192, 128]]


# ---------------------------------------------------------------- reduced decoding


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(("size", "reduced"), [((500, 375), False), ((512, 512), True), ((1025, 2311), True)])
def test_a_large_jpeg_is_reduced_while_it_is_decoded_to_nearly_the_same_input(orientation, size, reduced):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = _noise(size[0] // 6, size[1] // 6).resize(size, Image.Resampling.BICUBIC)
    data = _bytes(image, "JPEG", exif=exif, quality=95)
    exact, original = Preprocessing(256, (224, 224)).load(data)
    scaled, told = Preprocessing(256, (224, 224), scaled_decode=True).load(data)
    assert told == original == (size if orientation < 5 else size[::-1]), "the size is that of the file, for boxes"
    difference = np.abs(exact.astype(int) - scaled).mean()
    assert difference < 2
    assert (difference > 0) == reduced, "an image that is no twice as large stays equal to the bit"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_lies_where_the_whole_one_does_however_it_is_turned(orientation):
    """1025 x 2057 at 1/8 becomes 129 x 258: what is beyond the picture must not squeeze it, on whichever side it is."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp = np.stack([np.broadcast_to(np.linspace(0, 255, 1025), (2057, 1025))] * 3, axis=2).astype(np.uint8)
    ramp[..., 1] = np.linspace(0, 255, 2057)[:, None]
    data = _bytes(Image.fromarray(ramp), "JPEG", exif=exif, quality=98)
    exact, scaled = (Preprocessing(96, (96, 96), scaled_decode=reduce).load(data)[0] for reduce in (False, True))
    difference = exact.astype(float) - scaled
    assert np.abs(difference[8:-8, 8:-8].mean(axis=(0, 1))).max() < 0.35


def test_only_jpegs_are_reduced():
    data = _bytes(_noise(700, 600))
    exact, scaled = (Preprocessing(64, (48, 48), scaled_decode=reduce).load(data)[0] for reduce in (False, True))
    np.testing.assert_array_equal(exact, scaled)


def test_an_absurdly_long_jpeg_is_refused_also_where_it_would_be_reduced():
    data = _bytes(Image.new("RGB", (60_000, 2)), "JPEG")
    with pytest.raises(ImageError, match="too elongated"):
        Preprocessing(256, (224, 224), scaled_decode=True).load(data)
