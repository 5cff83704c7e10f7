"""What the compiler reads of torch that torch does not promise: each does what it says, and is undone."""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import tnbackprop as tn
from tnbackprop.compiler.running import torch_quiet as quiet
from tnbackprop.compiler.translate import torch_internals as internals
from tnbackprop.compiler.translate.torch_modes import InFloat64

from ... import oracle
from ...capturing import Function

aten = torch.ops.aten
PLACES = ("torch_calls", "torch_internals", "torch_quiet", "torch_tracer", "torch_versions")
FILES = [path for path in Path(tn.__file__).parent.rglob("*.py") if path.stem not in PLACES]
PRIVATE = re.compile(
    r"torch\._[a-zA-Z]|torch\.fx\.experimental|torch\.nn\.utils\.stateless|_op_dk|py_kernels|_dispatch_cache|_destroy\("
    r"|opt_einsum\.flags|\._version\b|\._\w*_hooks\b|\._schema|_overloadname|_opoverload|_qualified_op_name"
    r"|\._parameters\b|\._buffers\b"
)
"""Private parts of torch but for its pytree, which half of the world reads."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_else_names_a_private_part_of_torch(path: Path) -> None:
    found = [line for line in path.read_text(encoding="utf-8").splitlines() if PRIVATE.search(line)]
    assert not found


def failing(context: Any) -> None:
    with pytest.raises(KeyError), context:
        raise KeyError


def test_einsums_stay_whole() -> None:
    before = torch.backends.opt_einsum.enabled
    with internals.whole_einsums():
        assert not torch.backends.opt_einsum.enabled
    failing(internals.whole_einsums())
    assert torch.backends.opt_einsum.enabled == before


@pytest.mark.parametrize("name", ["a", "a.b", "class", 'x"', "'", "\n", "\\", "7", "ﬁ", '")\nraise RuntimeError\n#'])
def test_attributes_of_any_name(name: str) -> None:
    before = torch.fx.graph._format_target
    with internals.any_target():
        text = torch.fx.graph._format_target("root", name)
    failing(internals.any_target())
    assert torch.fx.graph._format_target is before
    inner = SimpleNamespace(**{name.rpartition(".")[2]: 1})
    assert eval(text, {"root": SimpleNamespace(a=inner) if "." in name else inner}) == 1


def exported(model: nn.Module, x: Tensor) -> Any:
    batch = torch.export.Dim("batch", max=sys.maxsize - 1)
    return torch.export.export(model, (x,), dynamic_shapes=(({0: batch},),), strict=False)


def test_kernels_are_for_tracing_and_gone_afterwards() -> None:
    """The operator stays one node; its shape is that of the kernel; eager calls and later ones see torch's own."""
    target, asked = aten.cross_entropy_loss.default, []

    def kernel(*operands: Any) -> Any:
        asked.append(operands[0].shape)
        return internals.composite_kernel(target, *operands)

    model = Function(lambda m, x: F.cross_entropy(m.a(x), x[:, 0].long() * 0), a=nn.Linear(3, 2))
    x = torch.randn(4, 3)
    with internals.traced_as({target: kernel}):
        traced = exported(model, x)
        model(x)
    assert asked and target in [node.target for node in traced.graph.nodes] and not target.py_kernels
    failing(internals.traced_as({target: kernel}))
    asked.clear()
    exported(model, x)
    assert not asked and not target.py_kernels


def test_shapes_by() -> None:
    """What stands in is asked instead of torch's own, which it gets, and is gone afterwards."""
    asked = []

    def divided(own: Callable[..., Any], mode: Any, *operands: Any) -> Any:
        asked.append(operands)
        return own(mode, *operands)

    model = Function(lambda m, x: m.a(x) / x, a=nn.Linear(3, 3))
    with internals.shapes_by({aten.div.Tensor: divided}):
        exported(model, torch.randn(4, 3))
    assert asked
    asked.clear()
    failing(internals.shapes_by({aten.div.Tensor: divided}))
    exported(model, torch.randn(4, 3))
    assert not asked


def test_operators_are_gone() -> None:
    for _ in range(2):  # the name is free again
        with internals.operators("tnbackprop_test") as library:
            library.define("twice(Tensor x) -> Tensor")
            library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
            assert torch.ops.tnbackprop_test.twice(torch.ones(())) == 2


def test_with_tensors() -> None:
    layer = nn.Linear(2, 1)
    own, other = layer.weight, torch.zeros(1, 2)
    with internals.with_tensors(layer, {"weight": other}):
        assert layer.weight is other and layer.bias is not None
    assert layer.weight is own


