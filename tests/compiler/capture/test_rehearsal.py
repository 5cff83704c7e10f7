"""What autograd does and no formula says is refused, by name; what changes nothing is right. Oracle: plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.nn.utils import parametrize

import tnbackprop as tn

from ...capturing import Function
from ...rehearsing import check, layers, refused

# autograd.Functions


class Sign(torch.autograd.Function):
    """Straight through, by the older way to write it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Reverse(torch.autograd.Function):
    """Saves nothing, has a setup_context and a vmap, and returns two tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Tensor:
        return -g - h


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class Quantize(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return Sign.apply(input)


@tn.primitive
def quantize(input: Tensor) -> Tensor:
    return Sign.apply(input)


class Still(torch.autograd.Function):
    """What it computes without gradients is not the start of a no_grad block for all that follows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


@pytest.mark.parametrize(
    "name,apply",
    [
        ("Sign", Sign.apply),
        ("Reverse", lambda h: sum(Reverse.apply(h))),
        ("Reverse", lambda h: Reverse.apply(h)[1]),
        ("Once", Once.apply),
        ("Sign", lambda h: Once.apply(h).detach() + Sign.apply(h)),
        ("Sign", lambda h: torch.utils.checkpoint.checkpoint(Sign.apply, h, use_reentrant=False)),
    ],
)
def test_functions(name: str, apply: Callable[..., Any]) -> None:
    refused(Function(lambda m, x: m.b(apply(m.a(x))), **layers()), f"Function '{name}' in the model.*tn.primitive")


def test_a_function_is_told_by_its_module() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), Quantize()), nn.Linear(3, 3))
    refused(model, r"Function 'Sign' in module '1\.1' \(Quantize\)")


def test_a_function_of_a_weight() -> None:
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Quantize())
    refused(nn.Sequential(nn.Linear(3, 3), layer), r"in module '1\.parametrizations\.weight\.0' \(Quantize\)")


@pytest.mark.parametrize("module", [False, True])
def test_a_function_in_the_loss(module: bool) -> None:
    class Loss(nn.Module):
        def forward(self, output: Tensor, y: Tensor) -> Tensor:
            return (Sign.apply(output) - y).square().sum()

    loss = Loss() if module else Loss().forward
    refused(nn.Linear(3, 3), r"Function 'Sign' in the loss", loss=loss)


def test_a_function_that_needs_no_gradient() -> None:
    """Of inputs, of what is detached: nothing flows through its backward."""
    check(Function(lambda m, x: m.b(m.a(Sign.apply(x)) + Sign.apply(m.a(x)).detach()), **layers()))


def test_a_function_that_export_takes_for_the_start_of_a_block() -> None:
    refused(Function(lambda m, x: m.a(Still.apply(x)), **layers()), r"parameter 'a\.bias' has a gradient.*no_grad")


@pytest.mark.parametrize("way", ["module", "primitive"])
def test_a_rule_stands_for_a_function(way: str) -> None:
    """As the error says: the Jacobian that is written counts, whatever is inside."""
    target = {"module": Quantize, "primitive": quantize}[way]
    middle = Quantize() if way == "module" else Function(lambda m, x: quantize(x))
    rule = tn.Rule("output[*s] = sign(input[*s])", jacobian={"input": "1"}, legs={"input": "*s", "output": "*s"})
    check(nn.Sequential(nn.Linear(3, 3), middle, nn.Linear(3, 3)), rules={**tn.RULES, target: rule})


# hooks


def hooked(register: str, hook: Callable[..., Any]) -> nn.Module:
    layer = nn.Linear(3, 3)
    getattr(layer, f"register_{register}")(hook)
    return layer


@pytest.mark.parametrize("register", ["full_backward_hook", "full_backward_pre_hook", "backward_hook"])
def test_backward_hooks(register: str) -> None:
    layer = hooked(register, lambda module, *gradients: None)
    refused(nn.Sequential(nn.Linear(3, 3), layer), r"module '1' \(Linear\) has a backward hook.*handle\.remove")


