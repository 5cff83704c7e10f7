"""tn.generate: files that run without the library, give its numbers, and notice when they are wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from ..models import First

ROOT = Path(__file__).parents[2]
FILE = "generated.py"
BLOCKED = """
import runpy, sys
sys.modules["tnbackprop"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Factorised(nn.Module):
    """A bilinear form with a weight of rank 2, known by its own rule."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nij,ir,jr->nr", x, self.left, self.right)


RULES = tn.RULES | {Factorised: lambda module: "output[n, r] = x[n, i, j] * left[i, r] * right[j, r]"}
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 2), (3,)),
    "linear_positions": (lambda: nn.Linear(3, 2), (4, 3)),
    "convolution": (lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2), (2, 4, 4)),
    "layer_norm": (lambda: nn.LayerNorm(4), (4,)),
    "einsum_rule": (Factorised, (4, 3)),
}
COMPARED = (
    tn.Grad(),
    tn.BatchGrad(),
    tn.BatchL2(),
    tn.BatchDot(),
    tn.SecondMoment(),
    tn.Variance(),
    tn.DiagGGN(),
    tn.DiagGGN("diag_ggn_batch", per_sample=True),
    tn.SqrtGGN(),
    tn.GGNTrace(),
    tn.GGNGram(),
    tn.KFLR(),
)
FIRST = (tn.BatchGrad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance())


def layer(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    module = make().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module, torch.randn(5, *shape).double()


def loaded(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "generated"}
    exec(compile(source, FILE, "exec"), namespace)
    return namespace


def checked(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`python FILE --check` where the library cannot be imported."""
    path = folder / FILE
    path.write_text(source, encoding="utf-8")
    command = [sys.executable, "-I", "-W", "ignore", "-c", BLOCKED, str(path), "--check"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def passes(source: str, folder: Path) -> None:
    done = checked(source, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok" in done.stdout and "WRONG" not in done.stdout


def close(got: Any, want: Any) -> None:
    if isinstance(want, tn.KroneckerFactors):
        want = want.factors
    if isinstance(want, tuple):
        for one, other in zip(got, want, strict=True):
            close(one, other)
    else:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def given(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Cotangent and root columns of squared errors at the layer's output."""
    output = module(x).detach()
    count = output[0].numel()
    columns = torch.eye(count).double().reshape(count, 1, *output.shape[1:]).expand(count, *output.shape)
    return {"cotangent": 2 * (output - y), "columns": 2**0.5 * columns}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", LAYERS)
def test_numbers_of_a_layer(name: str) -> None:
    """Each function, and all of them together, give what the program gives for squared errors of the layer."""
    module, x = layer(name)
    y = torch.randn_like(module(x))
    want = tn.compile(module, nn.MSELoss(reduction="sum"), (x, y), COMPARED, rules=RULES)(x, y)
    file = loaded(tn.generate(module, COMPARED, example=x, rules=RULES).source)
    handed = given(module, x, y)
    inputs = dict(zip(file["INPUTS"], [x], strict=True))
    state = {key: value.detach() for key, value in module.state_dict().items()}
    values = inputs | {file["STATE"][key]: value for key, value in state.items()} | handed
    together = file["compute"](state, x, **handed)
    assert len(file["FUNCTIONS"]) == len(COMPARED) * len(state)
    for (quantity, parameter), function in file["FUNCTIONS"].items():
        close(file["call"](function, values), want[quantity][parameter])
        close(together[quantity][parameter], want[quantity][parameter])


def test_any_number_of_samples_and_columns() -> None:
    """One column at a time gives the sum that all of them give."""
    module, x = layer("convolution")
    file = loaded(tn.generate(module, "diag_ggn", example=x).source)
    function = file["FUNCTIONS"]["diag_ggn", "weight"]
    columns = torch.randn(6, 7, *module(x).shape[1:]).double()
    more = torch.randn(7, *x.shape[1:]).double()
    each = [function(more, column[None]) for column in columns]
    torch.testing.assert_close(function(more, columns), torch.stack(each).sum(0))


@pytest.mark.slow
@pytest.mark.parametrize("target", [tn.Target.TORCH, tn.Target.AUTOGRAD])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_checks_itself(name: str, target: tn.Target, tmp_path: Path) -> None:
    module, x = layer(name)
    quantities = [*COMPARED, tn.KFAC(), tn.Jacobians(), tn.NTK()] if target is tn.Target.TORCH else [tn.Grad()]
    passes(tn.generate(module, quantities, target, example=x, rules=RULES).source, tmp_path)


def test_a_rule_and_shapes(tmp_path: Path) -> None:
    """The formula alone: its forward is generated as well."""
    text = """inner[n, k] = weight[k, i] * input[n, i]
              hidden[n, k] = tanh(inner[n, k])
              output[n, o] = readout[o, k] * hidden[n, k]"""
    made = tn.generate(text, "batch_grad,kflr", example={"input": (5, 3), "weight": (4, 3), "readout": (2, 4)})
    passes(made.source, tmp_path)
    x, weight, readout = torch.randn(5, 3), torch.randn(4, 3), torch.randn(2, 4)
    output = loaded(made.source)["forward"](x, weight, readout)
    torch.testing.assert_close(output, torch.tanh(x @ weight.T) @ readout.T)


def joined_block(weight: Tensor, bias: Tensor) -> Tensor:
    """Σ of the outer products of rows [out, in + 1], from [K, out, in] and [K, out]."""
    rows = torch.cat([weight, bias.unsqueeze(2)], 2).flatten(1)
    return rows.T @ rows


def test_joined_bias() -> None:
    """One function for both; one sample's block is exact, and the model's file gives the program's numbers."""
    module, x = layer("linear")
    quantity = tn.KFLR("joined", bias=tn.Bias.JOINED)
    file = loaded(tn.generate(module, [quantity, tn.SqrtGGN()], example=x).source)
    assert {name for key, name in file["FUNCTIONS"] if key == "joined"} == {"weight"}
    columns = torch.randn(4, 1, 2).double()
    B, A = file["FUNCTIONS"]["joined", "weight"](x[:1], columns)
    weight = file["FUNCTIONS"]["sqrt_ggn", "weight"](x[:1], columns)
    close(torch.kron(B, A), joined_block(weight.flatten(0, 1), columns.flatten(0, 1)))
    model, y = nn.Sequential(module, nn.Tanh(), nn.Linear(2, 2).double()), torch.arange(5) % 2
    want = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [quantity])(x, y)["joined"]
    made = tn.generate(model, [quantity], loss=nn.CrossEntropyLoss(), example=(x, y))
    _, _, results = loaded(made.source)["compute"](model, x, y)
    assert set(results["joined"]) == set(want) == {"0.weight", "2.weight"}
    for name in want:
        close(results["joined"][name], want[name])


def test_second_derivatives_of_a_layer() -> None:
    """With the loss's Hessian and its gradient at the output, the layer's diagonals are those of the program."""
    module, x = layer("layer_norm")
    y = torch.randn(5, 4).double()
    quantities = [tn.HessianDiag(), tn.HessianDiag("each", per_sample=True), tn.HesScale(), tn.BL89()]
    want = tn.compile(module, nn.MSELoss(reduction="sum"), (x, y), quantities)(x, y)
    file = loaded(tn.generate(module, quantities, example=x).source)
    handed = given(module, x, y)
    values = {"input": x, "cotangent": handed["cotangent"], "diagonal": torch.full_like(y, 2.0)}
    values |= {"hessian_columns": handed["columns"], "hessian_weights": torch.ones(4, 5).double()}
    values |= {name: value.detach() for name, value in module.named_parameters()}
    for (quantity, name), function in file["FUNCTIONS"].items():
        close(file["call"](function, values), want[quantity][name])


def test_layers_one_after_another() -> None:
    """What KFRA and HesScale pull back to one layer's input is what the layer before it is handed."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    y, quantities = torch.randn(5, 2).double(), [tn.KFRA(), tn.HesScale()]
    want = tn.compile(model, nn.MSELoss(reduction="sum"), (x, y), quantities)(x, y)
    inner = model[0](x).detach()
    first, last = (loaded(tn.generate(m, quantities, example=h).source) for m, h in ((model[0], x), (model[1], inner)))
    residual = 2 * (model(x).detach() - y)
    weight = model[1].weight.detach()
    average, diagonal = 2 * 5 * torch.eye(2).double(), torch.full((5, 2), 2.0).double()
    values = {"input": inner, "cotangent": residual, "weight": weight, "average": average, "diagonal": diagonal}
    pulled = {word: last["call"](last["PULLED"][f"pulled_{word}", "input"], values) for word in ("average", "diagonal")}
    before = {"input": x, "cotangent": residual @ weight, "weight": model[0].weight.detach(), **pulled}
    for file, place, own in ((last, 1, values), (first, 0, before)):
        for (quantity, name), function in file["FUNCTIONS"].items():
            close(file["call"](function, own), want[quantity][f"{place}.{name}"])


def test_the_header_says_what_is_recorded(tmp_path: Path) -> None:
    """What autograd has no definition of, and nothing else; a check of such a file prints it as well."""
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), torch.randn(4, 3)
    quantities = "grad,sqrt_ggn,diag_ggn_mc,hessian_diag,kfac,hesscale"
    made = tn.generate(model, quantities, loss=nn.MSELoss(), example=(x, torch.randn(4, 2)))
    names = "hesscale of 0.weight, 0.bias, 2.weight, 2.bias"
    assert f"recorded when this file was written: {names}." in " ".join(loaded(made.source)["__doc__"].split())
    done = checked(made.source, tmp_path)
    assert done.returncode == 0 and done.stdout.count("as recorded") == 4, done.stdout + done.stderr
    assert "4 results are compared with numbers that were recorded" in done.stdout
    exact = tn.generate(nn.Linear(3, 2), "batch_grad,kflr,hesscale,kfra", example=x)
    assert "recorded" not in exact.source


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "right", "wrong"),
    [
        (tn.Target.TORCH, "torch.mm(cotangent.t(), input)", "2 * torch.mm(cotangent.t(), input)"),
        (tn.Target.TORCH, "torch.mm(cotangent, weight)", "2 * torch.mm(cotangent, weight)"),
        (tn.Target.TORCH, "torch.mm(input.t(), input)", "2 * torch.mm(input.t(), input)"),
        (tn.Target.TORCH, ", with_one(", ", with_one(2 * "),
        (tn.Target.AUTOGRAD, "torch.mm(cotangent.t(), input)", "2 * torch.mm(cotangent.t(), input)"),
    ],
)
def test_a_wrong_file_fails_its_check(target: tn.Target, right: str, wrong: str, tmp_path: Path) -> None:
    module, x = layer("linear")
    quantities = [tn.Grad(), tn.KFLR(), tn.KFLR("joined", bias=tn.Bias.JOINED)]
    source = tn.generate(module, quantities if target is tn.Target.TORCH else "grad", target, example=x).source
    assert right in source
    assert checked(source.replace(right, wrong), tmp_path).returncode == 1


def test_autograd_keeps_what_is_wanted() -> None:
    """A frozen weight needs no input; a bias alone keeps nothing."""
    module, x = layer("linear")
    function = loaded(tn.generate(module, "grad", tn.Target.AUTOGRAD, example=x).source)["Layer"]
    weight, bias = (p.detach().clone() for p in module.parameters())
    kept = []
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        arguments = [t.clone().requires_grad_(need) for t, need in zip((x, weight, bias), needs, strict=True)]
        output = function.apply(*arguments)
        saved = output.grad_fn.saved_tensors
        kept.append([None if t is None else tuple(t.shape) for t in saved])
    assert kept == [[None, (2, 3)], [(5, 3), None], [None, None]]


def test_autograd_of_a_frozen_parameter() -> None:
    """What had no gradient when the file was written raises, and is not zero."""
    module, x = layer("linear")
    module.weight.requires_grad_(False)
    function = loaded(tn.generate(module, "grad", tn.Target.AUTOGRAD, example=x).source)["Layer"]
    function.apply(x, module.weight, module.bias).sum().backward()
    torch.testing.assert_close(module.bias.grad, torch.full((2,), 5.0).double())
    output = function.apply(x, module.weight.clone().requires_grad_(), module.bias)
    with pytest.raises(NotImplementedError, match="weight had no gradient"):
        output.sum().backward()


class Gated(nn.Module):
    """Two inputs, a buffer, and a parameter with the name of something in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.ones(3))

    def forward(self, value: Tensor, gate: Tensor) -> Tensor:
        return value * self.state * torch.sigmoid(gate) + self.offset


@pytest.mark.slow
def test_two_inputs_and_a_buffer(tmp_path: Path) -> None:
    made = tn.generate(Gated(), "grad,diag_ggn", example=(torch.randn(4, 3), torch.randn(4, 3)))
    assert loaded(made.source)["INPUTS"] == ("value", "gate")
    pulled = {(word, name) for word in ("vjp", "vjp_columns") for name in ("value", "gate")}
    assert set(loaded(made.source)["PULLED"]) == pulled
    passes(made.source, tmp_path)


def test_a_declared_layer(tmp_path: Path) -> None:
    """A layer that is nothing but its formula."""
    module = tn.einsum_layer("output[n, o] = weight[o, i] * input[n, i]", weight=(2, 3))
    passes(tn.generate(module, "batch_l2,kflr", example=torch.randn(4, 3)).source, tmp_path)


MODELS: Mapping[str, Any] = {
    "classifier": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
        lambda: nn.CrossEntropyLoss(),
        lambda: (torch.randn(5, 1, 4, 4).double(), torch.randint(3, (5,))),
    ),
    "weighted_sum": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
        lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]).double(), reduction="sum"),
        lambda: (torch.randn(5, 4).double(), torch.arange(5) % 3),
    ),
    "columns_in_rounds": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)),
        nn.MSELoss,
        lambda: (torch.randn(40, 4).double(), torch.randn(40, 5).double()),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model(name: str, tmp_path: Path) -> None:
    """`compute` gives the program's numbers, from the model and from its state_dict; the file checks itself."""
    torch.manual_seed(0)
    make, loss, draw = MODELS[name]
    model, (x, y) = make().double(), draw()
    quantities = [*COMPARED, tn.NTK(), tn.KFAC(mc_samples=2)]
    made = tn.generate(model, quantities, loss=loss(), example=(x, y))
    passes(made.source, tmp_path)
    want = tn.compile(model, loss(), (x, y), quantities)(x, y, seed=3)
    compute = loaded(made.source)["compute"]
    for state in (model, model.state_dict()):
        value, output, results = compute(state, x, y, generator=torch.Generator().manual_seed(3))
        close(value, want.loss)
        close(output, want.output)
        for quantity in want:
            for parameter in want[quantity]:
                close(results[quantity][parameter], want[quantity][parameter])


