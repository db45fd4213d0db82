"""The search for prototypes from files on disk, against the bare product and top-n from memory on the same threads.

    python benchmarks/search.py [--rows 1281167] [--channels 512] [--prototypes 100] [--device cuda] [--run RUN]

Features are made up (non-negative, skewed, one class after another as in ImageNet's listing) and written by the
project's own writer, 512 images a file; U is a random rotation. The baseline is the plain way: `torch.topk` of the
scores of each block, merged by another `topk`, at the fastest of several block sizes and layouts; where the features do
not fit `--memory-gib`, both work on as many rows as do. Peak memory is that of a process that searches all rows, and
of one that searches 200,000 rows of 2,048 channels with a fit's cache of features: what it takes does not depend on the
rows once the cache is full (`epic_ray/stages/search.py`). Ends with 1 where an aim is missed. `--run` counts the
prototypes that float16 would change in a finished run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import bench
import torch
from made_features import feature_files, forget, write_features

from epic_ray.config import ResourcesConfig
from epic_ray.method.topk import BLOCK_ROWS, Query, TopN, search, search_all
from epic_ray.run_dir import RunDir
from epic_ray.stages.rounds import read_basis
from epic_ray.stages.search import PooledBlocks, file_blocks
from epic_ray.tables import read_table, to_numpy

SAMPLED_CHANNELS = 16
COUNTS = (100, 20, 5)
WIDE_CHANNELS, WIDE_ROWS = 2048, 200_000
MOST_BYTES, MOST_RATIO = 3 * 1024**3, 2.0
MOST_BESIDE = 3  # runs of what is not judged
QUERIES = ((20, 1), (5, -1))  # prototypes and sign, asked under either basis


def main() -> int:
    """Writes the features, times, checks and prints; 1 where an aim is missed."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.alone:
        return search_alone(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        verdicts = compare(arguments, folder)
        verdicts.append(memory_verdict(arguments, folder))
    if arguments.run:
        print(changed_in_run(RunDir(arguments.run)) + "\n")
    print(bench.table(verdicts))
    return int(any(row["reached"] == "no" for row in verdicts))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_281_167, help="images (default: ImageNet's)")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--prototypes", type=int, default=100, help="images kept for each channel")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=bench.cores())
    parser.add_argument("--memory-gib", type=float, default=3.0, help="features that the baseline may hold in memory")
    parser.add_argument("--device", default="cpu", help="where products are taken; the baseline's features lie there")
    parser.add_argument(
        "--folder", type=Path, help="where the files go and stay, to be used again (default: temporary)"
    )
    parser.add_argument("--run", help="a finished run, in which to count the prototypes that float16 changes")
    parser.add_argument("--wide-rows", type=int, default=WIDE_ROWS, help="images x 2,048 whose search is weighed")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--cache-bytes", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the baseline


def bare(pooled: torch.Tensor, basis: torch.Tensor, n: int, rows: int, transposed: bool, keep: bool = True) -> TopN:
    """The product block by block and, where they are to be kept, the running top-n, as anyone would write them."""
    best = TopN.empty(len(basis), n, basis.device)
    for start in range(0, len(pooled), rows):
        block = pooled[start : start + rows]
        scores = basis @ block.T if transposed else (block @ basis.T).T
        if keep:
            values, places = scores.topk(min(n, len(block)), dim=1)
            values, order = torch.cat([best.values, values], dim=1).topk(n, dim=1)
            best = TopN(values, torch.cat([best.indices, places + start], dim=1).gather(1, order))
    return on_cpu(best)


