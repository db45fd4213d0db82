"""The pictures of docs/solver.md, from the rows of benchmarks/solver_study.csv.

    python benchmarks/solver_plots.py [--tables]

`--tables` prints the tables of docs/solver.md as well.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

import bench
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs/images"
TITLES = {
    "r18": "photos, ResNet-18\nD = 512",
    "mnv2": "photos, MobileNetV2\nD = 1280",
    "insects": "insects, ResNet-18\nD = 512",
    "cifar": "CIFAR-10, ResNet-56\nD = 64",
    "mnist": "MNIST, small net\nD = 40",
}
FITTING, HELD_OUT, GREY = "#9aa5b1", "#c2410c", "#d9dee3"
FITS = {
    "start: identity": "own channels",
    "adam": "adam, published",
    "quartimax, n 100 to 20": "quartimax, 100 to 20, equal",
    "identity, n 100 to 20": "identity, 100 to 20, equal",
    "identity, n 100": "identity, 100, equal",
    "identity, n 100, root": "identity, 100, by rank",
    "varimax, n 100, root": "varimax, 100, by rank",
    "defaults": "auto, 100, by rank",
}
NUMBERS = ("n 5", "n 20", "n 50", "n 100", "n 200")

Purity = dict[tuple[str, str], list[dict[str, float]]]


def main() -> None:
    """Writes every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="print the tables of docs/solver.md as well")
    arguments = parser.parse_args()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"})
    rows = read()
    IMAGES.mkdir(parents=True, exist_ok=True)
    draw_fits(rows)
    draw_numbers(rows)
    draw_rounds()
    if arguments.tables:
        for split in ("held_out", "fitting"):
            print(f"\n{split}\n\n{bench.table(table_rows(rows, split))}")


def table_rows(rows: Purity, split: str) -> list[dict[str, str]]:
    """For every variant and set the purity @5 and @20, mean over the partitions."""
    found = []
    for variant in dict.fromkeys(variant for _, variant in rows):
        row = {"variant": variant}
        for name, title in TITLES.items():
            numbers = rows.get((name, variant), [])
            values = [
                f"{mean(number[f'{split}_{count}'] for number in numbers):.4f}"[1:] for count in (5, 20) if numbers
            ]
            row[title.split(chr(10))[0]] = " / ".join(values) + (f" ({len(numbers)})" if numbers else "")
        found.append(row)
    return found


def read() -> Purity:
    """Rows by set and variant, one a partition."""
    found: Purity = defaultdict(list)
    with (HERE / "solver_study.csv").open() as file:
        for row in csv.DictReader(file):
            numbers = {key: float(value) for key, value in row.items() if key not in ("set", "variant")}
            found[row["set"], row["variant"]].append(numbers)
    return found


def draw_fits(rows: Purity) -> None:
    """Purity of each fit on each set, fitting and held out, @5 and @20; one dot a partition."""
    figure, axes = plt.subplots(2, len(TITLES), figsize=(12, 4.6), sharey=True)
    for column, (name, title) in enumerate(TITLES.items()):
        for row, count in enumerate((5, 20)):
            axis = axes[row, column]
            for place, variant in enumerate(FITS):
                for split, colour in (("fitting", FITTING), ("held_out", HELD_OUT)):
                    values = [found[f"{split}_{count}"] for found in rows.get((name, variant), [])]
                    axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.45, markersize=4, mew=0)
                    if values:
                        axis.plot(mean(values), place, "|", color=colour, markersize=11, mew=2)
            axis.set_yticks(range(len(FITS)), FITS.values())
            axis.grid(axis="x", color=GREY, linewidth=0.6)
            if row == 0:
                axis.set_title(title, fontsize=9)
            axis.set_xlabel(f"purity@{count}")
            axis.margins(x=0.08)
    axes[0, 0].invert_yaxis()
    handles = [plt.Line2D([], [], color=colour, marker="o", linestyle="") for colour in (FITTING, HELD_OUT)]
    figure.legend(handles, ["fitting", "held out"], loc="upper left", frameon=False, ncols=2)
    save(figure, "solver-fits.png")