def test_hooks_are_counted() -> None:
    layer, h = nn.Linear(2, 2), torch.zeros(2, requires_grad=True)
    assert not internals.backward_hooks(layer) and not internals.forward_hooks(layer) and not internals.tensor_hooks(h)
    for kind in ("full_backward_hook", "full_backward_pre_hook", "backward_hook"):
        other = nn.Linear(2, 2)  # a module has hooks of one kind
        handle = getattr(other, f"register_{kind}")(lambda m, *gradients: None)
        assert internals.backward_hooks(other) == 1
        handle.remove()
        assert not internals.backward_hooks(other)
    for handle in (
        layer.register_forward_hook(lambda m, i, o: None),
        layer.register_forward_pre_hook(lambda m, i: None),
    ):
        assert internals.forward_hooks(layer)
        handle.remove()
    assert not internals.forward_hooks(layer)
    for place, register in enumerate((h.register_hook, h.register_post_accumulate_grad_hook)):
        handle = register(lambda g: None)
        assert internals.tensor_hooks(h) == len(internals.hooks_of(h)[place]) == 1
        handle.remove()
    assert not internals.tensor_hooks(h) and not internals.global_backward_hooks()
    assert not any(internals.global_hooks())
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: None)
    assert [len(hooks) for hooks in internals.global_hooks()] == [1, 0, 0, 0]
    handle.remove()
    for register in (
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda m, *gradients: None)
        assert internals.global_backward_hooks() == 1
        handle.remove()
    assert not internals.global_backward_hooks()


def test_schemas() -> None:
    """What operators say of themselves."""
    slice_, relu_ = aten.slice.Tensor, aten.relu_.default
    assert internals.overload("slice.Tensor") is slice_ and internals.overload("relu_") is relu_
    assert internals.overload("no_such_operator") is internals.overload("relu.no_such_overload") is None
    assert internals.name_of(slice_) == ("slice", "Tensor") and internals.name_of(relu_) == ("relu_", "default")
    assert [a.name for a in internals.arguments_of(slice_)] == ["self", "dim", "start", "end", "step"]
    assert [a.default_value for a in internals.arguments_of(slice_)][1:] == [0, None, None, 1]
    kinds = [(a.name, a.kwarg_only, a.has_default_value()) for a in internals.arguments_of(aten.add.Tensor)]
    assert kinds == [("self", False, False), ("other", False, False), ("alpha", True, True)]
    assert internals.is_mutation(relu_) and not internals.is_mutation(slice_) and not internals.is_mutation("relu_")
    assert internals.written_arguments(relu_) == [0] and internals.written_arguments(slice_) == []
    assert internals.written_arguments(aten.add.out) == [3]
    assert internals.shares_memory(slice_) and not internals.shares_memory(aten.relu.default)


def test_spaces() -> None:
    """Whose an operator is."""
    with internals.operators("tnbackprop_test") as library:
        library.define("twice(Tensor x) -> Tensor")
        other = torch.ops.tnbackprop_test.twice
        assert internals.space_of(other) == internals.space_of(other.default) == "tnbackprop_test"
        assert not internals.of_aten(other.default)
    assert internals.space_of(aten.relu) == "aten" and internals.of_aten(aten.relu.default)
    assert not internals.of_aten(nn.ReLU)


def test_the_overload_of_a_custom_operator() -> None:
    @torch.library.custom_op("tnbackprop_test::thrice", mutates_args=())
    def thrice(x: Tensor) -> Tensor:
        return 3 * x

    assert internals.overload_of(thrice) is torch.ops.tnbackprop_test.thrice.default
    assert internals.overload_of(nn.ReLU) is nn.ReLU


def test_own_tables() -> None:
    layer = nn.BatchNorm1d(2, affine=False)
    parameters, buffers, modules = internals.own_tables(layer)
    assert not modules and list(internals.own_tables(nn.Sequential(layer))[2].values()) == [layer]
    assert parameters == {"weight": None, "bias": None} and list(buffers) == [name for name, _ in layer.named_buffers()]
    buffers["running_mean"] = torch.ones(2)
    assert layer.running_mean.sum() == 2


def test_version() -> None:
    h = torch.zeros(2)
    before = internals.version(h)
    h[:1].add_(1)
    assert internals.version(h) > before


def test_python_nodes() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    h = torch.ones(2, requires_grad=True)
    assert isinstance(Twice.apply(h).grad_fn, internals.PythonNode)
    assert not isinstance((2 * h).grad_fn, internals.PythonNode)


@pytest.mark.parametrize(
    "message,forward",
    [
        ("data-dependent", lambda m, x: x if x.sum() > 0 else -x),
        ("Constraints", lambda m, x: x if x.shape[0] > 3 else -x),
    ],
)
def test_what_export_refuses(message: str, forward: Callable[..., Any]) -> None:
    with pytest.raises(internals.export_refusals(), match=message), quiet.Quiet():
        exported(Function(forward), torch.randn(4, 3))


def test_guards_of_sizes() -> None:
    told: list[Any] = []
    with internals.guards_of_sizes(told.append):
        program = torch.export.export(
            Function(lambda m, x: x if x.shape[0] < 9 else -x),
            (torch.ones(4, 3),),
            dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},),),
            strict=False,
        )
    (symbol,) = program.range_constraints
    assert told == [symbol < 9]


def test_dual_tensors_are_seen() -> None:
    called = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    with Seen(), torch.autograd.forward_ad.dual_level():
        torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2))
    assert internals.makes_dual in called


