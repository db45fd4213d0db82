"""From the tables of a run to pictures of explanations: every prototype is drawn from the image its row names.

The only images read are those shown: the explained ones, whose maps are computed anew for the overlays, and their
channels' prototypes, whose overlays are in the table.
"""

import io
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from epic_ray.config import FITTING_SPLIT, PRECISION_TOLERANCES
from epic_ray.errors import InputError, ResultError, RunFailed
from epic_ray.logs import Reporter
from epic_ray.method.basis import absorb
from epic_ray.method.explanation import Explained, explain_maps
from epic_ray.method.preprocessing import ImageError, decode_image
from epic_ray.pipeline import Run
from epic_ray.report.pictures import ChannelRow, ExplanationPicture, Tile, draw_explanation
from epic_ray.run_dir import PICTURES, table_file, table_folder
from epic_ray.stages.images import Address, addresses_at, find_images
from epic_ray.stages.prototypes import SIGN_NAMES
from epic_ray.stages.reading import UnreadableError
from epic_ray.stages.resources import likely_device, take_device
from epic_ray.stages.rounds import read_basis
from epic_ray.storage import StorageAway
from epic_ray.tables import read_table, to_numpy

_CACHED_IMAGES = 48  # originals in full size: a large photo takes 70 MB


@dataclass(frozen=True)
class Seen:
    """An image as it was drawn and as the classifier saw it: the upright original and its maps (1, D, H, W)."""

    image: Image.Image
    maps: torch.Tensor
    logits: torch.Tensor


class Illustrator:
    """Draws explanations of a finished run."""

    def __init__(self, run: Run, prototypes_per_channel: int) -> None:
        config = run.config
        self._device = take_device(likely_device(config.resources), torch.get_num_threads())
        self._run, self._classifier = run, run.classifier.to(self._device)
        self._basis = read_basis(run.run_dir).to(self._device)
        self._weight = absorb(self._classifier.weight, self._basis)
        self._count = prototypes_per_channel
        table = read_table(run.run_dir, table_file("prototypes"))
        self._table = table.filter((pc.field("basis") == "after") & (pc.field("rank") <= prototypes_per_channel))
        self._prototypes: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self._addresses: dict[int, Address] = {}
        self._read = lru_cache(maxsize=_CACHED_IMAGES)(_read)
        self._see = lru_cache(maxsize=1)(self._look)

    def explain(self, address: Address, k: int, rank_by: Any) -> tuple[Seen, Explained]:
        """One image, explained here and now. Raises InputError for an image that cannot be read."""
        try:
            seen = self._see(address)
        except (ImageError, UnreadableError) as error:
            raise InputError(f"{address.uri}: {error}; give a whole image file") from None
        with torch.inference_mode():
            bias = self._classifier.bias
            return seen, explain_maps(seen.maps, seen.logits, self._weight, bias, self._basis, k, rank_by)

    def draw(self, image_id: str, address: Address, rows: list[dict[str, Any]]) -> Image.Image:
        """The picture of one image from its rows of the table `explanations`, strongest channel first."""
        picture = self.compose(image_id, address, rows)
        try:
            return draw_explanation(picture)
        except ValueError as error:
            raise ResultError(f"{error}; its file or the classifier changed since: explain the split again") from error

    def compose(self, image_id: str, address: Address, rows: list[dict[str, Any]]) -> ExplanationPicture:
        """What that picture shows: numbers from the rows, images from the files that the rows name."""
        try:
            first, seen = rows[0], self._see(address)
        except (ImageError, UnreadableError) as error:
            raise InputError(f"{address.uri}: {error}; was it changed? explain the split again") from None
        self._find_prototypes(rows)
        names = self._run.classes.names
        bias = float(self._classifier.bias[first["predicted"]])
        shares = self._weight[first["predicted"]] * (self._basis @ seen.maps[0].mean(dim=(1, 2)))
        others = torch.ones_like(shares, dtype=torch.bool)
        others[[row["channel"] for row in rows]] = False
        return ExplanationPicture(
            image_id=image_id,
            image=seen.image,
            predicted=names[first["predicted"]],
            label=None if first["label"] is None else names[first["label"]],
            logit=first["logit"],
            probability=first["probability"],
            bias=bias,
            rest=float(shares[others].sum()),
            rows=tuple(self._channel(seen, row) for row in rows),
            tolerance=max(1e-3, PRECISION_TOLERANCES[self._run.config.resources.precision]),
            footer=f"{self._run.config.name} · {self._run.config.model.architecture} · EPIC basis",
        )

    def _find_prototypes(self, rows: list[dict[str, Any]]) -> None:
        """Makes the prototypes of these channels, and where their images lie, known; not those of all channels."""
        new = {(row["sign"], row["channel"]) for row in rows} - self._prototypes.keys()
        channels = pa.array(sorted({channel for _, channel in new}), pa.int32())
        self._prototypes |= {key: [] for key in new}
        for row in self._table.filter(pc.is_in(self._table["channel"], value_set=channels)).to_pylist():
            if (row["sign"], row["channel"]) in new:
                self._prototypes[row["sign"], row["channel"]].append(row)
        positions = {row["position"] for key in new for row in self._prototypes[key]} - self._addresses.keys()
        if positions:
            self._addresses |= addresses_at(self._run.run_dir, "manifest", FITTING_SPLIT, positions)

    def _channel(self, seen: Seen, row: dict[str, Any]) -> ChannelRow:
        prototypes = self._prototypes[row["sign"], row["channel"]]
        sign = 1.0 if row["sign"] == "positive" else -1.0
        heat = sign * torch.einsum("d,dhw->hw", self._basis[row["channel"]], seen.maps[0])
        return ChannelRow(
            channel=row["channel"],
            sign=row["sign"],
            share=row["share"],
            score=row["score"],
            purity=row["purity"],
            explained=self._tile(
                seen.image, heat.cpu().numpy(), row, f"peak · purity {row['purity']:.2f} · this image"
            ),
            prototypes=tuple(self._prototype(prototype) for prototype in prototypes),
        )

    def _prototype(self, row: dict[str, Any]) -> Tile:
        name = "no label" if row["label"] is None else self._run.classes.names[row["label"]]
        caption = f"{name} · purity {row['purity']:.2f} · {row['image_id'].rsplit('/', 1)[-1]}"
        heat = (1.0 if row["sign"] == "positive" else -1.0) * np.array(row["heat"], np.float32)
        try:
            image = self._read(self._addresses[row["position"]])
        except (ImageError, UnreadableError):
            return Tile(None, None, (0.0, 0.0, 1.0, 1.0), None, caption)
        return self._tile(image, heat.reshape(self._classifier.grid), row, caption)

    def _tile(self, image: Image.Image, heat: np.ndarray, row: dict[str, Any], caption: str) -> Tile:
        box = _box(row)
        grid_box = self._classifier.preprocessing.grid_box(image.size)
        return Tile(image, heat, grid_box, box, caption if box else f"{caption} (peak in padding)")

    def _look(self, address: Address) -> Seen:
        data, preprocessing = _bytes(address), self._classifier.preprocessing
        image = decode_image(data)
        # what the classifier saw, which a reduced JPEG is and what a person sees is not
        seen = preprocessing.load(data)[0] if preprocessing.scaled_decode else preprocessing.apply(image)
        pixels = torch.from_numpy(seen[None])
        with torch.inference_mode():
            maps, logits = self._classifier(self._classifier.normalise(pixels.to(self._device)))
        return Seen(image, maps, logits)