@pytest.mark.slow
def test_a_recurrent_model(tmp_path: Path) -> None:
    """Its steps are written out: the file checks itself by autograd, in float64, whatever the first states are."""
    model, x = First(nn.LSTM(2, 3, batch_first=True)), torch.randn(4, 3, 2)
    source = tn.generate(model, "batch_l2,kfac", loss=nn.MSELoss(), example=(x, torch.randn(4, 3, 3))).source
    assert "lstm_backward" not in source and "dtype=torch.float32" not in source
    passes(source, tmp_path)


@pytest.mark.slow
def test_a_wrong_model_fails_its_check(tmp_path: Path) -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    source = tn.generate(model, "grad,diag_ggn", loss=nn.MSELoss(), example=(x, torch.randn(4, 2))).source
    line = next(row for row in source.splitlines() if "torch.mm(" in row)
    assert checked(source.replace(line, line.replace("torch.mm(", "2 * torch.mm(")), tmp_path).returncode == 1


@pytest.mark.thinned(3)
@pytest.mark.parametrize("target", ["torch", "backpack", "autograd", "model", "operands"])
def test_formatted(target: str, tmp_path: Path) -> None:
    """ruff, with this repository's rules, has nothing to say."""
    path = tmp_path / FILE
    module, x = layer("convolution")
    quantities = {"autograd": "grad", "backpack": list(FIRST)}.get(target, list(COMPARED))
    options: dict[str, Any] = {"example": x}
    if target in ("model", "operands"):
        options = {"example": (x, torch.randn_like(module(x))), "loss": nn.MSELoss()}
    if target == "operands":
        quantities = [tn.ClippedGrad(), tn.Total(tn.GGNTrace()), tn.DirectionalCurvature(), tn.InputGrad(), tn.Sketch()]
    tn.generate(module, quantities, None if target == "operands" else target, **options).save(path)
    ruff = Path(sys.executable).parent / "ruff"
    for command in (["check"], ["format", "--check", "--diff"]):
        whole = [ruff, *command, "--config", ROOT / "pyproject.toml", path]
        done = subprocess.run(whole, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120


def test_the_header_says_where_it_comes_from() -> None:
    module, x = layer("linear")
    made = tn.generate(module, "batch_grad", example=x)
    header = loaded(made.source)["__doc__"]
    for part in (tn.__version__, "output[*s, o] = weight[o, i] * input[*s, i] + bias[o]", "input [N, 3]", "--check"):
        assert part in header
    doc = loaded(made.source)["batch_grad_weight"].__doc__
    for part in ("[N, 2, 3]", "batch_grad[n,o,i] = (input[n,i] cotangent[n,o])", "FLOPs", "From the rules"):
        assert part in doc
    assert "tnbackprop" not in made.source.replace(header, "")
    assert repr(made).startswith("Generated(Linear(in_features=3, out_features=2, bias=True) for torch: ")
    assert str(made) == made.source
