"""When a fault strikes: in the middle of the pass, of the fit, or of the publishing of a file."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from harness import Disturbed, Start, kill, wait_gone, wait_until

from epic_ray.run_dir import round_file


@dataclass(frozen=True)
class Moment:
    """`arm` it before the start; `wait` gives the process that is held there, None where nothing is held.

    units_redone: the least and the most units that a fault of the driver or of a machine costs, with two actors.
    """

    point: str
    match: str = ""
    after: int = 1
    units_redone: tuple[int, int] = (0, 0)

    def arm(self, run: Disturbed) -> None:
        if self.point != "round":
            run.points.arm(self.point, "hold", self.match, self.after)

    def wait(self, run: Disturbed, start: Start) -> int | None:
        if self.point != "round":
            return run.points.wait(self.point, start)
        wait_until(lambda: run.run_dir.exists(round_file(2)), start)
        return None


MOMENTS = {
    "pass": Moment("forward", after=3, units_redone=(1, 2)),
    "fit": Moment("round"),
    "publish of a unit": Moment("publish", "/tables/features/train/", after=5, units_redone=(1, 2)),
    "publish of a round": Moment("publish", "/fit/round-003"),
    "publish of U": Moment("publish", "/basis/basis"),
    "publish of a mark": Moment("publish", "/marks/prototypes"),
    "publish of run.json": Moment("publish", "/run.json"),
}


def strike(run: Disturbed, moment: Moment, blow: Callable[[Start], None]) -> tuple[int, str]:
    """Starts the run and lets `blow` fall on it at a moment; gives how it ended: exit code and stderr."""
    moment.arm(run)
    start = run.start()
    held = moment.wait(run, start)
    blow(start)
    exit_code, said = start.end(), start.stderr()
    if held:
        wait_gone(held)
    run.points.clear()
    return exit_code, said


def signalled(number: int, group: bool = False) -> Callable[[Start], None]:
    """A signal for the driver alone, or, as from a terminal, for all of its process group."""
    return lambda start: kill(-start.process.pid if group else start.process.pid, number)


def meanwhile(work: Callable[[], None]) -> threading.Thread:
    """Does work beside a start in this process."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