def test_a_backward_hook_of_all_modules() -> None:
    handle = module_globals.register_module_full_backward_hook(lambda module, *gradients: None)
    try:
        refused(nn.Linear(3, 3), "every module has a backward hook")
    finally:
        handle.remove()
    check(nn.Linear(3, 3))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters(register: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    handle = getattr(model[1].weight, register)(lambda g: None)
    refused(model, r"parameter '1\.weight' has a hook.*handle\.remove")
    handle.remove()
    check(model)


def noted(register: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        if h.requires_grad:
            register(h)
        return m.b(h)

    return forward


@pytest.mark.parametrize(
    "register",
    [
        lambda h: h.register_hook(lambda g: 2 * g),
        lambda h: h.grad_fn.register_hook(lambda into, out: None),
        lambda h: h.grad_fn.register_prehook(lambda out: None),
        lambda h: torch.autograd.graph.register_multi_grad_hook((h,), lambda g: None, mode="any"),
    ],
)
def test_hooks_in_forward(register: Callable[[Tensor], Any]) -> None:
    refused(Function(noted(register), **layers()), r"in the model \(Function\)")


def test_retain_grad_changes_nothing() -> None:
    check(Function(noted(Tensor.retain_grad), **layers()))


class Gate(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.inner = inner or nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        return self.inner(input * self.g)


RULES = {**tn.RULES, Gate: tn.Rule("output[n, i] = input[n, i] * g[i]")}


def with_hooks(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].tanh(),))
    layer.register_forward_hook(lambda module, inputs, kwargs, output: output.sin(), with_kwargs=True, prepend=True)
    return layer


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), Gate()], ids=["plain", "with a rule"])
def test_forward_hooks_count(layer: nn.Module) -> None:
    check(nn.Sequential(nn.Linear(3, 3), with_hooks(layer), nn.Linear(3, 3)), rules=RULES)


def test_forward_hooks_inside_a_module_with_a_rule() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Gate(with_hooks(nn.Identity())))
    refused(model, r"module '1\.inner' \(Identity\) has a forward hook, inside a module with a rule", rules=RULES)


def test_a_function_in_a_hook_of_a_module_with_a_rule() -> None:
    """The rule does not stand for the hook; it does for what is inside."""
    check(nn.Sequential(nn.Linear(3, 3), Gate()), rules=RULES)
    layer = Gate()
    layer.register_forward_hook(lambda module, inputs, output: Sign.apply(output))
    refused(nn.Sequential(nn.Linear(3, 3), layer), "Function 'Sign' in the model", rules=RULES)


# what stays right


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m.a(x).exp()
    return m.b(m.a(x) * scale + m.a(x).detach())


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "forward",
    [
        without_gradient,
        lambda m, x: m.b(torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False)),
        lambda m, x: torch.utils.checkpoint.checkpoint_sequential([m.a, m.b], 2, x, use_reentrant=False),
        lambda m, x: m.b(m.compiled(m.a(x))),
    ],
    ids=["no_grad", "checkpoint", "checkpoint_sequential", "torch.compile"],
)
def test_right(forward: Callable[..., Any]) -> None:
    check(Function(forward, **layers(compiled=torch.compile(nn.Tanh(), backend="eager"))))  # type: ignore[arg-type]


def test_reentrant_checkpoints() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return m.b(torch.utils.checkpoint.checkpoint(m.a, m.a(x), use_reentrant=True))

    refused(Function(forward, **layers()), "use_reentrant=False")


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        output = x * 2
        ctx.mark_non_differentiable(output)
        return output


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "forward,message",
    [
        (lambda m, x: m.b(m.a(x).data), r"detach\(\) for \.data"),
        (lambda m, x: m.b(Cut.apply(m.a(x))), r"other gradients.*detach\(\)"),
        (lambda m, x: m.b(Cut.apply(m.a(x)) + m.a(x)), r"other gradients.*detach\(\)"),
        (lambda m, x: m.b(m.a(x) + Still.apply(x)) + m.b(m.a(x)), r"'a\.bias' has a gradient|other gradients"),
    ],
)
def test_what_cuts_the_gradient(forward: Callable[..., Any], message: str) -> None:
    refused(Function(forward, **layers()), message)


def test_computed_before_forward() -> None:
    model = Function(lambda m, x: m.b(x) @ m.early, **layers()).double()
    model.early = (model.a.weight * 2).exp()
    refused(model, "'early' was computed before forward")
    model.early = model.early.detach()
    check(model)


def test_a_rule_may_have_a_derivative_that_torch_has_not() -> None:
    """Of an operator that autograd takes for a constant."""
    rule = tn.Rule("output[*s] = erf(input[*s])", forward="torch.special.bessel_j0({input})", jacobian={"input": "2"})
    rules = {**tn.RULES, torch.ops.aten.special_bessel_j0.default: rule}
    model = Function(lambda m, x: torch.special.bessel_j0(m.a(x)), **layers())
    x = torch.ones(5, 3, dtype=torch.float64)
    result = tn.compile(model.double(), lambda o, y: o.sum(), (x, x), [tn.Grad()], rules=rules)(x, x)
    torch.testing.assert_close(result["grad"]["a.bias"], torch.full((3,), 10.0, dtype=torch.float64))


@pytest.mark.parametrize("name", ["sign", "sgn", "floor", "ceil", "round", "trunc", "fix"])
def test_derivatives_that_are_zero(name: str) -> None:
    """Parameters before a step have a gradient, which is zero."""
    result = check(Function(lambda m, x: m.b(getattr(torch, name)(m.a(x))), **layers()))
    assert not result["grad"]["a.weight"].any()