def bare_queries(pooled: torch.Tensor, basis: torch.Tensor, rows: int) -> list[TopN]:
    """The four queries from one product a basis, the identity's a mere transpose; negated scores for the sign -1."""
    best = [TopN.empty(len(basis), n, basis.device) for _ in range(2) for n, _ in QUERIES]
    for start in range(0, len(pooled), rows):
        block = pooled[start : start + rows]
        for number, scores in enumerate((block.T.contiguous(), basis @ block.T)):
            for place, (n, sign) in enumerate(QUERIES, number * len(QUERIES)):
                values, places = (scores if sign > 0 else -scores).topk(min(n, len(block)), dim=1)
                values, order = torch.cat([best[place].values, values], dim=1).topk(n, dim=1)
                best[place] = TopN(values, torch.cat([best[place].indices, places + start], dim=1).gather(1, order))
    return [on_cpu(top) for top in best]


def on_cpu(top: TopN) -> TopN:
    """The same in main memory, where it is only when the device is done with it."""
    return TopN(top.values.cpu(), top.indices.cpu())


def tune(pooled: torch.Tensor, basis: torch.Tensor, n: int) -> tuple[int, bool]:
    """The fastest block size and layout of the baseline, on the first images."""
    some = pooled[: 4 * 32_768]
    bare(some, basis, n, 8192, True)  # threads and memory are there when it counts
    seconds = {}
    for setting in [(rows, transposed) for rows in (2048, 4096, 8192, 16_384, 32_768) for transposed in (True, False)]:
        begin = time.perf_counter()
        for _ in range(2):
            bare(some, basis, n, *setting)
        seconds[setting] = time.perf_counter() - begin
    return min(seconds, key=seconds.__getitem__)


# --- what is compared


def compare(arguments: argparse.Namespace, folder: Path) -> list[dict[str, str]]:
    """Prints all tables, for features of float32 and of float16; gives the verdicts on time and exactness."""
    rows, channels, n = arguments.rows, arguments.channels, arguments.prototypes
    held = min(rows, int(arguments.memory_gib * 1024**3 / (4 * channels)) // BLOCK_ROWS * BLOCK_ROWS)
    basis = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(0)))[0]
    basis = basis.to(arguments.device)
    print(f"{bench.heading()}; {arguments.threads} threads\n")
    runs = {dtype: RunDir(str(folder / dtype)) for dtype in ("float32", "float16")}
    storage = [store(run_dir, dtype, arguments) for dtype, run_dir in runs.items()]
    pooled = torch.cat([block.to(basis) for _, block in blocks_of(runs["float32"], held)])
    setting = tune(pooled, basis, n)
    print(f"Baseline: blocks of {setting[0]}, scores {'(D, rows)' if setting[1] else '(rows, D)'}.\n")
    timed = list(timings(arguments, runs, pooled, basis, setting))
    print(f"{held:,} images x {channels}, n = {n}\n\n{bench.table(timed)}\n")
    print(bench.table([row | alone(arguments, runs[row["files"]], basis, folder) for row in storage]) + "\n")
    found = {dtype: on_cpu(search(blocks_of(run_dir, held), basis, n)) for dtype, run_dir in runs.items()}
    exact, text = exactness(pooled, basis, found["float32"])
    print(text + "\n")
    print(changed(found["float32"], found["float16"], f"made-up features, {held:,} images") + "\n", flush=True)
    ratio, sampled = float(timed[0]["ratio"]), f"all of {SAMPLED_CHANNELS} sampled channels"
    return [
        verdict(f"time, {timed[0]['what']}", f"at most {MOST_RATIO:g} x the bare", f"{ratio:.2f}", ratio <= MOST_RATIO),
        verdict("exactness", sampled, str(exact), exact == SAMPLED_CHANNELS),
    ]


def verdict(what: str, aim: str, found: str, reached: bool) -> dict[str, str]:
    """A row of the last table."""
    return {"what": what, "aim": aim, "found": found, "reached": "yes" if reached else "no"}


def blocks_of(run_dir: RunDir, rows: int) -> PooledBlocks:
    """The first rows, as the stages read them."""
    return PooledBlocks(run_dir, file_blocks(feature_files(rows)))


