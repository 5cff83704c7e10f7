"""From an exported program to a frozen `Graph`: one pass over the nodes, each handled by kind."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import OutputKind
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ...diagram.core import Size
from ...errors import UnsupportedError
from ..batched.axes import batch_axis, show, value_axes
from ..batched.flat import Known, multiple_of_range
from ..batched.masks import Picked, lists_of_picked, picked_call
from ..batched.mixing import check_mixing
from ..batched.rewritten import rewritten
from ..running.failure import line_of
from ..translate.canonical import alias_of, canonical, output_call
from ..translate.casts import Casts
from ..translate.complex import Complex
from ..translate.graph import Call, Graph, NotGiven, Value, depends_on, needed, values_in
from ..translate.inplace import NO_GRAD_BLOCK, functional, owner
from ..translate.inputs import enter
from ..translate.names import Names, module_of, op_name
from ..translate.opaque import NAMESPACE, Opaque
from ..translate.operators import Same, row_of
from ..translate.sizes import Sizes
from ..translate.torch_internals import HigherOrderOperator, OpOverload, arguments_of, is_mutation, name_of
from .reach import above, batch_in_train, check_loss, refuse_written

aten = torch.ops.aten


def translate(
    wrapped: nn.Module,
    exported: torch.export.ExportedProgram,
    opaque: dict[str, Opaque],
    example: tuple[Any, Any],
    batch: int,
) -> Graph:
    """The graph of an exported ``(x, y) -> (loss, output)`` with a model and a loss as submodules."""
    translator = _Translator(wrapped, exported, opaque, example)
    translator.run(exported.graph_module)
    return translator.graph(example, batch)


class _Several:
    """The outputs of a node with several outputs, made into calls when they are taken."""

    def __init__(self, node: Node, target: Any, arguments: dict[str, Any]) -> None:
        self.node, self.target, self.arguments = node, target, arguments


class _Translator:
    def __init__(
        self,
        wrapped: nn.Module,
        exported: torch.export.ExportedProgram,
        opaque: dict[str, Opaque],
        example: tuple[Any, Any],
    ) -> None:
        self.wrapped, self.exported, self.opaque = wrapped, exported, opaque
        self.names, self.sizes = Names(), Sizes(exported)
        self.entered = enter(wrapped, exported, self.sizes, self.names, example)
        self.env: dict[Node, Any] = dict(self.entered.env)
        self.values = dict(self.entered.values)
        self.calls: list[Call] = []
        self.uniform: dict[str, Call] = {}  # tensors of equal entries, by name
        self.aggregates: set[str] = set()  # differentiable values in which the batch was summed
        self.ranges: dict[str, int] = {}  # values that count the samples, k·arange(N): their k
        self.complex = Complex()
        self.casts = Casts()
        self.no_grad = False
        self.last_of_module: dict[str, Node] = {}
        self.loss_node: Node | None = None
        self.needed: set[Node] = set()  # what the loss is computed of
        self.left: list[str] = []

    # calls

    def run(self, program: GraphModule) -> None:
        """Translate every node of a (sub)graph."""
        for node in program.graph.nodes:
            if op_name(node.target) != "getitem":
                self.last_of_module[module_of(node)[0]] = node
        if program is self.exported.graph_module:
            self.loss_node = self._origin(self._outputs()[0])
            self.needed = above(self.loss_node)
            self._refuse_first(program)
        for node in program.graph.nodes:
            if node.op == "get_attr":
                self.env[node] = getattr(program, str(node.target))
            elif node.op == "call_function" and not (op_name(node.target) == "getitem" and not node.users):
                self._try(node, program)

    def _try(self, node: Node, program: GraphModule) -> None:
        """What the loss does not need may stay untranslated: it is no output then, or told where it is read."""
        try:
            self._node(node)
        except UnsupportedError as error:
            own = program is self.exported.graph_module
            if not own or node in self.needed or self.wrapped.loss is None or is_mutation(node.target):
                raise
            self.env[node] = error

    def _node(self, node: Node) -> None:
        value = node.meta.get("val")
        if node.target is NO_GRAD_BLOCK:
            self.env[node] = self._block(node)
        elif isinstance(node.target, HigherOrderOperator):
            raise UnsupportedError(
                f"{self._where(node)}: {node.target} is a nested graph, which has no rule. Write it as plain ops"
            )
        elif op_name(node.target) == "getitem":
            self.env[node] = self._item(node)
        elif isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
            self.env[node] = self._number(node, value)
        elif value is not None:
            self._call(node)

    def _number(self, node: Node, value: Any) -> Any:
        """A number; where it is in the data, what is raised once it is used."""
        try:
            return self.sizes.number(value, self._where(node), line_of(node))
        except UnsupportedError as error:
            return error

    def _call(self, node: Node) -> None:
        target = node.target
        assert isinstance(target, OpOverload)
        arguments = self._arguments(node)
        where, val = self._where(node), node.meta["val"]
        if (several := lists_of_picked(arguments, val, target, self.calls, where)) is not None:
            self.env[node] = several
            return
        if target.namespace == NAMESPACE:
            opaque = self.opaque[name_of(target)[0]]
            named = opaque.arguments(arguments["site"], arguments["inputs"], arguments["tensors"])
            named = {k: self.sizes.converted(v) for k, v in named.items()}
            self.env[node] = self._emit(node, opaque.target, named, val, **opaque.facts)
            return
        if is_mutation(target):
            base = owner(node)
            if base.op == "placeholder" and self.env[base].name not in self.entered.inputs:
                name = self.entered.dotted(self.env[base].name)
                raise UnsupportedError(
                    f"{where} writes to {name!r} during forward: a program changes no parameter and no buffer. "
                    "Call model.eval(), or remove the update"
                )
            target = functional(target, where)
        if isinstance(val, list | tuple):
            self.env[node] = _Several(node, target, arguments)
            return
        append = partial(self._append, node)
        picked = picked_call(target, arguments, val, self.calls, append, where)
        self.env[owner(node)] = self._emit(node, target, arguments, val) if picked is None else picked

    def _emit(
        self, node: Node, target: Any, arguments: dict[str, Any], val: Any, name: str = "", **facts: Any
    ) -> Value:
        """Append a call with the output `val` (or alias its input) and return the output. `facts`: of the `Call`."""
        shape = self.sizes.shape(val, self._where(node), line_of(node))
        return self._append(node, target, arguments, shape, val.dtype, name, **facts)

    def _append(
        self,
        node: Node,
        target: Any,
        arguments: dict[str, Any],
        shape: tuple[Size, ...],
        dtype: torch.dtype,
        name: str = "",
        **facts: Any,
    ) -> Value:
        where, given = self._where(node), target
        append = partial(self._before, node)
        arguments = self.casts.copied(target, arguments, dtype, append)
        target, arguments = canonical(target, arguments, shape)
        facts = facts if target is given else {}
        arguments = {key: self._reordered(value, arguments) for key, value in arguments.items()}
        same = alias_of(target, arguments, shape, dtype)
        if same is not None and (same.depends_on == frozenset() or not self.no_grad):
            return same
        if not self.no_grad:
            arguments = self.casts.in_one_dtype(target, arguments, dtype, append)
            target, arguments = self.casts.widened(target, arguments, shape, dtype, append)
        known = Known(self.ranges, self.calls)
        target, arguments = rewritten(target, arguments, shape, known, append)
        row = row_of(target)
        inputs = values_in(arguments)
        depends: frozenset[str] = depends_on(arguments)
        if self.no_grad or row.no_gradient or not (dtype.is_floating_point or dtype.is_complex):
            depends = frozenset()
        axes = value_axes(target, arguments, shape, where)
        made = node.meta.get("val")
        device = made.device.type if isinstance(made, torch.Tensor) else inputs[0].device if inputs else "cpu"
        output = Value(self._name(node, target, name), axes, dtype, depends, device)
        check_mixing(target, arguments, output, known, where)
        self._follow_batch(target, arguments, inputs, output, where)
        facts = dict(zip(("path", "module_type"), module_of(node)[1:], strict=True)) | facts
        call = Call(target, MappingProxyType(self.complex.within(arguments, where, target)), output, **facts)
        return self.complex.keep(call, self.no_grad, where) if dtype.is_complex else self._made(call)

    def _before(self, node: Node, target: Any, arguments: Any, shape: Any, dtype: torch.dtype, name: str = "") -> Value:
        """Append a call that another of the same node reads."""
        return self._append(node, target, arguments, shape, dtype, name or op_name(target))

    def _reordered(self, value: Any, arguments: dict[str, Any]) -> Any:
        """A tensor of equal entries, made anew with the order of an axis k·N that the other operands have."""
        made = self.uniform.get(value.name) if isinstance(value, Value) else None
        if made is None:
            return value
        axes = [v.axes for v in arguments.values() if isinstance(v, Value) and v is not value]
        sizes = {Value("", (axis,), value.dtype).shape: axis for each in axes for axis in each if len(axis) > 1}
        wanted = tuple(sizes.get((size,), axis) for size, axis in zip(value.shape, value.axes, strict=True))
        if wanted == value.axes:
            return value
        other = replace(value, name=self.names.fresh(value.name), axes=wanted)
        return self._made(replace(made, output=other))

    def _made(self, call: Call) -> Value:
        self.values[call.output.name] = call.output
        self.calls.append(call)
        if row_of(call.target).uniform:
            self.uniform[call.output.name] = call
        return call.output

    def _follow_batch(
        self, target: Any, arguments: dict[str, Any], inputs: list[Value], output: Value, where: str
    ) -> None:
        """Refuse a sum over samples that goes back into the samples; note sums over samples and sample counters."""
        batched = batch_axis(output) is not None
        for value in inputs:
            if batched and value.name in self.aggregates and output.depends_on:
                raise UnsupportedError(
                    f"{where} mixes samples: {value.name} {show(value.shape)} is computed from the whole batch, and "
                    f"{output.name} {show(output.shape)} uses it for each sample. Derivatives are taken per sample: "
                    "use statistics that do not depend on the batch"
                )
        if (
            not batched
            and output.depends_on
            and any(batch_axis(v) is not None or v.name in self.aggregates for v in inputs)
        ):
            self.aggregates.add(output.name)
        if (multiple := multiple_of_range(target, arguments, output, self.ranges)) is not None:
            self.ranges[output.name] = multiple

    def _arguments(self, node: Node) -> dict[str, Any]:
        """The arguments by schema name, defaults filled in, `self` as `input`."""
        assert isinstance(node.target, OpOverload)
        arguments: dict[str, Any] = {}
        for k, argument in enumerate(arguments_of(node.target)):
            value = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            value = self._argument(value)
            length = getattr(argument, "N", None)  # of a fixed-length list, such as a stride
            if length and isinstance(value, tuple) and len(value) == 1:
                value = value * length
            elif length and isinstance(value, int):
                value = (value,) * length
            arguments["input" if argument.name == "self" else argument.name] = value
        return arguments

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Node):
            found = self.env[owner(value)]
            if isinstance(found, UnsupportedError):
                raise found
            if isinstance(found, _Several):
                raise UnsupportedError(f"{self._where(value)} returns several tensors that are used as one")
            return found
        if isinstance(value, list | tuple):
            return tuple(self._argument(v) for v in value)
        return self.sizes.converted(value)

    def _item(self, node: Node) -> Any:
        source, index = node.args
        assert isinstance(source, Node) and isinstance(index, int)
        several = self.env[source]
        if not isinstance(several, _Several):
            return several[index]
        vals = several.node.meta["val"]
        where, line = self._where(several.node), line_of(several.node)
        shapes = [() if v is None else self.sizes.shape(v, where, line) for v in vals]  # or a gradient nobody asked for
        piece = output_call(several.target, several.arguments, shapes, index, where)
        target, arguments = piece or (several.target, several.arguments)
        name = f"{op_name(several.target)}_{index}" if len(vals) > 1 and (piece or index) else ""
        of = {} if piece else {"item": index, "outputs": f"{several.node.name}:outputs"}
        return self._emit(several.node, target, dict(arguments), vals[index], name, **of)

    def _block(self, node: Node) -> tuple[Any, ...]:
        """The outputs of a `with torch.no_grad()` block: its calls inline, cut from the gradient."""
        enabled, block, *operands = node.args
        before = self.no_grad
        self.no_grad = before or not enabled
        assert isinstance(block, Node)
        program = self.env[block]
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        self.env.update(zip(placeholders, (self._argument(o) for o in operands), strict=True))
        self.run(program)
        outputs = program.graph.output_node().args[0]
        results = tuple(self._argument(o) for o in outputs)
        if self.no_grad:
            results = tuple(self._detached(node, r) if isinstance(r, Value) and r.depends_on else r for r in results)
        self.no_grad = before
        return results

    def _detached(self, node: Node, value: Value) -> Value:
        output = Value(self.names.fresh(f"{value.name}_detach"), value.axes, value.dtype, device=value.device)
        _, path, kind = module_of(node)
        self._made(Call(aten.detach.default, MappingProxyType({"input": value}), output, path, kind))
        return output

    # names and messages

    def _name(self, node: Node, target: Any, name: str) -> str:
        if node is self.loss_node and not name:
            return self.names.fresh("loss")
        key, path, _ = module_of(node)
        if path and path != "loss" and self.last_of_module.get(key) is node and not name:
            return self.names.fresh(path.replace(".", "_"))
        operation = name or op_name(target)
        return self.names.fresh(f"{path}_{operation}".replace(".", "_") if path else operation)

    def _where(self, node: Node) -> str:
        _, path, kind = module_of(node)
        if path == "loss":
            return f"{node.target} in the loss"
        return f"{node.target} in module {path!r} ({kind})" if path else f"{node.target} in the model"

    def _refuse_first(self, program: GraphModule) -> None:
        """What is refused before anything else, so that the message names the cause and not a symptom."""
        for node in program.graph.nodes:
            if node.op == "call_function" and node.target is aten.batch_norm.default and batch_in_train(node):
                raise UnsupportedError(
                    f"{self._where(node)} is in train mode, so it mixes samples: there are no individual gradients. "
                    "Call model.eval() (with running statistics), or use GroupNorm or LayerNorm"
                )
        refuse_written(self.exported)

    # outputs

    def _outputs(self) -> list[Any]:
        specs = self.exported.graph_signature.output_specs
        output = self.exported.graph.output_node().args[0]
        assert isinstance(output, tuple | list)
        return [o for o, spec in zip(output, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]

    def _origin(self, node: Any) -> Any:
        while isinstance(node, Node) and row_of(node.target).same is Same.ALWAYS:
            node = node.args[0]
        return node

    def _result(self, place: int, node: Any) -> Any:
        """The loss, at place 0, or a leaf of what the model returns."""
        try:
            if isinstance(found := self._argument(node), Picked):
                found.refuse(self._where(node))
            if isinstance(found, Value) and found.dtype.is_complex:
                raise UnsupportedError("the model returns a complex tensor: return torch.view_as_real of it")
        except UnsupportedError as error:
            if not place or self.wrapped.loss is None:
                raise
            self.left.append(str(error).partition("\n")[0])
            return NotGiven.NOT_GIVEN
        return found

    def graph(self, example: tuple[Any, Any], batch: int) -> Graph:
        """The finished graph, without the calls that neither loss nor output needs."""
        results = [self._result(k, o) for k, o in enumerate(self._outputs())]
        names = [r.name if isinstance(r, Value) else r for r in results]
        out_spec = self.exported.call_spec.out_spec
        assert out_spec is not None
        loss, output = pytree.tree_unflatten(names, out_spec)
        if loss is not None or self.wrapped.loss is not None:
            check_loss(self.values, loss)
        calls = needed(self.calls, {n for n in names if isinstance(n, str)})
        entered = self.entered
        kept = {call.output.name for call in calls} | set(entered.values)
        return Graph(
            calls=tuple(calls),
            values=MappingProxyType({name: value for name, value in self.values.items() if name in kept}),
            parameters=MappingProxyType(entered.parameters),
            buffers=MappingProxyType(entered.buffers),
            constants=MappingProxyType(entered.constants),
            inputs=tuple(entered.inputs),
            output=output,
            loss=loss,
            example_batch=batch,
            in_spec=pytree.tree_flatten(example)[1],
            left=tuple(self.left),
            absent=tuple(k for k, leaf in enumerate(pytree.tree_leaves(example)) if leaf is None),
        )
