"""One pass over images: decode on CPU tasks, then an actor with the classifier; a whole unit at a time.

A unit is a fixed slice of a split's manifest and one row of Ray Data from end to end, so that nothing can cut or join
it on the way: its address at first, then its decoded images packed into one value. Its batches are fixed, so a unit
that is computed again is computed equal; the actor publishes a unit's files itself, the one that commits it last.
"""

import gc
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import ray
import ray.data as rd

from epic_ray import errors, interrupts
from epic_ray.errors import EpicError, RunFailed
from epic_ray.logs import Reporter
from epic_ray.method.preprocessing import Preprocessing
from epic_ray.run_dir import RunDir
from epic_ray.stages.attempts import Attempts
from epic_ray.stages.decode_unit import DecodeUnit
from epic_ray.stages.images import UnitRange
from epic_ray.stages.resources import Resources, first_cause
from epic_ray.stages.unit_actor import CALLS_AT_ONCE, GuardedActor, UnitActor

# Ray replaces what it loses by itself; what it gives up on is begun anew from what is committed, so many times without
# a further unit in between
_MOST_IN_VAIN = 3


@dataclass
class PassTotals:
    """What a pass really did, summed over its units: counted where it happened.

    units_redone: forwards of units that were begun again, since the last pass that came to its end.
    """

    images: int = 0
    decoded: int = 0
    forwarded: int = 0
    failed: int = 0
    units_redone: int = 0
    bytes_written: int = 0
    peak_memory_bytes: int = 0
    actors: set[str] = field(default_factory=set)

    def add(self, summary: dict[str, Any]) -> None:
        self.images += summary["images"]
        self.decoded += summary["decoded"]
        self.forwarded += summary["forwarded"]
        self.failed += summary["failed"]
        self.bytes_written += summary["bytes_written"]
        self.peak_memory_bytes = max(self.peak_memory_bytes, summary["peak_memory_bytes"])
        self.actors.add(summary["actor"])


def run_pass(
    stage: str,
    actor: type[UnitActor],
    arguments: dict[str, Any],
    units_to_do: Callable[[], list[UnitRange]],
    preprocessing: Preprocessing,
    resources: Resources,
    reporter: Reporter,
    images: int,
    decoder: type[DecodeUnit] = DecodeUnit,
) -> PassTotals:
    """Sends the units that are not committed through decode tasks and a pool of actors; gives what was done.

    images: those of all units, committed or not. decoder: what turns the address of a unit into its pixels.
    Raises the first cause of a failure; what Ray itself could not go on with is taken up again from what is committed.
    """
    totals = PassTotals()
    units = units_to_do()
    if not units:
        return totals
    run_dir: RunDir = arguments["run_dir"]
    attempts = Attempts(run_dir, stage)
    decode = decoder(stage, run_dir, attempts, preprocessing)
    arguments = {**arguments, "attempts": attempts}
    already = images - sum(unit.count for unit in units)
    with reporter.stage(stage, images, "images", already=already) as meter:
        in_vain = 0
        while units:
            before, fault = len(units), None
            try:
                with closing(_execute(stage, actor, arguments, decode, units, resources)) as summaries:
                    for summary in summaries:
                        totals.add(summary)
                        meter.advance(summary["images"], f"{totals.failed} failed" if totals.failed else "")
            except (ray.exceptions.RayError, RuntimeError) as error:
                fault = first_cause(error, stage)
                if not isinstance(fault, RunFailed):
                    raise fault from error
            interrupts.check()
            units = units_to_do()
            if fault is None and units:
                raise RunFailed(
                    f"{stage}: {len(units)} unit(s) are not committed although the pass ended; "
                    f"is {run_dir} a folder that all machines share?"
                )
            in_vain = in_vain + 1 if len(units) == before else 1
            if fault and in_vain >= _MOST_IN_VAIN:
                raise fault
            if fault:
                reporter.say(f"{fault}; going on with the {len(units)} unit(s) that are not committed")
    totals.units_redone = attempts.clear("forward")
    return totals


def _execute(
    stage: str,
    actor: type[UnitActor],
    arguments: dict[str, Any],
    decode: DecodeUnit,
    units: list[UnitRange],
    resources: Resources,
) -> Generator[dict[str, Any], None, None]:
    """One execution of Ray Data over units; gives the summary of each as it is committed."""
    context = rd.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    actors, calls = min(resources.feature_actors, len(units)), CALLS_AT_ONCE if resources.device == "cuda" else 1
    dataset = rd.from_arrow([pa.Table.from_pylist([asdict(unit)]) for unit in units]).map_batches(
        decode.__call__, batch_size=1, batch_format="pyarrow", num_cpus=1
    )
    dataset = dataset.map_batches(
        GuardedActor,
        batch_size=1,
        batch_format="pyarrow",
        compute=rd.ActorPoolStrategy(
            min_size=1,
            max_size=actors,
            initial_size=min(actors, resources.actors_at_once),
            max_concurrent_calls_per_actor=calls,
            max_tasks_in_flight_per_actor=calls + 1,  # a decoded unit may take 77 MB: one in hand is enough
            enable_true_multi_threading=True,  # the actor's own lock keeps its device to one unit at a time
        ),
        num_gpus=resources.gpus_per_actor or None,
        num_cpus=0,  # actors that hold CPUs can leave none to the tasks they wait for; and decoding stays apart
        fn_constructor_kwargs={"stage": stage, "actor": actor, "arguments": arguments},
    )
    rows = dataset.iter_rows()
    try:
        for summary in rows:
            if summary.get("fault"):
                fault: EpicError = getattr(errors, summary["fault"])(summary["message"])
                raise fault
            yield summary
    finally:
        # an actor pool keeps its GPUs until its dataset is gone
        del dataset, rows
        gc.collect()