def timings(
    arguments: argparse.Namespace,
    runs: dict[str, RunDir],
    pooled: torch.Tensor,
    basis: torch.Tensor,
    setting: tuple[int, bool],
) -> Iterator[dict[str, str]]:
    """One row a way to search."""
    n, held = arguments.prototypes, len(pooled)
    single, half = runs["float32"], runs["float16"]
    identity = torch.eye(len(basis)).to(basis)
    queries = [Query(matrix, count, sign) for matrix in (identity, basis) for count, sign in QUERIES]
    baseline = partial(bare, pooled, basis, n, *setting)
    kept = PooledBlocks(single, file_blocks(feature_files(held)), cache_bytes=2**40)

    def find(blocks: PooledBlocks) -> TopN:
        return on_cpu(search(blocks, basis, n))

    def on_disk() -> TopN:
        forget(single, feature_files(held))
        return find(blocks_of(single, held))

    def four() -> None:
        bare_queries(pooled, basis, setting[0])

    def read() -> None:
        for _ in blocks_of(single, held):
            pass

    def multiply() -> None:
        bare(pooled, basis, n, BLOCK_ROWS, True, keep=False)

    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "search, files in the system's cache": (lambda: find(blocks_of(single, held)), baseline),
        "search, files not in the system's cache": (on_disk, baseline),
        "search, features kept by an earlier round": (lambda: find(kept), baseline),
        "search, float16 files in the system's cache": (lambda: find(blocks_of(half, held)), baseline),
        "both bases and signs in one read, against four": (lambda: search_all(blocks_of(single, held), queries), four),
        "reading alone, against the product alone": (read, multiply),
    }
    for number, (name, (ours, other)) in enumerate(ways.items()):  # the first is judged, the others told beside it
        repeats = min(arguments.repeats, MOST_BESIDE) if number else arguments.repeats
        yield bench.side_by_side(ours, other, repeats, warm_up=0 if number else 1).row(name)


def store(run_dir: RunDir, dtype: str, arguments: argparse.Namespace) -> dict[str, str]:
    """Writes the features in a type, unless they are there, and says what that took."""
    what = f"written-{arguments.rows}-{arguments.channels}.json"
    if run_dir.exists(what):
        return run_dir.read_json(what)
    seconds, size_bytes = write_features(run_dir, arguments.rows, arguments.channels, dtype)
    told = {
        "files": dtype,
        "bytes an image": f"{size_bytes / arguments.rows:.0f}",
        "GB": f"{size_bytes / 1e9:.2f}",
        "written MB/s": f"{size_bytes / 1e6 / seconds:.0f}",
    }
    run_dir.publish_json(what, told)
    return told


def alone(
    arguments: argparse.Namespace, run_dir: RunDir, basis: torch.Tensor, folder: Path, cache_bytes: int = 0
) -> dict[str, str]:
    """What a process of its own takes for all rows."""
    torch.save(basis.cpu(), folder / f"basis-{len(basis)}.pt")
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("rows", "prototypes", "threads")]
    sizes += [f"--channels={len(basis)}", f"--cache-bytes={cache_bytes}"]
    command = [sys.executable, __file__, *sizes, "--alone", str(run_dir)]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    size_bytes = sum(Path(run_dir.path(file.relative)).stat().st_size for file in feature_files(arguments.rows))
    return {
        "images searched": f"{arguments.rows:,}",
        "search s": f"{told['seconds']:.1f}",
        "searched MB/s": f"{size_bytes / 1e6 / told['seconds']:.0f}",
        "peak memory": f"{told['peak_bytes'] / 2**20:,.0f} MiB",
        "of it libraries": f"{told['before_bytes'] / 2**20:,.0f} MiB",
    }


def search_alone(arguments: argparse.Namespace) -> int:
    """Searches all rows in this process, twice where some are kept for later rounds; tells seconds and peak memory."""
    run_dir = RunDir(arguments.alone)
    basis = torch.load(Path(arguments.alone).parent / f"basis-{arguments.channels}.pt")
    files = feature_files(arguments.rows)
    forget(run_dir, files)
    blocks = PooledBlocks(run_dir, file_blocks(files), arguments.cache_bytes)
    before, begin = peak_bytes(), time.perf_counter()
    search(blocks, basis, arguments.prototypes)
    seconds = time.perf_counter() - begin
    if arguments.cache_bytes:
        search(blocks, basis, arguments.prototypes)
    print(json.dumps({"seconds": seconds, "before_bytes": before, "peak_bytes": peak_bytes()}))
    return 0


