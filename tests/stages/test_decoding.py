"""Decoding a unit whatever its files do: real poisons where Pillow still has them, a poisonous plugin where not."""

import io
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from epic_ray.errors import RunFailed
from epic_ray.method.preprocessing import Preprocessing
from epic_ray.stages import decoding
from epic_ray.stages.decoding import Decoded, decode_carefully, decode_plainly

PREPROCESSING = Preprocessing(32, (24, 28), "bicubic")
MIB = 1024**2
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits memory, and looks at processes, by /proc")


def picture(width: int = 61, height: int = 47, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


# --- files that are good, odd or broken, but harmless


def harmless_files() -> dict[str, bytes | OSError]:
    image = picture()
    jpeg = encoded(image, "JPEG", quality=95)
    frames = [picture(seed=seed) for seed in (1, 2, 3)]
    files: dict[str, bytes | OSError] = {
        "jpeg": jpeg,
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "progressive": encoded(image, "JPEG", progressive=True),
        "png": encoded(image, "PNG"),
        "sixteen bits": encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
        "palette": encoded(image.quantize(16), "PNG", transparency=b"\x00\x80\xff"),
        "gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "tiff": encoded(image, "TIFF", compression="tiff_lzw"),
        "jpeg 2000": encoded(image, "JPEG2000"),
        "half damaged jpeg": jpeg[: len(jpeg) // 2] + bytes(40) + jpeg[len(jpeg) // 2 + 40 :],
        "elongated": encoded(Image.new("L", (60_000_000, 1)), "PNG"),
        "empty": b"",
        "text": b"this is a text, not a picture\n" * 9,
        "truncated": jpeg[: len(jpeg) // 2],
        "unreadable": PermissionError(13, "Permission denied", "secret.jpg"),
        "no words": OSError(),
    }
    if features.check("avif"):
        files["avif"] = encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:])
    return files


def assert_equal(decoded: Decoded, expected: Decoded) -> None:
    assert decoded.reasons == expected.reasons
    np.testing.assert_array_equal(decoded.sizes_px, expected.sizes_px)
    np.testing.assert_array_equal(decoded.pixels, expected.pixels)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.sizes_px.dtype == np.int32


def test_careful_decoding_equals_plain_decoding_bit_by_bit():
    files = harmless_files()
    plain = decode_plainly(iter(files.values()), len(files), PREPROCESSING)
    careful = decode_carefully(iter(files.values()), len(files), PREPROCESSING)
    assert_equal(careful, plain)
    reasons = dict(zip(files, plain.reasons, strict=True))
    broken = ["elongated", "empty", "text", "truncated", "unreadable", "no words"]
    assert [name for name, reason in reasons.items() if reason] == broken
    assert reasons["unreadable"] == "[Errno 13] Permission denied: 'secret.jpg'"
    assert reasons["no words"] == "OSError"
    for row, name in enumerate(files):
        assert (name in broken) == (not plain.pixels[row].any())
        assert plain.sizes_px[row].tolist() == ([0, 0] if name in broken else [61, 47])


def test_photos_come_out_of_the_child_as_they_come_out_of_this_process(shared):
    files = sorted((shared / "data" / "photos" / "val").glob("*/*"))[::40]
    images = [file.read_bytes() for file in files]
    preprocessing = Preprocessing(256, (224, 224))
    plain = decode_plainly(iter(images), len(images), preprocessing)
    assert plain.reasons == [None] * len(images)
    assert_equal(decode_carefully(iter(images), len(images), preprocessing), plain)


@pytest.mark.parametrize("decode", [decode_plainly, decode_carefully])
@pytest.mark.parametrize("count", [1, 3])
def test_more_or_fewer_images_than_rows_are_an_error(decode, count):
    with pytest.raises(ValueError, match="zip"):
        decode(iter([encoded(picture(), "PNG")] * 2), count, PREPROCESSING)


# --- poisons that Pillow meets, each with what is said of it (None: its first frame is decoded)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


PNG = encoded(Image.new("L", (64, 64)), "PNG")
PNG_HEAD, PNG_DATA = PNG[:33], PNG[33:]


def png_of(width: int, height: int) -> bytes:
    return PNG[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + PNG[24:29]) + PNG_DATA


def tiff_with(tag: int, value: int, **options) -> bytes:
    """A TIFF of 64 x 64 pixels, one of its numbers replaced."""
    data = bytearray(encoded(Image.new("L", (64, 64)), "TIFF", **options))
    (start,) = struct.unpack_from("<I", data, 4)
    for place in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        if struct.unpack_from("<H", data, place)[0] == tag:
            struct.pack_into("<HII", data, place + 2, 4, 1, value)
    return bytes(data)


def webp_of(frames: int, canvas: int = 16) -> bytes:
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    data = encoded(images[0], "WEBP", save_all=True, append_images=images[1:], lossless=True)
    first = data.index(b"ANMF")
    end = first + 8 + struct.unpack_from("<I", data, first + 4)[0]
    side = struct.pack("<I", canvas - 1)[:3]
    body = data[8:24] + side + side + data[30:first] + data[first:end] * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_of(frames: int) -> bytes:
    data = encoded(Image.new("P", (16, 16)), "GIF")
    first = data.index(b",\0\0\0\0")
    return data[:-1] + data[first:-1] * frames + b";"


def apng_of(frames: int) -> bytes:
    pixels = zlib.compress(bytes(64 * 65))
    control = struct.pack(">IIIIHHBB", 64, 64, 0, 0, 1, 10, 0, 0)
    rest = (
        chunk(b"fcTL", struct.pack(">I", 2 * n - 1) + control) + chunk(b"fdAT", struct.pack(">I", 2 * n) + pixels)
        for n in range(1, frames)
    )
    head = PNG_HEAD + chunk(b"acTL", struct.pack(">II", frames, 0)) + chunk(b"fcTL", bytes(4) + control)
    return head + chunk(b"IDAT", pixels) + b"".join(rest) + chunk(b"IEND", b"")


def many_scans(side: int, scans: int) -> bytes:
    """A gray progressive JPEG of a few bytes a scan, each of which goes over every block of the image."""

    def segment(marker: int, *body: int) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + bytes(body)

    blocks = (side // 8) ** 2
    runs = -(-blocks // 32_767)  # each of 15 bits: the run of 32767 empty blocks
    bits = ("0" + "1" * 14) * runs
    bits += "1" * (-len(bits) % 8)
    empty = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    head = segment(0xDB, 0, *[1] * 64) + segment(0xC2, 8, *struct.pack(">HH", side, side), 1, 1, 0x11, 0)
    tables = segment(0xC4, 0, 1, *[0] * 15, 0) + segment(0xC4, 0x10, 1, *[0] * 15, 0xE0)
    first = segment(0xDA, 1, 1, 0, 0, 0, 0) + bytes(blocks // 8)
    return b"\xff\xd8" + head + tables + first + (segment(0xDA, 1, 1, 0, 1, 63, 0) + empty) * scans + b"\xff\xd9"


def jpeg_2000_of(side: int) -> bytes:
    old, new = struct.pack(">II", 64, 64), struct.pack(">II", side, side)
    return encoded(Image.new("L", (64, 64)), "JPEG2000").replace(old, new)


def avif_of(side: int) -> bytes:
    old, new = struct.pack(">II", 64, 64), struct.pack(">II", side, side)
    return encoded(picture(64, 64), "AVIF").replace(old, new)


def ico_of(png: bytes) -> bytes:
    return b"\0\0\1\0\1\0\0\0\0\0\1\0\x20\0" + struct.pack("<II", len(png), 22) + png


def pages(form: str, count: int) -> bytes:
    return encoded(picture(), form, save_all=True, append_images=[picture(seed=1)] * (count - 1))


ZEROS = zlib.compress(bytes(50_000_000))
BOMB, DAMAGED = "^decompression bomb: ", "^damaged header: Decompressed data too large"
POISONS: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "png of 60000 x 60000": (lambda: png_of(60_000, 60_000), BOMB),
    "png of 13000 x 13000 without data": (lambda: png_of(13_000, 13_000), "^truncated PNG"),
    "png with packed text": (lambda: PNG_HEAD + chunk(b"zTXt", b"a\0\0" + ZEROS) + PNG_DATA, DAMAGED),
    "png with packed profile": (lambda: PNG_HEAD + chunk(b"iCCP", b"a\0\0" + ZEROS) + PNG_DATA, DAMAGED),
    "png with more rows than it has": (lambda: PNG_HEAD + chunk(b"IDAT", ZEROS) + PNG_DATA, None),
    "tiff of 100 million rows": (lambda: tiff_with(257, 100_000_000), BOMB),
    "tiff with strips of 2 GiB": (lambda: tiff_with(278, 2**31 - 1), None),
    "tiff with a strip beyond its end": (lambda: tiff_with(273, 2**32 - 1), "^truncated TIFF"),
    "tiff with packed strips of 4 GiB": (lambda: tiff_with(279, 2**32 - 1, compression="tiff_deflate"), "TIFF"),
    "webp of 16384 x 16384": (lambda: webp_of(1, 16_384), BOMB),
    "jpeg 2000 of 2 billion squared": (lambda: jpeg_2000_of(2**31 - 1), BOMB),
    "ico with 20000 x 20000 inside": (lambda: ico_of(png_of(20_000, 20_000)), BOMB),
    "gif of 200 000 frames": (lambda: gif_of(200_000), None),
    "apng of 50 000 frames": (lambda: apng_of(50_000), None),
    "webp of 200 000 frames": (lambda: webp_of(200_000), None),
    "tiff of 500 frames": (lambda: pages("TIFF", 500), None),
    "mpo of 300 frames": (lambda: pages("MPO", 300), None),
}
if features.check("avif"):
    POISONS["avif of 60000 x 60000"] = (lambda: avif_of(60_000), "")


@pytest.mark.parametrize("name", POISONS)
def test_a_poison_is_quick_costs_little_memory_and_harms_no_other_image(name):
    make, reason = POISONS[name]
    images = [encoded(picture(), "PNG"), make(), encoded(picture(seed=1), "JPEG")]
    careful = decode_carefully(iter(images), 3, PREPROCESSING, seconds_per_image=5, memory_bytes=1024 * MIB)
    assert_equal(careful, decode_plainly(iter(images), 3, PREPROCESSING, seconds_per_image=20))
    assert careful.reasons[0] is careful.reasons[2] is None
    if reason is None:
        assert careful.reasons[1] is None
    else:
        assert re.search(reason, careful.reasons[1])


@LINUX
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_an_image_that_needs_too_much_memory_says_so(form):
    images = [encoded(Image.new("L", (6000, 6000)), form), encoded(picture(), "PNG")]
    careful = decode_carefully(iter(images), 2, PREPROCESSING, memory_bytes=64 * MIB)
    assert careful.reasons == ["needs more than 0.0625 GiB to decode", None]
    assert not careful.pixels[0].any()
    assert careful.pixels[1].any()
    assert decode_carefully(iter(images), 2, PREPROCESSING, memory_bytes=512 * MIB).reasons == [None, None]


def test_an_image_that_hangs_the_decoder_says_so():
    images = [encoded(picture(), "PNG"), many_scans(4000, 6000), encoded(picture(seed=1), "PNG")]
    assert len(images[1]) < 300_000
    careful = decode_carefully(iter(images), 3, PREPROCESSING, seconds_per_image=1)
    assert careful.reasons == [None, "took longer than 1 s to decode", None]
    expected = decode_plainly(iter(images[::2]), 2, PREPROCESSING)
    np.testing.assert_array_equal(careful.pixels[[0, 2]], expected.pixels)
    few = [many_scans(800, 50)]
    assert_equal(decode_carefully(iter(few), 1, PREPROCESSING), decode_plainly(iter(few), 1, PREPROCESSING))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "I;16")])
