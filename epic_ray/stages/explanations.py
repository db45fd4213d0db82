"""Explanations of a split: one pass, the strongest channels of every image's prediction."""

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from epic_ray.config import ModelConfig
from epic_ray.method.basis import absorb
from epic_ray.method.explanation import Explained, explain_maps
from epic_ray.method.preprocessing import Preprocessing
from epic_ray.run_dir import RunDir, unit_file
from epic_ray.stages.attempts import Attempts
from epic_ray.stages.features import NON_FINITE
from epic_ray.stages.forwarding import ForwardingActor
from epic_ray.stages.prototypes import SIGN_NAMES
from epic_ray.stages.resources import Resources
from epic_ray.stages.rounds import read_basis
from epic_ray.stages.unit_actor import Unit
from epic_ray.stages.units import UnitFacts
from epic_ray.tables import TABLES, build_table, write_table


class ExplainActor(ForwardingActor):
    """Turns a unit of images into a file of explanations."""

    def __init__(
        self,
        run_dir: RunDir,
        model: ModelConfig,
        resources: Resources,
        attempts: Attempts,
        channels_per_image: int,
        rank_by: Literal["share", "score"],
    ) -> None:
        super().__init__(run_dir, model, resources, attempts)
        self._basis = read_basis(run_dir).to(self.device)  # no argument: Ray loses large ones with the node they lie on
        self._weight = absorb(self.classifier.weight, self._basis)
        self._count, self._rank_by = channels_per_image, rank_by

    def compute(self, unit: Unit, readable: np.ndarray) -> list[Explained]:
        parts = [
            explain_maps(maps, logits, self._weight, self.classifier.bias, self._basis, self._count, self._rank_by)
            for _, maps, logits in self.forward(unit.pixels, readable)
        ]
        return [part.cpu() for part in parts]

    def publish(self, unit: Unit, readable: np.ndarray, results: list[Explained]) -> int:
        finite = _finite(results)
        for row in readable[~finite]:
            unit.reasons[row] = NON_FINITE
        table = explanation_table(unit, readable, results, self.classifier.grid, self.classifier.preprocessing)
        difference, agrees = _joined(results, "difference")[finite], _joined(results, "agrees")[finite]
        relative = difference / (1 + np.abs(_joined(results, "logit")[finite]))
        good = int(finite.sum())
        facts = UnitFacts(
            decoded=len(readable),
            readable=good,
            failed=unit.rows.num_rows - good,
            max_abs_difference=float(difference.max(initial=0)),
            max_relative_difference=float(relative.max(initial=0)),
            agreeing=int(agrees.sum()),
        )
        table = table.replace_schema_metadata((table.schema.metadata or {}) | self.metadata(unit, facts))
        return write_table(self.run_dir, unit_file("explanations", unit.split, unit.number), table)


def _joined(parts: list[Explained], name: str) -> np.ndarray:
    return torch.cat([getattr(part, name) for part in parts]).cpu().numpy() if parts else np.empty(0, np.float32)


def _finite(parts: list[Explained]) -> np.ndarray:
    """Which of the images have finite logits, the classifier's own and rebuilt from their map."""
    return np.isfinite(_joined(parts, "logit")) & np.isfinite(_joined(parts, "difference"))


def explanation_table(
    unit: Unit, rows: np.ndarray, parts: list[Explained], grid: tuple[int, int], preprocessing: Preprocessing
) -> pa.Table:
    """The rows of table `explanations` for these images of a unit, one a channel; non-finite images have none."""
    if not parts:
        return TABLES["explanations"].schema().empty_table()
    finite = _finite(parts)

    def joined(name: str) -> np.ndarray:
        return _joined(parts, name)[finite]

    rows, k = rows[finite], parts[0].channels.shape[1]
    each = np.repeat(rows, k)
    cells = np.stack(np.divmod(joined("cells").reshape(-1), grid[1]), axis=1)
    columns: dict[str, Any] = {name: unit.column(name, each) for name in ("split", "position", "image_id", "label")}
    for name, dtype in (("predicted", np.int32), ("logit", np.float32), ("probability", np.float32)):
        columns[name] = np.repeat(joined(name).astype(dtype), k)
    columns["rank"] = np.tile(np.arange(1, k + 1, dtype=np.int32), len(rows))
    columns["channel"] = joined("channels").reshape(-1).astype(np.int32)
    columns["sign"] = [SIGN_NAMES[sign] for sign in joined("signs").reshape(-1).tolist()]
    for column, name in (("share", "shares"), ("score", "scores"), ("value", "values"), ("purity", "purity")):
        columns[column] = joined(name).reshape(-1).astype(np.float32)
    columns["cell_row"], columns["cell_col"] = cells[:, 0].astype(np.int32), cells[:, 1].astype(np.int32)
    columns["box_xyxy_px"] = preprocessing.cell_boxes(cells, grid, unit.sizes_px[each])
    return build_table("explanations", columns)
