"""Declaring layers: the registry, its targets, its conflicts; primitives, custom operators."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop import RuleError, UnsupportedError
from tnbackprop.declare import REGISTRY

from .. import oracle, oracle_second
from ..declaring import FORMULA, Power, X, Y, check, network, targets
from ..second_order import assert_equal


class Cube(Power):
    pass


class SignedCube(Cube):
    pass


@tn.primitive
def powered(value: Tensor, gain: Tensor, power: int = 3) -> Tensor:
    return gain * value**power


def plain(value: Tensor) -> Tensor:
    return value


@torch.library.custom_op("tnbackprop_tests::powered", mutates_args=())
def powered_op(value: Tensor, gain: Tensor, power: int) -> Tensor:
    return gain * value**power


@powered_op.register_fake
def _(value: Tensor, gain: Tensor, power: int) -> Tensor:
    return torch.empty_like(value)


class Calls(nn.Module):
    """A function of the input and of a parameter, called twice."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.gain = function, nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.function(x, self.gain, 2), power=3, gain=self.gain)


@pytest.fixture(autouse=True)
def empty_registry() -> Iterator[None]:
    """Nothing that a test registers outlives it."""
    with tn.registered():
        yield


# ---------------------------------------------------------------- three ways to one Rule


def power_row(layer: Power) -> str:
    """A rule may depend on options."""
    return f"output[n, i] = gain[i] * input[n, i]**{layer.power}"


JACOBIAN = tn.Rule(
    jacobian={"input": "3 * gain[i] * input[n, i]**2", "gain": "input[n, i]**3"},
    legs={"input": "n, i", "gain": "i", "output": "n, i"},
    forward="{gain} * {input} * {input} * {input}",
)
NATIVE = tn.Rule(
    FORMULA,
    forward="{gain} * {input}.pow(3)",
    vjp={"input": "3 * {gain} * {input}.square() * {cotangent}"},
)
WAYS: dict[str, Any] = {
    "nothing": None, "function": power_row, "text": FORMULA, "jacobian": JACOBIAN, "native kernels": NATIVE,
}  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("way", WAYS)
def test_three_ways(way: str) -> None:
    """Nothing, the formula, the Jacobian: one program of the layer's operations, the others of one call."""
    if WAYS[way] is not None:
        assert tn.rule(Power)(WAYS[way]) is WAYS[way]
    program = check(network(Power()))
    assert (Power in targets(program)) == (way != "nothing")
    assert (".pow(3)\n" in program.source) == (way == "native kernels")
    assert (".square() * " in program.source) == (way == "native kernels")


@pytest.mark.parametrize("power", [2, 5])
def test_options(power: int) -> None:
    tn.rule(Power)(power_row)
    assert Power in targets(check(network(Power(power))))


@pytest.mark.parametrize("rules", [{}, {"rules": "passed"}], ids=["registered", "passed"])
def test_most_specific_class(rules: dict[str, str]) -> None:
    """A subclass has the rule of its nearest base."""
    rows = {Power: "output[n, i] = 0 * gain[i] * input[n, i]", Cube: FORMULA}
    if rules:
        assert Cube in targets(check(network(SignedCube()), rules=tn.RULES | rows))
        return
    with tn.registered(rows):
        assert Cube in targets(check(network(SignedCube())))


class Shifted(Power):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_a_subclass_with_its_own_forward() -> None:
    """The rule of the base would be wrong."""
    tn.rule(Power)(FORMULA)
    with pytest.raises(RuleError, match=r"module '2' \(Shifted\) has a forward of its own.*of Power: give Shifted"):
        check(network(Shifted()))
    tn.rule(Shifted)(f"{FORMULA} + 1")
    assert Shifted in targets(check(network(Shifted())))


def test_passed_rules_leave_the_registry_aside() -> None:
    tn.rule(Power)("output[n, i] = 0 * gain[i] * input[n, i]")
    assert Power not in targets(check(network(Power()), rules=tn.RULES))


