"""A law: results do not depend on names, and nothing of a name is ever executed, whatever it is.

Modules, parameters, buffers, keys of modules and batches, classes and quantities are called as nobody would.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler.emit.naming import identifier
from tnbackprop.compiler.invariants.stage import Stage
from tnbackprop.quantities import Quantity

from ...hostile import CANARY, NAMES, PLACES, Model, Scaled, class_named, fits

KINDS: tuple[Any, ...] = (tn.BatchGrad, tn.BatchL2, tn.Variance, tn.DiagGGN, tn.SqrtGGNMC, tn.KFAC)
TRIALS = range(int(os.environ.get("TNBACKPROP_NAMES", "4")))
"""How many arrangements of the names are tried: raise it to try more."""
PLAIN = {place: f"plain_{place}" for place in PLACES} | {f"q{k}": f"plain_q{k}" for k in range(len(KINDS))}


@pytest.fixture(autouse=True)
def nothing_is_executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    called: list[int] = []
    monkeypatch.setattr(builtins, "canary", called.append, raising=False)
    yield
    assert not called, "a name was executed"


def arranged(trial: int) -> dict[str, str]:
    """Names for every place, each once."""
    names = list(NAMES)
    random.Random(trial).shuffle(names)
    found: dict[str, str] = {}
    for place in PLAIN:
        quantity = place not in PLACES
        taken = {identifier(found[each]) for each in found if each not in PLACES}  # files name functions after them
        k = next(
            k
            for k, name in enumerate(names)
            if (name != "" and identifier(name) not in taken if quantity else fits(place, name))
        )
        found[place] = names.pop(k)
    return found


class Problem:
    """A model, a loss, a batch and quantities of these names; the numbers are the same for all names."""

    def __init__(self, names: dict[str, str]) -> None:
        torch.manual_seed(0)
        self.model = class_named(Model, names["class"])(names).double()
        self.loss = class_named(nn.CrossEntropyLoss, names["loss_class"])()
        one, other = torch.randn(2, 4, 3, dtype=torch.float64)
        self.x, self.y = {names["left"]: one, names["right"]: other}, torch.randint(4, (4,))
        self.quantities: list[Quantity] = [kind(name=names[f"q{k}"]) for k, kind in enumerate(KINDS)]
        self.program = tn.compile(self.model, self.loss, (self.x, self.y), self.quantities)

    def numbers(self) -> list[Tensor]:
        result = self.program(self.x, self.y, seed=0)
        found = [result.loss, result.output]
        for quantity in self.quantities:
            for name, _ in self.model.named_parameters():
                value = result[quantity.name][name]
                found += [value] if isinstance(value, Tensor) else list(value.factors)
        return found


@pytest.fixture(scope="module")
def plain() -> Problem:
    return Problem(PLAIN)


def structure(source: str) -> list[str]:
    """What a source is, but for names and texts."""
    return [type(node).__name__ for node in ast.walk(ast.parse(source))]


def assert_lines(text: str) -> None:
    """Nothing in a text ends a line, or is unreadable, but the ends of its lines."""
    assert not [line for line in text.split("\n") if not line.isprintable()]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("trial", TRIALS)
def test_results_and_texts(plain: Problem, trial: int) -> None:
    hostile = Problem(arranged(trial))
    assert all(map(torch.equal, plain.numbers(), hostile.numbers()))
    source = hostile.program.source
    assert structure(source) == structure(plain.program.source)
    assert len(source.splitlines()) == len(plain.program.source.splitlines())
    for stage in (None, *Stage):
        text = hostile.program.explain(stage)
        assert_lines(text)
        assert len(text.splitlines()) == len(plain.program.explain(stage).splitlines()), stage


def loaded(source: str) -> dict[str, Any]:
    """A generated file, which agrees with autograd."""
    assert_lines(source)
    namespace: dict[str, Any] = {"__name__": "generated"}
    exec(compile(source, "generated.py", "exec"), namespace)
    return namespace


def agrees(file: dict[str, Any]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = file["check"]()
    assert status == 0, said.getvalue()


@pytest.mark.parametrize("trial", TRIALS[:1])
def test_files_of_models(trial: int) -> None:
    problem = Problem(arranged(trial))
    quantities = problem.quantities[:4]
    made = tn.generate(problem.model, quantities, loss=problem.loss, example=(problem.x, problem.y))
    loss, output, results = loaded(made.source)["compute"](problem.model.state_dict(), problem.x, problem.y)
    want = problem.program(problem.x, problem.y, seed=0)
    torch.testing.assert_close((loss, output), (want.loss, want.output))
    for quantity in quantities:
        torch.testing.assert_close(results[quantity.name], dict(want[quantity.name]))


@pytest.mark.parametrize("trial", TRIALS[:1])
def test_files_of_layers(trial: int) -> None:
    names = arranged(trial)
    for scale, shift in ((names["scale"], names["shift"]), ("x", names["shift"]), (names["scale"], "x")):
        module = class_named(Scaled, names["scaled"])(scale, shift).double()
        quantities = [tn.BatchGrad(name=names["q0"]), tn.DiagGGN(name=names["q3"])]
        agrees(loaded(tn.generate(module, quantities, example=torch.rand(4, 3, dtype=torch.float64)).source))


class Inside(nn.Module):
    """A layer with a layer of this name, the first or the last."""

    def __init__(self, name: str, last: bool) -> None:
        super().__init__()
        self.names_of_two = ("other", name) if last else (name, "other")
        for own, size in zip(self.names_of_two, (3, 2), strict=True):
            self.add_module(own, nn.Linear(3, size))

    def forward(self, input: Tensor) -> Tensor:
        first, second = map(self.get_submodule, self.names_of_two)
        result: Tensor = second(torch.tanh(first(input)))
        return result


WORDS = ("like", "each", "g_out", "values", "state", "print", "class", "one_by_one", "t0", "slice_0", "cotangent",
         "columns", "hessian_columns", "hessian_weights", "diagonal", "average")  # fmt: skip
"""What a file of a layer has for itself, and what no argument can be called."""


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", WORDS)
def test_files_of_layers_with_parts(name: str, last: bool) -> None:
    module, x = Inside(name, last).double(), torch.rand(4, 3, dtype=torch.float64)
    own = Scaled(name, "shift") if last else Scaled("scale", name)
    for quantities in ([tn.BatchGrad(), tn.DiagGGN(), tn.HessianDiag()], [tn.BL89()], [tn.KFRA()]):
        for each in (module, own.double()):
            agrees(loaded(tn.generate(each, quantities, example=x).source))


WORDS_OF_MODELS = ("like", "loss_of", "output", "N", "values", "results", "tensors", "noise", "check", "draw_0",
                   "noise_0", "print", "class", "root_0", "p_first_weight", "t0")  # fmt: skip


@pytest.mark.thinned(16)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", WORDS_OF_MODELS)
def test_files_of_models_with_parts(name: str, last: bool) -> None:
    """The file of a whole model, with the roots of its loss's Hessian, agrees with autograd."""
    x, y = torch.rand(4, 3, dtype=torch.float64), torch.randint(2, (4,))
    quantities = [tn.BatchL2(), tn.DiagGGN(), tn.DiagGGNMC()]
    loss = nn.CrossEntropyLoss()
    agrees(loaded(tn.generate(Inside(name, last).double(), quantities, loss=loss, example=(x, y)).source))


