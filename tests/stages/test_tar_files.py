"""Tar files are indexed as Python's own tarfile does, from their headers alone, and never in part."""

import io
import os
import subprocess
import tarfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stores import write_tar

from epic_ray.errors import InputError
from epic_ray.stages.sources.files import LocalFile
from epic_ray.stages.sources.tar_files import members

FORMS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0/\n"), min_size=1, max_size=90).filter(
        lambda name: name.strip(".") and not name.startswith(" ")
    ),
    min_size=1,
    max_size=5,
).map("/".join)
CONTENTS = st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=5)


class Counted:
    """A tar file in memory that notes which bytes are asked for."""

    def __init__(self, data: bytes) -> None:
        self.data, self.asked = data, []

    @property
    def size(self) -> int:
        return len(self.data)

    def read_at(self, offset: int, count: int) -> bytes:
        self.asked.append((offset, offset + count))
        return self.data[offset : offset + count]


def packed(contents, form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in contents:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:
                assert form == tarfile.USTAR_FORMAT, "only ustar has no room for long names"
    return buffer.getvalue()


def index(data: bytes) -> list[tuple[str, int, int]]:
    return [tuple(member) for member in members(Counted(data), "x.tar")]


@settings(deadline=None)
@given(CONTENTS, st.sampled_from(FORMS))
@example([("ü" * 60 + "/" + "n" * 95 + ".jpg", b"12"), ("d/" * 120 + "x.png", b"")], tarfile.GNU_FORMAT)
@example([("ü" * 60 + "/" + "n" * 95 + ".jpg", b"12"), ("d/" * 120 + "x.png", b"")], tarfile.PAX_FORMAT)
@example([("folder/" * 20 + "x.jpg", b"12")], tarfile.USTAR_FORMAT)
def test_members_are_those_that_pythons_tarfile_sees(contents, form):
    data = packed(contents, form)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = [(member.name, member.offset_data, member.size) for member in tar]
    assert index(data) == theirs


@settings(deadline=None)
@given(CONTENTS, st.sampled_from(FORMS))
def test_the_data_of_members_are_not_read(contents, form):
    file = Counted(packed(contents, form))
    found = list(members(file, "x.tar"))
    for member in found:
        for start, end in file.asked:
            assert end <= member.offset or start >= member.offset + member.size


@settings(deadline=None)
@given(CONTENTS, st.sampled_from(FORMS), st.data())
def test_a_file_that_was_cut_off_anywhere_is_never_listed_in_part(contents, form, data):
    whole = packed(contents, form)
    end = max((offset + -(-size // 512) * 512 for _, offset, size in index(whole)), default=0)
    cut = data.draw(st.integers(0, end + 511))
    with pytest.raises(InputError, match=r"^x\.tar: (ends early|is no tar file|is damaged)"):
        index(whole[:cut])


@settings(deadline=None)
@given(CONTENTS.filter(bool), st.sampled_from(FORMS), st.data())
def test_a_header_that_was_changed_is_told(contents, form, data):
    whole = bytearray(packed(contents, form))
    if not any(whole[:1]):
        return  # ustar had room for none of the names
    place = data.draw(st.integers(0, 147))
    whole[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InputError, match=r"^x\.tar: is no tar file; copy or pack it anew"):
        index(bytes(whole))


@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "oldgnu", "posix", "gnu --incremental"])
def test_what_the_tar_command_writes_is_read(tmp_path, form):
    names = ["a/b c#?%.jpg", "日本/写真.png", "x.cls"] + (["l/" * 80 + "x.jpg"] if form != "v7" else [])
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode())
    flags = f"--format={form} --sort=name".split()
    command = ["tar", *flags, "-cf", tmp_path / "x.tar", "-C", tmp_path / "in", "."]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs GNU tar")
    with LocalFile(str(tmp_path / "x.tar")) as file:
        found = {member.name.removeprefix("./"): member for member in members(file, "x.tar")}
        assert sorted(found) == sorted(names)
        assert all(file.read_at(found[name].offset, found[name].size) == name.encode() for name in names)


def test_sizes_beyond_eight_gigabytes_are_understood():
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("x.jpg")
        info.size = 9 * 1024**3
        with pytest.raises(InputError, match="ends early"):
            index(info.tobuf(form) + bytes(2048))


def test_joined_files_and_trailing_bytes_are_told():
    one = packed([("a.jpg", b"1")], tarfile.GNU_FORMAT)
    for tail in (one, b"x", bytes(300_000) + b"x"):
        with pytest.raises(InputError, match=r"x\.tar: goes on after its end mark at byte \d+; were tar files joined"):
            index(one + tail)
    assert len(index(one + bytes(300_000))) == 1


def test_links_and_files_with_holes_are_told(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"1")
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    (tmp_path / "c.jpg").symlink_to("a.jpg")
    for second in ("b.jpg", "c.jpg"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.add(tmp_path / "a.jpg", "a.jpg")
            tar.add(tmp_path / second, second)
        with pytest.raises(
            InputError, match=rf"`{second}` is a link, which is not followed; pack the files themselves"
        ):
            index(buffer.getvalue())
    with open(tmp_path / "holes.jpg", "wb") as file:
        file.seek(1 << 20)
        file.write(b"1")
    for form in ("gnu", "posix"):
        command = ["tar", f"--format={form}", "--sparse", "-cf", tmp_path / "x.tar", "-C", tmp_path, "holes.jpg"]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("needs GNU tar")
        with pytest.raises(InputError, match=r"holds a file with holes at byte \d+; pack it without --sparse"):
            index((tmp_path / "x.tar").read_bytes())


def test_what_is_no_tar_file_is_told_with_what_to_do(tmp_path):
    for data, says in ((b"", "ends early"), (b"no tar at all" * 99, "copy or pack"), (b"\x1f\x8b" * 512, "gunzip")):
        with pytest.raises(InputError, match=says):
            index(data)
    write_tar(tmp_path / "empty.tar", [])
    assert index((tmp_path / "empty.tar").read_bytes()) == []


def test_a_name_that_is_no_text_is_told():
    info = tarfile.TarInfo("\udcff.jpg")
    info.size = 0
    data = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + bytes(1024)
    with pytest.raises(InputError, match=r"holds a name that is no UTF-8 \(b'\\xff.jpg'\); rename it and pack it anew"):
        index(data)
