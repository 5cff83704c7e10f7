"""One picture of the main results, for the README and the guide: python -m benchmarks.overview

It has the numbers of results/first_order_cpu.json and second_order_cpu.json: 3C3D, N = 32, the plain gradient is 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PICTURE = RESULTS / "overview.svg"
PROBLEM = "3c3d-32"
ROWS = {
    "grad": "gradient",
    "batch_grad": "individual gradients",
    "batch_l2": "their squared norms",
    "second_moment": "second moment",
    "variance": "variance",
    "all": "all first-order ones at once",
    "diag_ggn_mc": "GGN diagonal, one draw",
    "kfac": "KFAC factors, one draw",
    "kflr": "KFLR factors",
    "diag_ggn": "GGN diagonal, exact",
}
OURS = "tnbackprop"
CALLED = {
    "backpack": "BackPACK", "backpack-save-memory": "BackPACK, saving memory", "opacus-ghost": "Opacus",
    "curvlinops-no-gradient": "curvlinops, without the gradient",
}  # fmt: skip
LEFT, WIDTH, ROW, TOP = 210, 760, 34, 62
STYLE = """
text { font: 13px Helvetica, Arial, 'DejaVu Sans', sans-serif; fill: #24292f; }
.title { font-size: 15px; font-weight: bold; }
.small { font-size: 11.5px; fill: #57606a; }
.ours { fill: #d9480f; } .other { fill: #8c959f; }
.ours-text { fill: #d9480f; font-weight: bold; }
line { stroke: #57606a; stroke-dasharray: 3 3; }
.back { fill: #fff; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .small { fill: #9da7b3; } .back { fill: #0d1117; } .ours { fill: #ff8a4c; }
  .ours-text { fill: #ff8a4c; } .other { fill: #6e7681; } line { stroke: #9da7b3; }
}
"""


def measured() -> dict[str, dict[str, float]]:
    """row -> who -> median of the ratios to the plain gradient."""
    found: dict[str, dict[str, float]] = {}
    for file in ("first_order_cpu.json", "second_order_cpu.json"):
        entries = json.loads((RESULTS / file).read_text(encoding="utf-8"))["problems"][PROBLEM]["entries"]
        for entry, values in entries.items():
            who, _, row = entry.partition("/")
            if row in ROWS:
                found.setdefault(row, {}).setdefault(who, values["median"])
    return {row: found[row] for row in ROWS}


def rivals(by: dict[str, float]) -> tuple[str, float] | None:
    """The fastest of the others; the plain gradient and the for-loop are no rivals."""
    others = {who: value for who, value in by.items() if who not in (OURS, "autograd", "for-loop")}
    return min(others.items(), key=lambda item: item[1]) if others else None


def overview() -> str:
    """The picture as SVG: a bar for tnbackprop, one for the fastest other."""
    rows = measured()
    height = TOP + ROW * len(rows) + 34
    scale = (WIDTH - LEFT - 190) / max(max(by[OURS], (rivals(by) or ("", 0.0))[1]) for by in rows.values())
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'role="img" aria-label="Time of each quantity in plain gradients: tnbackprop and the fastest other library">',
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{WIDTH}" height="{height}"/>',
        '<text class="title" x="12" y="24">Time, in plain gradients</text>',
        '<text class="small" x="12" y="44">3C3D (895,210 parameters), N = 32, two CPU threads, loss, output and '
        "gradient included; grey: the fastest other library</text>",
        *(line for k, (row, by) in enumerate(rows.items()) for line in _row(row, by, TOP + ROW * k, scale)),
        f'<line x1="{_n(LEFT + scale)}" y1="{TOP - 6}" x2="{_n(LEFT + scale)}" y2="{height - 30}"/>',
        f'<text class="small" x="{_n(LEFT + scale - 6)}" y="{height - 12}">1 = autograd\'s gradient</text>',
        "</svg>\n",
    ])  # fmt: skip


def _row(row: str, by: dict[str, float], y: int, scale: float) -> Iterator[str]:
    rival = rivals(by)
    yield f'<text x="{LEFT - 10}" y="{y + 18}" text-anchor="end">{escape(ROWS[row])}</text>'
    bars = [("ours", "ours-text", by[OURS], f"{by[OURS]:.2f}")]
    if rival is not None:
        bars.append(("other", "small", rival[1], f"{rival[1]:.2f}  {CALLED.get(rival[0], rival[0])}"))
    for k, (bar, text, value, label) in enumerate(bars):
        top = y + 2 + 13 * k + (6 if rival is None else 0)
        yield f'<rect class="{bar}" x="{LEFT}" y="{top}" width="{_n(value * scale)}" height="11" rx="2"/>'
        yield f'<text class="{text}" x="{_n(LEFT + value * scale + 6)}" y="{top + 10}">{escape(label)}</text>'


def _n(number: float) -> str:
    return f"{number:.1f}"


if __name__ == "__main__":
    PICTURE.write_text(overview(), encoding="utf-8")
    print(PICTURE)