def test_an_importable_file(tmp_path: Path) -> None:
    """A file of rules like the built-in ones; importing it registers them, `registered` undoes that."""
    path = tmp_path / "my_rules.py"
    path.write_text(f"import tnbackprop as tn\nfrom {Power.__module__} import Power\n"
                    f"@tn.rule(Power)\ndef power(layer):\n    return '{FORMULA}'\n")  # fmt: skip
    spec = importlib.util.spec_from_file_location("my_rules", path)
    assert spec is not None and spec.loader is not None
    with tn.registered() as registry:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert registry is REGISTRY is tn.REGISTRY and Power in registry
        assert Power in targets(check(network(Power())))
    assert Power not in REGISTRY
    assert Power not in targets(check(network(Power())))


def test_registered_restores_after_an_error() -> None:
    tn.rule(Power)(FORMULA)
    before = dict(REGISTRY)
    with pytest.raises(ZeroDivisionError), tn.registered({Cube: FORMULA}, {Power: power_row}, override=True):
        assert REGISTRY[Power] is power_row and Cube in REGISTRY
        raise ZeroDivisionError
    assert before == REGISTRY


def test_a_failing_registration_enters_nothing() -> None:
    tn.rule(Cube)(FORMULA)
    with pytest.raises(RuleError, match="two rules"):
        tn.rule(Power, Cube)(FORMULA)
    assert Power not in REGISTRY
    with pytest.raises(RuleError, match="two rules"), tn.registered({Power: FORMULA, Cube: FORMULA}):
        raise AssertionError("the block must not run")
    assert Power not in REGISTRY


def test_compute_sees_the_rules() -> None:
    """Compiled again where the rules changed, and only there."""
    model, loss = network(Power()), nn.MSELoss()
    twice = "output[n, i] = 2 * gain[i] * input[n, i]**3"
    table = tn.RULES | {Power: FORMULA}

    def value(rules: Any = None) -> Tensor:
        return tn.compute(model, loss, (X, Y), [tn.Grad()], rules=rules, check=False)["grad"]["2.gain"]

    exact, count = value(), lambda: len(tn.api._PROGRAMS[model])
    with tn.registered({Power: twice}):
        assert not torch.allclose(value(), exact)
        torch.testing.assert_close(value(table), exact)
        assert count() == 3
    torch.testing.assert_close(value(), exact)
    value(table)
    assert count() == 3


# ---------------------------------------------------------------- operators and functions


def of_call(call: Any) -> str:
    """A row of an operator or a primitive sees the call."""
    return f"output[n, i] = gain[i] * value[n, i]**{call.power}"


PACKET = torch.ops.tnbackprop_tests.powered


@pytest.mark.thinned(3)
@pytest.mark.parametrize("target", [powered_op, PACKET, PACKET.default], ids=["op", "packet", "overload"])
@pytest.mark.parametrize("how", ["registered", "passed"])
def test_custom_operator(target: Any, how: str) -> None:
    model = network(Calls(powered_op))
    mine = {target: of_call}
    with tn.registered(mine if how == "registered" else {}):
        rules = tn.RULES | mine if how == "passed" else None
        program = compare(model, network(Calls(powered.function)), rules)
    assert targets(program).count(PACKET.default) == 2
    assert "torch.ops.tnbackprop_tests.powered.default(" in program.source


def compare(model: nn.Module, twin: nn.Module, rules: Any) -> tn.Program:
    """The gradients of `model` are those of a twin that autograd understands."""
    twin.load_state_dict(model.state_dict())
    program = tn.compile(model, nn.MSELoss(), (X, Y), [tn.Grad(), tn.BatchL2(), tn.DiagGGN()], rules=rules)
    result = program(X, Y)
    for key, source in (("grad", oracle), ("batch_l2", oracle), ("diag_ggn", oracle_second)):
        assert_equal(result[key], getattr(source, key)(twin, nn.MSELoss(), X, Y), key)
    return program


def test_primitive() -> None:
    """One node for each call, by the names of its arguments; without a rule it is its own operations."""
    model = network(Calls(powered))
    assert powered not in targets(check(model))
    tn.rule(powered)(of_call)
    program = check(model)
    assert targets(program).count(powered) == 2
    assert powered.stand_in is None and "primitive powered" in program.explain()
    torch.testing.assert_close(powered(X, X, power=2), X**3)
    assert powered.__doc__ is None and powered.__name__ == "powered"