def draw_numbers(rows: Purity) -> None:
    """Held-out and fitting purity against n, all prototypes equal or weighted by rank."""
    names = [name for name in TITLES if sum((name, f"identity, {number}") in rows for number in NUMBERS) > 2]
    figure, axes = plt.subplots(1, len(names), figsize=(1.5 + 3.1 * len(names), 3.1))
    for axis, name in zip(axes, names, strict=True):
        for suffix, style in (("", "--"), (", root", "-")):
            for split, colour in (("fitting", FITTING), ("held_out", HELD_OUT)):
                points = []
                for number in NUMBERS:
                    found = rows.get((name, f"identity, {number}{suffix}"), [])
                    if found:
                        value = mean((row[f"{split}_5"] + row[f"{split}_20"]) / 2 for row in found)
                        points.append((int(number.split()[1]), value))
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=colour, marker=".", markersize=5)
        axis.set_xscale("log")
        axis.set_xticks([5, 20, 50, 100, 200], ["5", "20", "50", "100", "200"])
        axis.minorticks_off()
        axis.set_title(TITLES[name], fontsize=9)
        axis.set_xlabel("n in all 10 rounds")
        axis.grid(color=GREY, linewidth=0.6)
    axes[0].set_ylabel("mean of purity@5 and @20")
    lines = [plt.Line2D([], [], color=colour) for colour in (FITTING, HELD_OUT)]
    lines += [plt.Line2D([], [], color="black", linestyle=style) for style in ("--", "-")]
    names = ["fitting", "held out", "equal weights", "weighted by rank"]
    figure.legend(lines, names, loc="lower center", frameon=False, ncols=4)
    save(figure, "solver-prototypes.png", bottom=0.1)


def draw_rounds() -> None:
    """Purity@20 after each round, of the fits that were traced."""
    found: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    with (HERE / "solver_rounds.csv").open() as file:
        for row in csv.DictReader(file):
            found[row["set"], row["variant"]].append(row)
    names = [name for name in TITLES if any(key[0] == name for key in found)]
    figure, axes = plt.subplots(1, len(names), figsize=(1.5 + 3.1 * len(names), 3.1), squeeze=False)
    styles = {"quartimax, n 100 to 20": ":", "varimax, n 100, root": "--", "identity, n 100, root": "-"}
    for axis, name in zip(axes[0], names, strict=True):
        for variant, style in styles.items():
            rows = found.get((name, variant), [])
            for split, colour in (("fitting", FITTING), ("held_out", HELD_OUT)):
                values = [float(row[f"{split}_20"]) for row in rows]
                axis.plot([int(row["round"]) for row in rows], values, style, color=colour)
        shown = [float(row["held_out_20"]) for variant in styles for row in found.get((name, variant), [])[2:]]
        axis.set_ylim(bottom=min(shown) - 0.01)  # the rotations begin far below
        axis.set_title(TITLES[name], fontsize=9)
        axis.set_xlabel("rounds")
        axis.grid(color=GREY, linewidth=0.6)
    axes[0, 0].set_ylabel("purity@20")
    lines = [plt.Line2D([], [], color=colour) for colour in (FITTING, HELD_OUT)]
    lines += [plt.Line2D([], [], color="black", linestyle=style) for style in styles.values()]
    labels = ["fitting", "held out", "quartimax, 100 to 20, equal", "varimax, 100, by rank", "identity, 100, by rank"]
    figure.legend(lines, labels, loc="lower center", frameon=False, ncols=5 if len(names) > 2 else 3)
    save(figure, "solver-rounds.png", bottom=0.13)


def save(figure: plt.Figure, name: str, bottom: float = 0.0) -> None:
    """Writes the picture, room for the legend left below."""
    figure.tight_layout(rect=(0, bottom, 1, 0.97 if bottom == 0 else 1))
    figure.savefig(IMAGES / name, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
