"""The baseline of `pass.py`: processes that read, decode and forward files, and nothing else."""

import multiprocessing
import queue
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from epic_ray.stages.resources import available_cores

TRIAL_IMAGES = 256
TRIAL_ROUNDS = 3
TRIAL_SECONDS = 120  # for all settings; the first round is made whatever it takes


@dataclass(frozen=True)
class Loop:
    """How the bare loop works: processes, threads of each, images of a batch, whether the next is decoded meanwhile."""

    processes: int
    threads: int
    batch: int
    ahead: bool

    def __str__(self) -> str:
        decode = "decoding ahead" if self.ahead else "decoding in line"
        return f"{self.processes} process(es) x {self.threads} thread(s), batch {self.batch}, {decode}"


class BareLoops:
    """Processes that wait with a loaded network for a loop to run. They are started once, and not timed."""

    def __init__(self, model: dict[str, Any], count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._answers = context.Queue()
        self._orders = [context.Queue() for _ in range(count)]
        self._workers = [
            context.Process(target=_serve, args=(model, orders, self._answers), daemon=True) for orders in self._orders
        ]
        for worker in self._workers:
            worker.start()

    def __enter__(self) -> "BareLoops":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.terminate()
            worker.join()

    def run(self, files: list[str], loop: Loop, part: str = "") -> float:
        """Images a second of the loop, or of a part of it (`decode`, `compute`) alone."""
        orders = self._orders[: loop.processes]
        for number, order in enumerate(orders):
            order.put((asdict(loop), files[number :: loop.processes], part))
        self._collect(loop.processes)  # all have warmed up
        for order in orders:
            order.put("go")
        spans = self._collect(loop.processes)
        return len(files) / (max(end for _, end in spans) - min(begin for begin, _ in spans))

    def _collect(self, count: int) -> list[Any]:
        answers: list[Any] = []
        while len(answers) < count:
            try:
                answers.append(self._answers.get(timeout=1))
            except queue.Empty:
                dead = [worker.exitcode for worker in self._workers if not worker.is_alive()]
                if dead:
                    sys.exit(f"the bare loop: {len(dead)} process(es) ended, exit code {dead[0]}: out of memory?")
        return answers


def best_loop(loops: BareLoops, files: list[str]) -> tuple[Loop, dict[Loop, float]]:
    """The fastest of the settings on some of the files, and the median images/s of each: all in turn, again and again
    while there is time."""
    cores = available_cores()
    shapes = dict.fromkeys([(1, cores), (cores, 1), *([(cores // 4, 4)] if cores >= 8 else [])])
    settings = [Loop(*shape, batch, ahead) for shape, batch, ahead in product(shapes, (16, 64), (False, True))]
    count = max(TRIAL_IMAGES, 64 * cores)  # a full batch for each process
    some = files[:: max(1, len(files) // count)][:count]
    rates: dict[Loop, list[float]] = {loop: [] for loop in settings}
    start = time.monotonic()
    for done in range(TRIAL_ROUNDS):
        if done and (time.monotonic() - start) * (done + 1) > TRIAL_SECONDS * done:
            break
        for loop in settings:
            rates[loop].append(loops.run(some, loop))
    trials = {loop: statistics.median(found) for loop, found in rates.items()}
    return max(trials, key=lambda loop: trials[loop]), trials


def _serve(model: dict[str, Any], orders: Any, answers: Any) -> None:
    import torch

    from epic_ray.config import ModelConfig
    from epic_ray.stages.loading import load

    classifier = load(ModelConfig.model_validate(model))
    network = classifier.model.to(memory_format=torch.channels_last)
    pooled: list[torch.Tensor] = []
    pool = next(module for name, module in network.named_modules() if name == "avgpool")
    pool.register_forward_hook(lambda module, taken, found: pooled.append(found.flatten(1)))
    while True:
        loop, files, part = orders.get()
        torch.set_num_threads(loop["threads"])
        still = torch.zeros((loop["batch"], *classifier.preprocessing.crop, 3), dtype=torch.uint8)
        with torch.inference_mode():
            network(classifier.normalise(still))
            pooled.clear()
            answers.put("ready")
            orders.get()
            begin = time.time()
            for images in _batches(files, loop, classifier, still if part == "compute" else None):
                if part != "decode":
                    network(classifier.normalise(images)).argmax(dim=1)
            answers.put((begin, time.time()))
        pooled.clear()


def _batches(files: list[str], loop: dict[str, Any], classifier: Any, still: Any) -> Iterator[Any]:
    """Batches of decoded images, by as many threads as the loop has (Pillow lets them run at once)."""
    import torch

    from epic_ray.method.preprocessing import decode_image

    def decode(path: str) -> np.ndarray:
        return classifier.preprocessing.apply(decode_image(Path(path).read_bytes()))

    chunks = [files[place : place + loop["batch"]] for place in range(0, len(files), loop["batch"])]
    if still is not None:
        yield from (still[: len(chunk)] for chunk in chunks)
        return
    with ThreadPoolExecutor(loop["threads"]) as pool:
        begun = []
        for place in range(len(chunks)):
            while len(begun) < min(len(chunks), place + 1 + loop["ahead"]):
                begun.append([pool.submit(decode, path) for path in chunks[len(begun)]])
            images = torch.from_numpy(np.stack([coming.result() for coming in begun[place]]))
            begun[place] = []
            yield images
