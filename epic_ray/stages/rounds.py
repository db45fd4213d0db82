"""The rounds of a fit on disk: `fit/round-NNN.pt`, each all that the next needs, 000 the start; and U at its end."""

import io
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from epic_ray.errors import ResultError, RunFailed
from epic_ray.method.solvers import FitState
from epic_ray.run_dir import BASIS, RunDir, round_file, round_number


def newest_round(run_dir: RunDir) -> int | None:
    """The number of the newest round on disk: 0 where only the start is chosen, None where there is nothing."""
    numbers = [round_number(file) for file in run_dir.list("fit")]
    return max((number for number in numbers if number is not None), default=None)


def finished_rounds(run_dir: RunDir) -> int:
    """How many rounds are done."""
    return newest_round(run_dir) or 0


def read_round(run_dir: RunDir, number: int) -> dict[str, Any]:
    """What a round left, on the CPU. Raises ResultError for a file that is not whole."""
    try:
        return torch.load(io.BytesIO(run_dir.read_bytes(round_file(number))), map_location="cpu", weights_only=True)
    except ResultError:
        raise
    except Exception as error:  # torch's unpickler ends in many kinds of error on bytes that are none of its own
        where = run_dir.show(round_file(number))
        raise ResultError(f"{where}: is no whole round of a fit ({error}); remove it and run again") from None


def read_own_round(run_dir: RunDir, number: int, fingerprint: str) -> dict[str, Any]:
    """A round of this very fit. Raises RunFailed for one that a start with other settings has left meanwhile."""
    content = read_round(run_dir, number)
    if content["fingerprint"] != fingerprint:
        where = run_dir.show(round_file(number))
        raise RunFailed(f"{where}: is of another fit, which still wrote when this one began; start again")
    return content


def drop_foreign_rounds(run_dir: RunDir, fingerprint: str) -> None:
    """Removes the rounds of another fit (other features or settings)."""
    number = newest_round(run_dir)
    if number is not None and read_round(run_dir, number)["fingerprint"] != fingerprint:
        run_dir.delete(run_dir.list("fit"))


def write_round(
    run_dir: RunDir,
    fingerprint: str,
    state: FitState,
    history: list[dict[str, Any]],
    seen: np.ndarray,
    counts: dict[str, int],
) -> None:
    """Publishes a finished round, or the start as round 0: all that the next one needs."""
    content = {
        "fingerprint": fingerprint,
        "round": state.round,
        "basis": state.basis.cpu(),
        "start": state.start.cpu(),
        "parameter": None if state.parameter is None else state.parameter.cpu(),
        "optimizer": state.optimizer,
        "history": history,
        "seen": torch.from_numpy(seen),
        **counts,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    run_dir.publish_bytes(round_file(state.round), buffer.getvalue())


def counts_so_far(run_dir: RunDir, fingerprint: str) -> dict[str, int]:
    """Images decoded and forwarded by the rounds that earlier starts of this same fit have finished."""
    drop_foreign_rounds(run_dir, fingerprint)
    number = newest_round(run_dir)
    content = {"decoded": 0, "forwarded": 0} if number is None else read_round(run_dir, number)
    return {key: content[key] for key in ("decoded", "forwarded")}


def read_basis(run_dir: RunDir) -> torch.Tensor:
    """U of a finished fit, (channel, feature)."""
    try:
        tensors = load_tensors(run_dir.read_bytes(BASIS))
    except SafetensorError as error:
        raise ResultError(f"{run_dir.show(BASIS)}: cannot be read ({error}); run the fit again") from None
    if "U" not in tensors:
        raise ResultError(f"{run_dir.show(BASIS)}: holds no `U`; run the fit again")
    return tensors["U"]