def test_primitive_by_its_jacobian() -> None:
    gated = tn.primitive(lambda value, gate: value * torch.sigmoid(gate))
    rule = tn.Rule(
        jacobian={"value": "sigmoid(gate[*s])", "gate": "output[*s] * (1 - sigmoid(gate[*s]))"},
        legs={"value": "*s", "gate": "*s", "output": "*s"},
        forward="{value} * torch.sigmoid({gate})",
    )

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return gated(*self.both(x).chunk(2, -1))

    with tn.registered({gated: rule}):
        assert gated in targets(check(network(Gated())))


def test_primitive_after_a_failed_capture() -> None:
    def broken(value: Tensor, gain: Tensor, power: int) -> Tensor:
        raise ValueError("no luck")

    primitive = tn.primitive(broken)
    with tn.registered({primitive: of_call}), pytest.raises(tn.InputError, match="no luck"):
        tn.compile(network(Calls(primitive)), nn.MSELoss(), (X, Y), [tn.Grad()])
    assert primitive.stand_in is None


# ---------------------------------------------------------------- misuse

MISUSE: dict[str, tuple[Callable[[], object], str]] = {
    "no target": (lambda: tn.rule(), "needs a target"),
    "without brackets": (lambda: tn.rule(power_row), r"(?s)power_row is a plain function.*@tn.primitive"),
    "plain function": (lambda: tn.rule(plain), r"(?s)plain is a plain function.*no trace.*torch.library.custom_op"),
    "instance": (lambda: tn.rule(Power()), r"(?s)name Power, not one of its instances.*tn.einsum_layer"),
    "nn.Module": (lambda: tn.rule(nn.Module), "every torch.nn.Module"),
    "other class": (lambda: tn.rule(int), r"<class 'int'> cannot have a rule: a target is a module class, an op"),
    "text as a target": (lambda: tn.rule("Power"), r"'Power' cannot have a rule"),
    "several overloads": (lambda: tn.rule(torch.ops.aten.add), r"aten.add has several overloads: name one of .*Tensor"),
    "built-in": (lambda: tn.rule(torch.ops.aten.tanh.default), r"aten.tanh.default has a built-in rule: .*override"),
    "twice": (lambda: (tn.rule(Power)(FORMULA), tn.rule(Power)(FORMULA)), r"two rules for .*Power.*override=True"),
    "twice, by two names": (lambda: tn.registered({powered_op: of_call, PACKET: of_call}).__enter__(),
                            r"two rules for tnbackprop_tests.powered.default"),
    "passed function": (lambda: tn.compile(network(Power()), nn.MSELoss(), (X, Y), [], rules={plain: FORMULA}),
                        "plain is a plain function"),
    "field": (lambda: tn.Rule(None), "formula of a tn.Rule is NoneType, not text"),
    "fields": (lambda: tn.Rule(FORMULA, jacobian="1"), "jacobian of a tn.Rule is str, not a dictionary"),
    "root": (lambda: tn.Rule(FORMULA, root="1"), "root of a tn.Rule is str, not a tn.Root"),
    "code": (lambda: tn.Rule(FORMULA, forward=3), "forward of a tn.Rule is int, not text"),
    "list": (lambda: tn.compute(network(Power()), nn.MSELoss(), (X, Y), [], rules=[FORMULA]),
             r"(?s)rules is list, not a mapping.*tn.RULES \|"),
    "no row": (lambda: tn.rule(Power)(3), r"(?s)the rule for Power is 3.*function of the module"),
    "class as a row": (lambda: tn.rule(Power)(tn.Rule), r"the rule for Power is <class"),
    "text that is no formula": (lambda: tn.rule(Power)("gain[i] * input[n, i]"), "name.legs. = expression"),
    "Jacobian that is no expression": (lambda: tn.rule(Power)(tn.Rule(jacobian={"input": "gain[i"})), "not a formula"),
    "empty": (lambda: tn.rule(Power)(tn.Rule()), "the formula is empty"),
    "saved": (lambda: tn.rule(Power)(tn.Rule(FORMULA, saved={"mask[": "1"})), "not a formula"),
    "primitive of a class": (lambda: tn.primitive(Power), "is no plain function"),
    "primitive of a primitive": (lambda: tn.primitive(powered), "is no plain function"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISUSE)
def test_misuse(what: str) -> None:
    attempt, message = MISUSE[what]
    before = len(REGISTRY)
    with pytest.raises(RuleError, match=message):
        attempt()
    assert len(REGISTRY) == before + (what == "twice")


@pytest.mark.parametrize("rules", [{}, {Power: FORMULA}], ids=["empty", "one row"])
def test_a_table_without_the_built_in_rules_is_told(rules: dict[Any, Any]) -> None:
    message = r"(?s)aten.mse_loss.default in module 'loss' .* has no rule.*built-in rules: write rules=tn.RULES \|"
    with pytest.raises(tn.UnsupportedError, match=message):
        tn.compile(network(Power()), nn.MSELoss(), (X, Y), [tn.Grad()], rules=rules)
    mixing = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    for given in (None, tn.RULES, tn.RULES | rules):
        with pytest.raises(tn.UnsupportedError) as caught:
            tn.compile(mixing, nn.MSELoss(), (X, X), [tn.Grad()], rules=given)
        assert "tn.RULES" not in str(caught.value)




@pytest.mark.parametrize("returned", [None, 3, ("output[n] = input[n]",)], ids=str)
def test_a_row_that_returns_no_rule(returned: Any) -> None:
    tn.rule(Power)(lambda layer: returned)
    message = rf"(?s)the row for Power in module '2' \(Power\) returned {type(returned).__name__}.*return a Rule"
    with pytest.raises(RuleError, match=message):
        tn.compile(network(Power()), nn.MSELoss(), (X, Y), [tn.Grad()])


def row_that_raises(layer: Power) -> str:
    return f"output[n, i] = gain[i] * input[n, i]**{layer.pover}"


CODE: dict[str, tuple[Any, str]] = {
    "no Python": (tn.Rule(FORMULA, forward="{input} @@ {gain}"), r"(?s)no expression of Python.*{input} @@.*\n {11}\^"),
    "no braces": (tn.Rule(FORMULA, forward="gain * {input}**3"), r"(?s)unknown name 'gain' in the code.*write {gain}"),
    "no module": (tn.Rule(FORMULA, vjp={"input": "np.exp({input})"}), r"(?s)unknown name 'np'.*reads torch, and oper"),
    "row": (row_that_raises, r"(?s)the row for Power in module '2' .* AttributeError: .*\n.*test_declare.py, line"),
    "row without argument": (lambda: FORMULA, r"the row for Power .* raises TypeError: .* takes 0 positional"),
}  # fmt: skip


@pytest.mark.parametrize("what", CODE)
def test_wrong_code(what: str) -> None:
    declared, message = CODE[what]
    with pytest.raises(RuleError, match=message):
        tn.compile(network(Power()), nn.MSELoss(), (X, Y), [tn.Grad()], rules=tn.RULES | {Power: declared})


def test_code_may_have_names_of_its_own() -> None:
    """Of a lambda."""
    code = "{gain} * (lambda a: a * a * a)({input})"
    check(network(Power()), rules=tn.RULES | {Power: tn.Rule(FORMULA, forward=code)})


def test_a_primitive_that_returns_two() -> None:
    pair = tn.primitive(lambda value, gain, power: (value, gain))
    with tn.registered({pair: of_call}), pytest.raises(UnsupportedError, match="has a rule but returns tuple"):
        tn.compile(network(Calls(pair)), nn.MSELoss(), (X, Y), [tn.Grad()])


def test_override() -> None:
    """A built-in rule replaced for one block."""
    tanh = torch.ops.aten.tanh.default
    with tn.registered({tanh: tn.Rule("output[*s] = tanh(input[*s])", kinks="mine")}, override=True):
        program = check(network(Power()))
    assert any(rule.kinks == "mine" for _, rule in program.compiled.derived.bound)
    assert tn.RULES[tanh] not in REGISTRY.values()