def _read(address: Address) -> Image.Image:
    return decode_image(_bytes(address))


def _bytes(address: Address) -> bytes:
    try:
        return address.read()
    except StorageAway as error:
        raise RunFailed(f"{address.uri}: {error}") from error


def _box(row: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """The row's peak box, or None for a peak in the padding around the image."""
    left, top, right, bottom = map(float, row["box_xyxy_px"])
    return (left, top, right, bottom) if left < right and top < bottom else None


def rows_of(explained: Explained, run: Run, image_size: tuple[int, int], label: int | None = None) -> list[dict]:
    """The rows of the table `explanations` for one image explained by `Illustrator.explain`."""
    grid = run.classifier.grid
    cells = np.stack(np.divmod(explained.cells[0].cpu().numpy(), grid[1]), axis=1)
    boxes = run.classifier.preprocessing.cell_boxes(cells, grid, np.array([image_size] * len(cells)))
    return [
        {
            "label": label,
            "predicted": int(explained.predicted[0]),
            "logit": float(explained.logit[0]),
            "probability": float(explained.probability[0]),
            "rank": rank + 1,
            "channel": int(explained.channels[0, rank]),
            "sign": SIGN_NAMES[int(explained.signs[0, rank])],
            "share": float(explained.shares[0, rank]),
            "score": float(explained.scores[0, rank]),
            "value": float(explained.values[0, rank]),
            "purity": float(explained.purity[0, rank]),
            "cell_row": int(cells[rank, 0]),
            "cell_col": int(cells[rank, 1]),
            "box_xyxy_px": boxes[rank].tolist(),
        }
        for rank in range(explained.channels.shape[1])
    ]


def draw_split(run: Run, split: str, count: int, prototypes_per_channel: int, reporter: Reporter) -> list[str]:
    """Draws `count` of a split's explained images, spread evenly; gives the files, relative to the run."""
    tables = run.run_dir.list(table_folder("explanations", split))
    place = {
        position: file
        for file in tables
        for position in np.unique(to_numpy(read_table(run.run_dir, file, ["position"])["position"])).tolist()
    }
    positions, count = sorted(place), min(count, len(place))
    chosen = [positions[number * len(positions) // count] for number in range(count)]
    rows = {position: _rows_at(run, place[position], position) for position in chosen}
    addresses = find_images(run.run_dir, "selection", split, (found[0]["image_id"] for found in rows.values()))
    folder = f"{PICTURES}/{split}"
    run.run_dir.delete_folder(folder)
    illustrator, files = Illustrator(run, prototypes_per_channel), []
    with reporter.stage("pictures", len(chosen), "pictures") as meter:
        for position in chosen:
            image_id = rows[position][0]["image_id"]
            picture = illustrator.draw(image_id, addresses[image_id], rows[position])
            files.append(f"{folder}/{position:06d}-{safe_name(image_id)}.png")
            publish_picture(run, files[-1], picture)
            meter.advance()
    return files


def _rows_at(run: Run, file: str, position: int) -> list[dict[str, Any]]:
    """The rows of one image in a file of explanations, strongest channel first."""
    table = read_table(run.run_dir, file)
    return table.filter(pc.equal(table["position"], position)).sort_by("rank").to_pylist()


def publish_picture(run: Run, relative: str, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    run.run_dir.publish_bytes(relative, buffer.getvalue())


def safe_name(image_id: str) -> str:
    """A file name for an image id that cannot leave its folder."""
    stem = image_id.rsplit("/", 1)[-1].rsplit("#", 1)[-1].rsplit(".", 1)[0]
    return re.sub(r"[^\w-]+", "_", stem).strip("_")[:80] or "image"