def test_sizes_in_data() -> None:
    """Those that a mask decides; not that of a batch, and no number."""
    asked = []

    def forward(m: Any, x: Tensor) -> Tensor:
        asked.extend(internals.is_in_data(size) for size in (x[x > 0].shape[0], x.shape[0], x.shape[1]))
        return m.a(x)  # type: ignore[no-any-return]

    exported(Function(forward, a=nn.Linear(3, 2)), torch.ones(4, 3))
    assert asked == [True, False, False]


def test_weight_norm_is_what_torch_calls() -> None:
    called = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with Seen():
        layer(torch.ones(2))
    assert internals.weight_norm in called


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed to stderr comes afterwards; loggers are as before."""
    logger, guards = (logging.getLogger(name) for name in (quiet._EXAMPLE, quiet._GUARDS))
    before = logger.disabled, list(guards.filters)
    with quiet.Quiet():
        print("said", file=sys.stderr)
        assert logger.disabled
    failing(quiet.Quiet())
    assert (logger.disabled, guards.filters) == before and capsys.readouterr().err == "said\n"


def test_one_thread_at_a_time() -> None:
    """Four threads compile models of their own at once, and all are right; torch's switches are as before."""
    before = torch.backends.opt_einsum.enabled, torch.is_grad_enabled(), torch.backends.cuda.flash_sdp_enabled()

    def work(seed: int) -> None:
        model = nn.Sequential(nn.Linear(3, 4 + seed), nn.Tanh(), nn.Linear(4 + seed, 2)).double()
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        loss = nn.MSELoss()
        result = tn.compile(model, loss, (x, x[:, :2]), [tn.Grad()])(x, x[:, :2])
        for name, value in oracle.grad(model, loss, x, x[:, :2]).items():
            torch.testing.assert_close(result["grad"][name], value)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [None] * 4  # raises what a thread raised
    assert before == (
        torch.backends.opt_einsum.enabled, torch.is_grad_enabled(), torch.backends.cuda.flash_sdp_enabled(),
    )  # fmt: skip


def test_another_thread_runs_modules_while_one_exports() -> None:
    """One call of the loss of both begins before those of the thread that exports, and ends after them."""
    started, inside, exported = threading.Event(), threading.Event(), threading.Event()
    exporting = threading.get_ident()
    x = torch.randn(5, 3, dtype=torch.float64)

    def difference(m: Any, output: Tensor, y: Tensor) -> Tensor:
        if threading.get_ident() != exporting:
            inside.set()
            assert exported.wait(60)
        return (output - y).square().mean()

    def forward(m: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            started.set()
            assert inside.wait(20)
        return m.a(x)

    def other() -> Tensor:
        assert started.wait(20)
        return loss(x, 2 * x)

    loss, model = Function(difference), Function(forward, a=nn.Linear(3, 3)).double()
    with ThreadPoolExecutor(1) as threads:
        seen = threads.submit(other)
        try:
            result = tn.compile(model, loss, (x, x), [tn.Grad()])(x, x)
        finally:
            exported.set()
        torch.testing.assert_close(seen.result(), x.square().mean())
    want = torch.autograd.grad(loss(model(x), x), model.a.bias)[0]
    torch.testing.assert_close(result["grad"]["a.bias"], want)


def test_another_thread_runs_a_primitive_while_one_compiles() -> None:
    """A stand-in is for the thread that compiles: others call the function itself."""
    started, done, seen = threading.Event(), threading.Event(), []

    def forward(m: Any, x: Tensor) -> Tensor:
        started.set()
        done.wait(20)
        return halved(m.a(x))

    def other() -> None:
        started.wait(20)
        seen.append(halved(torch.ones(1)))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    x = torch.randn(4, 3)
    rules = {**tn.RULES, halved: tn.Rule("output[n, i] = 0.5 * input[n, i]")}
    tn.compile(Function(forward, a=nn.Linear(3, 2)), lambda o, y: o.sum(), (x, x), [tn.Grad()], rules=rules)
    thread.join()
    assert [float(value) for value in seen] == [0.5]


@tn.primitive
def halved(input: Tensor) -> Tensor:
    return input / 2


def test_everything_in_float64() -> None:
    """Casts, dtypes that operators are given, constants that are made; and backward."""
    x = torch.rand(4, dtype=torch.float64, requires_grad=True)
    with InFloat64():
        y = x.float() + x.half().to(torch.bfloat16) + x.softmax(0, dtype=torch.float32)
        z = torch.zeros(2, dtype=torch.float32) + torch.arange(2)
        (g,) = torch.autograd.grad((y * torch.arange(4)).sum(), x)
    s = x.detach().softmax(0)
    w = torch.arange(4).double()
    assert torch.equal(y, 2 * x + s) and z.dtype == torch.float64
    torch.testing.assert_close(g, 2 * w + s * (w - s @ w), rtol=1e-12, atol=0)
    assert x.float().dtype == torch.float32