def test_the_largest_image_that_is_decoded_passes_under_the_limits(form, mode):
    tile = np.random.default_rng(0).integers(0, 256, (116, 154, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(np.tile(tile[:, :, 0].astype(np.uint16) * 257, (100, 100)))
    else:
        image = Image.fromarray(np.tile(tile[:, :, :3], (100, 100, 1))).convert(mode)
    data = encoded(image, form, **({"compress_level": 1} if form == "PNG" else {}))
    del image
    careful = decode_carefully(iter([data]), 1, PREPROCESSING)
    assert careful.reasons == [None]
    assert careful.sizes_px.tolist() == [[15_400, 11_600]]


# --- poisons that only a plugin offers

PLUGIN = """
import os, re, signal, sys
from pathlib import Path
from PIL import Image, ImageFile

log = Path(__file__).with_name("log")

def tell(text):
    with log.open("a") as file:
        file.write(f"{text}\\n")

class Poison(ImageFile.ImageFile):
    format = "ICO"
    format_description = "poison"

    def _open(self):
        self._mode, self._size = "RGB", (40, 40)
        poison = self.fp.read().split()[1].decode()
        tell(poison)
        if poison.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, poison))
        if poison == "exit":
            os._exit(3)
        if poison == "hang":
            re.fullmatch("(a+)+", "a" * 99 + "b")  # for ever, in C, with the GIL
        if poison == "noise":
            os.write(1, b"\\1" * 99999)
            print("to be or not to be " * 99, flush=True)
            sys.stdin.read()
        self.tile = []
        self.im = Image.core.fill("RGB", (40, 40), (9, 99, 199))

Image.init()
Image.register_open("ICO", Poison, lambda prefix: prefix.startswith(b"POISON"))
tell(f"pid {os.getpid()}")
"""


class Plugin:
    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def pids(self) -> list[int]:
        return [int(line.split()[1]) for line in self.lines() if line.startswith("pid ")]


def poison(what: str) -> bytes:
    return b"POISON " + what.encode()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Plugin:
    folder = tmp_path / "plug:ins für Bilder"  # a folder that PYTHONPATH could not hold
    folder.mkdir()
    (folder / "poison_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(folder)
    return Plugin(folder)


@pytest.mark.slow
@LINUX
def test_an_image_that_kills_the_decoder_costs_its_own_row_alone(plugin, capfd):
    good = [encoded(picture(seed=seed), "PNG") for seed in range(4)]
    images = [
        poison("SIGSEGV"),
        good[0],
        poison("exit"),
        poison("SIGKILL"),
        good[1],
        poison("hang"),
        OSError("gone"),
        good[2],
        poison("noise"),
        good[3],
    ]
    files_before = set(os.listdir("/proc/self/fd"))
    careful = decode_carefully(iter(images), 10, PREPROCESSING, 3, preload=["poison_plugin"])
    assert careful.reasons == [
        "the decoder died of signal 11 (SIGSEGV)",
        None,
        "the decoder ended with exit code 3",
        "the decoder died of signal 9 (SIGKILL)",
        None,
        "took longer than 3 s to decode",
        "gone",
        None,
        None,
        None,
    ]
    plain = decode_plainly(iter(good), 4, PREPROCESSING)
    np.testing.assert_array_equal(careful.pixels[[1, 4, 7, 9]], plain.pixels)
    np.testing.assert_array_equal(careful.sizes_px[[1, 4, 7, 9]], plain.sizes_px)
    assert (careful.pixels[8] == (9, 99, 199)).all()
    failed = [row for row, reason in enumerate(careful.reasons) if reason]
    assert not careful.pixels[failed].any()
    assert not careful.sizes_px[failed].any()
    said = capfd.readouterr().err
    assert "Fatal Python error: Segmentation fault" in said
    assert "to be or not to be" in said
    assert len(plugin.pids()) == len(set(plugin.pids())) == 5  # one at first, and one after each death
    assert not any(Path(f"/proc/{pid}").exists() for pid in plugin.pids())  # neither running nor a zombie
    assert set(os.listdir("/proc/self/fd")) == files_before


@LINUX
def test_a_fault_in_the_reading_of_images_leaves_no_child_behind(plugin):
    def images() -> Iterator[bytes]:
        yield encoded(picture(), "PNG")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_carefully(images(), 2, PREPROCESSING, preload=["poison_plugin"])
    assert [Path(f"/proc/{pid}").exists() for pid in plugin.pids()] == [False]


def script(body: str, *arguments: str) -> subprocess.Popen:
    head = f"""
import sys; sys.path[:] = {sys.path!r}
from epic_ray.method.preprocessing import Preprocessing
from epic_ray.stages.decoding import CarefulNeeded, decode_carefully, decode_plainly
preprocessing = Preprocessing(32, (24, 28), "bicubic")
"""
    command = [sys.executable, "-c", head + body, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@LINUX
def test_the_child_dies_with_its_parent(plugin):
    body = "decode_carefully(iter([b'POISON hang']), 1, preprocessing, 600, preload=['poison_plugin'])"
    with script(body) as parent:
        try:
            wait_until(lambda: "hang" in plugin.lines())
            (child,) = plugin.pids()
            assert running(child)
        finally:
            parent.kill()
        wait_until(lambda: not running(child), seconds=10)


@pytest.mark.parametrize("hanging", ["image", "plugin"])
def test_plain_decoding_ends_the_process_where_an_image_hangs(plugin, tmp_path, hanging):
    (tmp_path / "image").write_bytes(many_scans(4000, 6000))
    (tmp_path / "plugin").write_bytes(poison("hang"))
    body = """
import poison_plugin
image = open(sys.argv[1], "rb").read()
decode_plainly(iter([b"", image]), 2, preprocessing, 1)
print("not reached")
"""
    with script(body, str(tmp_path / hanging)) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    assert "Timeout (0:00:01)!" in err
    assert "in decode_plainly" in err


@pytest.mark.slow
def test_the_watchdog_sleeps_while_images_are_read_and_after_the_last():
    body = """
import time
def images():
    for _ in range(3):
        time.sleep(1)
        yield b"no image"
    time.sleep(1)
decode_plainly(images(), 3, preprocessing, 0.5)
time.sleep(1)
print("alive")
"""
    with script(body) as process:
        assert process.communicate(timeout=120) == ("alive\n", "")


@pytest.mark.slow
@LINUX
def test_plain_decoding_without_enough_memory_asks_for_care_and_calls_the_watchdog_off(tmp_path):
    (tmp_path / "large.png").write_bytes(encoded(Image.new("1", (12_000, 12_000)), "PNG"))
    body = """
import resource, time
image = open(sys.argv[1], "rb").read()
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 256 * 1024**2,) * 2)
try:
    decode_plainly(iter([b"", image]), 2, preprocessing, 2)
except CarefulNeeded as error:
    time.sleep(3)
    print(error)
"""
    with script(body, str(tmp_path / "large.png")) as process:
        out, err = process.communicate(timeout=120)
    assert out.startswith("image 1 of 2 ("), err


def test_a_child_that_cannot_start_fails_the_run_with_what_it_says():
    images = [encoded(picture(), "PNG")]
    with pytest.raises(RunFailed, match=r"exit code 1(.|\n)*No module named 'no_such_plugin'"):
        decode_carefully(iter(images), 1, PREPROCESSING, preload=["no_such_plugin"])


def test_a_child_that_takes_for_ever_to_start_fails_the_run(tmp_path, monkeypatch):
    (tmp_path / "sleepy_plugin.py").write_text("import time\ntime.sleep(99)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(decoding, "_START_SECONDS", 2.0)
    with pytest.raises(RunFailed, match="is not ready after 2 s"):
        decode_carefully(iter([b"image"]), 1, PREPROCESSING, preload=["sleepy_plugin"])


def test_a_start_is_not_taken_for_the_time_of_an_image(tmp_path, monkeypatch):
    (tmp_path / "slow_plugin.py").write_text("import time\ntime.sleep(2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    images = [encoded(picture(), "PNG")]
    assert decode_carefully(iter(images), 1, PREPROCESSING, 1, preload=["slow_plugin"]).reasons == [None]


def test_the_child_needs_no_framework():
    with script("print({name.split('.')[0] for name in sys.modules} & {'torch', 'ray', 'pyarrow', 'timm'})") as process:
        assert process.communicate(timeout=120)[0] == "set()\n"


@LINUX
@pytest.mark.ray
def test_a_ray_worker_can_decode_carefully(ray_session, plugin):
    import ray

    # by value, as the worker does not have this module
    path, preprocessing, images = list(sys.path), PREPROCESSING, [poison("SIGSEGV"), encoded(picture(), "PNG")]

    @ray.remote(max_retries=0)
    def decode() -> list[str | None]:
        sys.path[:] = path
        return decode_carefully(iter(images), 2, preprocessing, preload=["poison_plugin"]).reasons

    assert ray.get(decode.remote()) == ["the decoder died of signal 11 (SIGSEGV)", None]
    assert not any(running(pid) for pid in plugin.pids())
