"""Which units were begun: so that a unit that kills its process is met with care, and not for ever.

A small file is published before each attempt, under the run's `attempts/`. A process that dies leaves it behind, and
whoever takes the unit up again, in this start or a later one, sees that somebody began it before.
"""

import uuid
from collections import Counter

from epic_ray.errors import RunFailed
from epic_ray.run_dir import RunDir, attempt_file, attempts_folder

# a preempted machine counts as an attempt too: enough for a few of them, few enough not to run for ever
MOST_ATTEMPTS = 5
_ADVICE = {
    "decode": "an image of it may need more memory than there is, or its machine was taken away each time",
    "forward": "the process may have run out of memory: lower resources.batch_size; or its machine was taken away",
}


class Attempts:
    """The attempts at the units of a stage; one object a start, sent along to its processes."""

    def __init__(self, run_dir: RunDir, stage: str, start: str = "") -> None:
        self._run_dir, self._stage, self._start = run_dir, stage.replace(" ", "-"), start or uuid.uuid4().hex[:8]

    def begin(self, split: str, unit: int, step: str) -> int:
        """Notes that a step (`decode`, `forward`) of a unit begins; gives how many times it was begun before.

        Raises RunFailed where it was begun too many times in this start.
        """
        files = self._run_dir.list(attempts_folder(self._stage, split, unit))
        earlier = [file.rsplit("/", 1)[-1].split("-") for file in files]
        starts = Counter(parts[1] for parts in earlier if len(parts) == 3 and parts[0] == step)
        if starts[self._start] >= MOST_ATTEMPTS:
            raise RunFailed(
                f"{self._stage}: unit {unit} of {split} was begun {starts[self._start]} times, and its process died "
                f"each time ({step}); {_ADVICE[step]}"
            )
        number = sum(starts.values())
        file = attempt_file(self._stage, split, unit, f"{step}-{self._start}-{number}")
        self._run_dir.publish(file, lambda stream: None, durable=False)
        return number

    def clear(self, step: str) -> int:
        """Forgets the attempts of a stage that is done; gives how many at `step` were not the first of their unit."""
        files = self._run_dir.list(attempts_folder(self._stage))
        self._run_dir.delete_folder(attempts_folder(self._stage))
        begun = [file.rsplit("/", 1) for file in files]
        units = [unit for unit, name in begun if name.startswith(f"{step}-")]
        return len(units) - len(set(units))
