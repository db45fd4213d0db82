"""WebDataset: tar files whose neighbours of one name make a sample; indexed by their headers, no image is read."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from epic_ray import storage
from epic_ray.config import DataConfig
from epic_ray.errors import InputError
from epic_ray.stages.sources.base import BATCH_ROWS, INT32_MAX, Place, Shard, Source, Tally, listed
from epic_ray.stages.sources.files import in_order, open_file, threads_for
from epic_ray.stages.sources.tar_files import Member, ReadAt, members

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("label", "cls", "class")
_AHEAD_BYTES = 65_536
_NUMBER = re.compile(r"[+-]?\d{1,18}", re.ASCII)


class WebDatasetSource(Source):
    """The samples of tar files that have an image. A label is a member `cls`, or stands in a member `json`."""

    format = "webdataset"

    def __init__(self, data: DataConfig, place: Place, shards: Sequence[Shard], notes: Sequence[str] = ()) -> None:
        super().__init__(data, place, shards, notes)
        self._image = None if data.image_column == "auto" else data.image_column.lower().lstrip(".")
        self._label = None if data.label_column == "auto" else data.label_column
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self._imageless, self._dotted = Tally(), Tally()

    def _rows(self) -> Iterator[pa.RecordBatch]:
        found = False
        for index in in_order(self._index, self._shards, threads_for(self._root)):
            self._imageless.add(index.imageless.first, index.imageless.count)
            self._dotted.add(index.dotted.first, index.dotted.count)
            found = found or index.has_labels
            yield from index.batches
        if self._labelled and self._label and not found:
            raise InputError(
                f"{self.where}: no sample has a member or a JSON key `{self._label}`; set data.label_column to what "
                "holds the labels, or data.labels=none"
            )

    def _looked_for(self) -> str:
        wanted = ", ".join(f".{suffix}" for suffix in ([self._image] if self._image else IMAGE_MEMBERS))
        return f"members that end in {wanted} are looked for" + "".join(f"; {note}" for note in self._left_out())

    def notes(self) -> list[str]:
        return super().notes() + self._left_out()

    def _left_out(self) -> list[str]:
        if not self._imageless.count:
            return []
        note = f"{self._imageless.count} sample(s) without an image are left out, first {self._imageless.first}"
        if self._dotted.count:
            what = "but a suffix begins at the first dot; set data.image_column to it, or pack under other names"
            note += f" ({self._dotted.count} of them have images like {self._dotted.first}, {what})"
        return [note]

    def _index(self, shard: Shard) -> "_Index":
        index = _Index(shard, self._image, self._label, self._labelled)
        try:
            with open_file(shard.uri) as file:
                index.build(_Ahead(file) if storage.is_uri(shard.uri) else file)
        except storage.StorageAway:
            raise
        except OSError as error:
            raise InputError(f"{shard.uri}: cannot be read ({error}); check the file and the rights") from error
        return index


class _Ahead:
    """A remote file read in pieces that hold several headers where the images are small."""

    def __init__(self, file: ReadAt) -> None:
        self._file, self._start, self._piece = file, 0, b""

    @property
    def size(self) -> int:
        return self._file.size

    def read_at(self, offset: int, count: int) -> bytes:
        if not self._start <= offset <= offset + count <= self._start + len(self._piece):
            self._start, self._piece = offset, self._file.read_at(offset, max(count, _AHEAD_BYTES))
        return self._piece[offset - self._start : offset - self._start + count]


# --- samples


@dataclass
class _Sample:
    key: str
    images: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    dotted: str = ""


class _Index:
    """The samples of one shard, as batches of rows."""

    def __init__(self, shard: Shard, image: str | None, label: str | None, labelled: bool) -> None:
        self._shard, self._label = shard, label
        self._image_suffixes = (image,) if image else IMAGE_MEMBERS
        self._text_suffixes = ({label.lower() if label else "cls", "json"}) if labelled else set()
        self.imageless, self.dotted = Tally(), Tally()
        self.has_labels = False
        self.batches: list[pa.RecordBatch] = []
        self._rows: list[tuple[str, int, int, str | None, int | None]] = []

    def build(self, file: ReadAt) -> None:
        sample: _Sample | None = None
        seen: set[str] = set()
        for member in members(file, self._shard.uri):
            key, suffix = _split_name(member.name)
            if any(part.startswith(".") for part in key.split("/")):
                continue
            if sample is None or sample.key != key:
                if sample:
                    self._close(sample)
                if key in seen:
                    raise InputError(
                        f"{self._shard.uri}: `{key}` appears again after other samples; the members of a sample are "
                        "neighbours: pack it anew, sorted by name (tar --sort=name)"
                    )
                seen.add(key)
                sample = _Sample(key)
            self._add(sample, suffix, member, file)
        if sample:
            self._close(sample)
        self._pack()

    def _add(self, sample: _Sample, suffix: str, member: Member, file: ReadAt) -> None:
        if suffix in sample.images or suffix in sample.texts:
            raise InputError(f"{self._shard.uri}: `{sample.key}` has two members `{suffix}`; pack it anew")
        if suffix in self._image_suffixes:
            sample.images[suffix] = member
        elif suffix in self._text_suffixes:
            sample.texts[suffix] = file.read_at(member.offset, member.size)
        elif suffix.endswith(tuple(f".{suffix}" for suffix in IMAGE_MEMBERS)):
            sample.dotted = sample.dotted or member.name

    def _close(self, sample: _Sample) -> None:
        if not sample.images:
            self.imageless.add(f"{self._shard.relative}#{sample.key}")
            if sample.dotted:
                self.dotted.add(sample.dotted)
            return
        if len(sample.images) > 1:
            raise InputError(
                f"{self._shard.uri}: `{sample.key}` has several images ({', '.join(sample.images)}); set "
                "data.image_column to the suffix of the one that is meant"
            )
        (image,) = sample.images.values()
        self._rows.append((sample.key, image.offset, image.size, *self._label_of(sample)))
        if len(self._rows) == BATCH_ROWS:
            self._pack()

    def _label_of(self, sample: _Sample) -> tuple[str | None, int | None]:
        """Class name and class number."""
        suffix = self._label.lower() if self._label else "cls"
        if suffix in sample.texts:
            self.has_labels = True
            text = self._text(sample, suffix)
            return (None, self._number(sample, int(text))) if _NUMBER.fullmatch(text) else (text or None, None)
        values = self._json(sample) if "json" in sample.texts else {}
        for key in (self._label,) if self._label else LABEL_KEYS:
            if key in values:
                self.has_labels = True
                value = values[key]
                if isinstance(value, int) and not isinstance(value, bool):
                    return None, self._number(sample, value)
                if value is None or isinstance(value, str):
                    return value or None, None
                raise self._no_label(sample, f"`{key}` in its JSON is neither an integer nor a text: {value!r:.60}")
        return None, None

    def _text(self, sample: _Sample, suffix: str) -> str:
        try:
            return sample.texts[suffix].decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise self._no_label(sample, f"its member `{suffix}` is no UTF-8") from None

    def _json(self, sample: _Sample) -> dict[str, Any]:
        try:
            values = json.loads(self._text(sample, "json"))
        except (ValueError, RecursionError) as error:
            raise self._no_label(sample, f"its member `json` cannot be read ({error})") from None
        return values if isinstance(values, dict) else {}

    def _number(self, sample: _Sample, number: int) -> int:
        if not -1 <= number <= INT32_MAX:
            raise self._no_label(sample, f"{number} is no class number")
        return number

    def _no_label(self, sample: _Sample, why: str) -> InputError:
        return InputError(
            f"{self._shard.uri}: `{sample.key}` has no readable label: {why}; mend it, set data.label_column, or "
            "data.labels=none"
        )

    def _pack(self) -> None:
        if self._rows:
            keys, offsets, sizes, names, numbers = zip(*self._rows, strict=True)
            ids = pa.array([f"{self._shard.relative}#{key}" for key in keys], pa.string())
            columns = {
                "byte_offset": pa.array(offsets, pa.int64()),
                "size_bytes": pa.array(sizes, pa.int64()),
                "class_name": pa.array(names, pa.string()),
                "class_index": pa.array(numbers, pa.int32()),
            }
            self.batches.append(listed(ids, self._shard.uri, **columns))
            self._rows = []


def _split_name(name: str) -> tuple[str, str]:
    """Key and suffix (small letters) of a member: they part at the first dot of its base name."""
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem else (folder + slash + base, "")
