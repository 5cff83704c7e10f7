"""The page of the guide on models: `python -m tests.models.table` runs the zoo and writes docs/models.md."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import tnbackprop as tn

from .outcomes import CHECKS, asked
from .rows import FAMILIES, OTHERS, OWN, PACKAGES, ZOO
from .zoo import Row

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
WORKERS = 2
ORDER = ("first order", "vmap", "KFAC", "DiagGGN")

HEAD = """# Models

{count} tiny models. {own} are of a kind that people have, written as they write it; {others} are those of
transformers, timm, torchvision, peft and diffusers themselves, from a tiny configuration. Nothing in them knows of this
library. `python -m tests.models.table` runs them and writes this page; the models are in `tests/models`, and
`make test-slow` installs the packages and asks the same of each. All in float64 and evaluation mode (a batch norm in
training mode mixes the samples, and is refused).

| column | what is asked |
|---|---|
| first order | `Grad`, `BatchGrad`, `BatchL2` are those of autograd, one sample at a time, to 1e-8 |
| vmap | what `torch.func.vmap(torch.func.grad(…))` gives as individual gradients, by the same comparison |
| KFAC | every parameter has factors, or a diagonal that says why; all finite, none larger than the limit |
| DiagGGN | is that of the definition, row by row of the Jacobian, as near |

Where a part of a model is in float32 whatever it is given (the norms of Llama), 1e-5 takes the place of 1e-8.

KFAC is that of its defaults, and the empirical one where the loss is not convex in the output; there, – stands for
`DiagGGN`, and where the definition would take too long. A name of an error is what the call ends in; "refused" is an
error of ours that says what to do instead.

{summary}

## One of them

```python
import tnbackprop as tn
from tests.models.rows import ZOO

gpt = next(row for row in ZOO if row.name == "GPT, tied").problem()
blocks = tn.compute(gpt.model, gpt.loss, (gpt.x, gpt.y), [tn.KFAC()], seed=0)["kfac"]
for name in ("words.weight", "positions.weight", "blocks.0.attention.q.weight", "blocks.0.norms.0.weight"):
    print(name, [list(factor.shape) for factor in blocks[name].factors])
```

```text title="prints"
words.weight [[28]]
positions.weight [[4], [4, 4]]
blocks.0.attention.q.weight [[4, 4], [4, 4]]
blocks.0.norms.0.weight [[4, 1, 1], [4, 1, 1]]
```
"""


def outcome(row: Row, check: str) -> str:
    """One cell. A wrong number is said to be one; what else stops it has the name of its error."""
    if not asked(row, check):
        return "–"
    try:
        CHECKS[check](row)
    except AssertionError:
        return "**wrong**"
    except tn.TnError:
        return "refused"
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
        return f"`{type(error).__name__}`"
    return "right"


def summary(cells: Mapping[tuple[str, str], str]) -> str:
    """How many are right, of how many that were asked: a table with a row for each part of the zoo."""
    lines = [f"| right | {' | '.join(ORDER)} |", "|---|" + "---|" * len(ORDER)]
    for part, rows in (("our own models", OWN), ("the packages' models", OTHERS), ("all", ZOO)):
        right = (sum(cells[row.name, check] == "right" for row in rows) for check in ORDER)
        wanted = (sum(asked(row, check) for row in rows) for check in ORDER)
        counts = " | ".join(f"{count} of {of}" for count, of in zip(right, wanted, strict=True))
        lines.append(f"| {part} | {counts} |")
    return "\n".join(lines)


def page(cells: Mapping[tuple[str, str], str]) -> str:
    """The text, from the outcome of each (row, check)."""
    lines = [HEAD.format(count=len(ZOO), own=len(OWN), others=len(OTHERS), summary=summary(cells))]
    for family, rows in (FAMILIES | PACKAGES).items():
        lines += [f"## {family}", "", f"| model | {' | '.join(ORDER)} |", "|---|" + "---|" * len(ORDER)]
        lines += [f"| {row.name} | {' | '.join(cells[row.name, check] for check in ORDER)} |" for row in rows]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def outcomes(row: Row) -> dict[tuple[str, str], str]:
    """All cells of a row."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {(row.name, check): outcome(row, check) for check in ORDER}
    print(row.name, *found.values(), sep=" | ", file=sys.stderr, flush=True)
    return found


def by_number(number: int) -> dict[tuple[str, str], str]:
    """What a process is handed: a row holds functions, which are not sent."""
    return outcomes(ZOO[number])


def main() -> None:
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        cells = {key: cell for found in pool.map(by_number, range(len(ZOO))) for key, cell in found.items()}
    PAGE.write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