def memory_verdict(arguments: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Peak memory of a worker of the fit at 2,048 channels, its default cache of features full."""
    wide = argparse.Namespace(**vars(arguments) | {"rows": arguments.wide_rows, "channels": WIDE_CHANNELS})
    run_dir, cache_bytes = RunDir(str(folder / "wide")), ResourcesConfig().feature_cache_bytes
    basis = torch.linalg.qr(torch.randn(2 * (WIDE_CHANNELS,), generator=torch.Generator().manual_seed(0)))[0]
    told = store(run_dir, "float32", wide) | alone(wide, run_dir, basis, folder, cache_bytes)
    print(f"A worker at {WIDE_CHANNELS} channels, {cache_bytes / 2**20:,.0f} MiB of features kept between rounds\n")
    print(bench.table([told]) + "\n", flush=True)
    peak_mib = int(told["peak memory"].removesuffix(" MiB").replace(",", ""))
    what = f"memory of a worker, {arguments.wide_rows:,} x {WIDE_CHANNELS}"
    return verdict(what, "at most 3,072 MiB", f"{peak_mib:,} MiB", peak_mib * 2**20 <= MOST_BYTES)


def peak_bytes() -> int:
    """Largest resident memory of this process, the files that it maps included; not that of the one it was made by."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --- what is checked


def exactness(pooled: torch.Tensor, basis: torch.Tensor, found: TopN) -> tuple[int, str]:
    """Channels as a full sort has them, the lower index first among equal scores, of some spread over all; in words."""
    some = torch.linspace(0, len(basis) - 1, SAMPLED_CHANNELS).long()
    scores = torch.cat([(basis @ block.T)[some].cpu() for block in pooled.split(BLOCK_ROWS)], dim=1)
    values, indices = (part[:, : found.values.shape[1]] for part in scores.sort(dim=1, descending=True, stable=True))
    equal = (found.indices[some] == indices).all(dim=1) & (found.values[some] == values).all(dim=1)
    return int(equal.sum()), (
        f"Exactness: {int(equal.sum())} of {SAMPLED_CHANNELS} sampled channels have the {values.shape[1]} images, "
        f"order and values of a full sort of {len(pooled):,} scores."
    )


def changed(exact: TopN, other: TopN, what: str) -> str:
    """How many prototypes are others."""
    parts = []
    for n in [count for count in COUNTS if count <= exact.indices.shape[1]]:
        mine, theirs = exact.indices[:, :n], other.indices[:, :n]
        gone = int((~(mine[:, :, None] == theirs[:, None, :]).any(dim=2)).sum())
        parts.append(f"{gone:,} of {mine.numel():,} ({gone / mine.numel():.2%}) at n = {n}")
    return f"Prototypes changed by float16, {what}: {', '.join(parts)}."


def changed_in_run(run_dir: RunDir) -> str:
    """How many prototypes of a finished run float16 would change, under its U."""
    basis = read_basis(run_dir)
    tables = [read_table(run_dir, file, ["position", "pooled"]) for file in run_dir.list("tables/features/train")]
    blocks = [(torch.tensor(to_numpy(t["position"])), torch.tensor(to_numpy(t["pooled"]))) for t in tables]
    rounded = [(positions, pooled.half()) for positions, pooled in blocks]
    rows = sum(len(positions) for positions, _ in blocks)
    what = f"run {run_dir.name}, {rows:,} images x {len(basis)}"
    return changed(search(blocks, basis, max(COUNTS)), search(rounded, basis, max(COUNTS)), what)


if __name__ == "__main__":
    sys.exit(main())