class Cosine(nn.Module):
    """A loss with an operator that is made of others, for which torch writes code of its own."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return (1 - nn.functional.cosine_similarity(output, y, dim=1)).mean()


class Keyed(nn.Module):
    """Its parameter and the key of its batch have one name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.called = name
        self.register_parameter(name, nn.Parameter(torch.ones(3)))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        parameter = self._parameters[self.called]
        assert parameter is not None
        return batch[self.called] * parameter


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class", "\r", '"""', f'")\n{CANARY}\n#', f"']\n{CANARY}\n#", f'"), {CANARY}, ("'])
def test_code_that_torch_writes(name: str) -> None:
    """Where operators are made of others, torch.export writes the names into code and runs it."""
    x, y = torch.rand(2, 3), torch.rand(2, 3)
    result = tn.compile(Keyed(name), Cosine(), ({name: x}, y), [tn.Grad()])({name: x}, y)
    parameter = torch.ones(3, requires_grad=True)
    (want,) = torch.autograd.grad(Cosine()(x * parameter, y), parameter)
    torch.testing.assert_close(result["grad"][name], want)


class Pooled(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.head, self.name = nn.Conv1d(2, 4, 2), nn.Linear(4, 2), name
        self.add_module(name, nn.GroupNorm(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.get_submodule(self.name)(self.first(x)).mean(2))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["g", "s0", "s1", "h0", "K", "r0", "column", "between", "noise", "weight"])
def test_modules_called_as_what_is_propagated(name: str) -> None:
    """A line of a rule in such a module, beside an operation that is called as the line is: here `mean`."""
    found = []
    for each in (name, "norm"):
        torch.manual_seed(0)
        model, x, y = Pooled(each).double(), torch.randn(3, 2, 5).double(), torch.randn(3, 2).double()
        for quantities in ([tn.BatchGrad(), tn.DiagGGN(), tn.KFLR()], [tn.HessianDiag()], [tn.KFRA()], [tn.HesScale()]):
            result = tn.compile(model, nn.MSELoss(), (x, y), quantities)(x, y)
            blocks = (block for by in result.values() for block in by.values())
            found.append([each if isinstance(each, Tensor) else each.to_dense() for each in blocks])
    half = len(found) // 2
    torch.testing.assert_close(found[:half], found[half:])
