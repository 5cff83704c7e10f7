"""Tables and plot of a benchmark's JSON: python -m benchmarks.report benchmarks/results/first_order_cpu.json"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = Mapping[str, Any]


def tables(problems: Mapping[str, Any]) -> str:
    """Markdown: for each problem the ratio to the plain gradient and the peak memory, quantities by contenders."""
    parts = []
    for problem, measured in problems.items():
        entries = measured["entries"]
        plain = entries["autograd/grad"]["milliseconds"]
        title = f"{problem}, N = {measured['batch']}: time relative to the plain gradient ({plain:.1f} ms)"
        parts.append(f"**{title}**\n\n{_pivot(entries, _ratio)}\n")
        if any(row["peak_bytes"] is not None for row in entries.values()):
            parts.append(f"**{problem}: peak memory in MiB**\n\n{_pivot(entries, _mebibytes)}\n")
    return "\n".join(parts)


def _ratio(row: Row) -> str:
    return f"{row['median']:.2f}"


def _mebibytes(row: Row) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"


def _pivot(entries: Mapping[str, Row], cell: Callable[[Row], str]) -> str:
    split = {tuple(entry.rsplit("/", 1)): row for entry, row in entries.items()}
    contenders = list(dict.fromkeys(contender for contender, _ in split))
    quantities = list(dict.fromkeys(quantity for _, quantity in split))
    lines = [["quantity", *contenders], ["---"] + ["--:"] * len(contenders)]
    for quantity in quantities:
        cells = [cell(split[name, quantity]) if (name, quantity) in split else "" for name in contenders]
        lines.append([quantity, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(results: Mapping[str, Any], output: Path, part: bool, plotted: bool = True) -> int:
    """The end of a benchmark: a file and its plot, but none of a `part` of it; the exit status."""
    if part:
        print("a part of the benchmark: nothing written (give --output)")
        return 0
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if plotted:
        plot(results, output.with_suffix(".png"))
    print(f"wrote {output}" + (f" and {output.with_suffix('.png').name}" if plotted else ""))
    return 0


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Bars of the ratio with quartiles, one panel per problem; logarithmic, since the for-loop is far off."""
    problems = results["problems"]
    width, most = min(4, len(problems)), max(len(each["entries"]) for each in problems.values())
    rows = -(-len(problems) // width)
    size = (6 * width, max(3, 0.3 * most) * rows)
    figure, panels = plt.subplots(rows, width, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat[len(problems) :]:
        panel.remove()
    for panel, (problem, measured) in zip(panels.flat, problems.items(), strict=False):
        quantities = list(dict.fromkeys(name.rsplit("/", 1)[1] for name in measured["entries"]))
        names = sorted(measured["entries"], key=lambda name: quantities.index(name.rsplit("/", 1)[1]))[::-1]
        found = [measured["entries"][name] for name in names]
        medians = [each["median"] for each in found]
        below = [max(each["median"] - each["low"], 0) for each in found]
        above = [max(each["high"] - each["median"], 0) for each in found]
        colours = ["tab:orange" if name.startswith("tnbackprop") else "tab:gray" for name in names]
        panel.barh(names, medians, xerr=(below, above), color=colours, error_kw={"linewidth": 0.8})
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_xlabel("time / plain gradient")
        panel.set_title(f"{problem} (N = {measured['batch']})")
    figure.suptitle(f"{results['device']}, {results['threads']} CPU threads, torch {results['versions']['torch']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["problems"]))
