"""The model's output as a propagation sees it, and what it asked for; what it says is checked here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy

from ...diagram.algebra import inline, tensor
from ...diagram.core import BATCH, COLUMN, Diagram, Leg, Map, N, Product, Tensor, argument
from ...diagram.jacobian import Jacobian
from ...errors import InputError, UnsupportedError
from ...notation.bind import BoundRule
from ...quantities import Output, Propagation, Residual, Sampler
from ..sweep.derived import Noise, column_leg
from ..sweep.roots import LossRoot, elementwise_root, labelled_root, loss_root, output_of, read_behind
from ..sweep.state import Sweep
from ..sweep.sweep import cotangent
from ..translate.foreign import foreign
from ..translate.graph import Call, Graph, Value
from .averaged import copied
from .residual import Weighted

Bound = tuple[tuple[Call, BoundRule], ...]
ONE = sympy.Integer(1)
FAIR = sympy.Rational(1, 2) - sympy.Rational(1, 2**25)
"""As many uniform numbers are below as above, and no float32 one is equal."""


@dataclass(frozen=True)
class Start:
    """What a propagation starts with.

    source    the columns that it asked for
    samples   how many of them are drawn; 0: they are exact
    diagram   what is made of them at the output; None: they go on as they are
    carried   how many columns that is; 0: a single cotangent, without a leg for them
    matrix    whether it is a matrix for the whole batch
    """

    output: str
    source: LossRoot | Weighted | None
    samples: int
    diagram: Diagram | None
    carried: int
    matrix: bool
    noises: tuple[Noise, ...]


class AtOutput(Output):
    """The output in one program; `number` is that of the sweep, `what` was asked for, for messages."""

    def __init__(self, graph: Graph, bound: Bound, gradient: Sweep, scale: sympy.Expr, what: str, number: int) -> None:
        self._graph, self._bound, self._gradient = graph, bound, gradient
        self._scale, self._what, self._number = scale, what, number
        self._output: Value = output_of(graph, what)
        self._legs = output_legs(bound, self._output.name)
        self.source: LossRoot | Weighted | None = None
        self.samples = 0
        self.noises: list[Noise] = []
        self.column = f"column:{self._number}"

    @property
    def legs(self) -> tuple[Leg, ...]:
        return self._legs

    @property
    def value(self) -> Diagram:
        return tensor(self._output.name, self._legs)

    @property
    def gradient(self) -> Diagram:
        self._check_loss()
        if not self._gradient.terms.get(self._output.name):
            return Diagram(self._legs, ())
        return cotangent(self._gradient, self._output.name, self._legs)

    def root(self) -> Diagram:
        return self._of_root(self._root())[0]

    def draws(self, samples: int, sampler: Sampler | None = None) -> Diagram:
        if type(samples) is not int or samples < 1:
            raise InputError(f"draws({samples!r}): draw at least one column per sample")
        if sampler is None:
            return self._of_root(self._root(), samples)[0]
        self._check_loss()
        return self._of_root(labelled_root(self._graph, self._scale, self._what, sampler), samples)[0]

    def hessian(self, mixed: bool = True) -> tuple[Diagram, Diagram]:
        found = self._root(signed=True)
        found = found if mixed else elementwise_root(found)
        if found.curvature is None or found.blocks:
            return self._of_root(found)
        return self._columns(Weighted(found.value, found.curvature.legs, found.curvature))

    def elements(self) -> Diagram:
        return self._columns(Weighted(self._output.name, self._legs, None))[0]

    def uniform(self, *legs: Leg, **sizes: int) -> Diagram:
        return tensor(*self._noise(legs, sizes))

    def signs(self, *legs: Leg, **sizes: int) -> Diagram:
        name, every = self._noise(legs, sizes)
        return Diagram(every, (Product(ONE, (Map(sympy.sign(argument(0) - FAIR), (Tensor(name, every),)),)),))

    def other(self, diagram: Diagram) -> Diagram:
        own = [leg for leg in diagram.legs if leg in self._legs and leg != BATCH]
        return diagram.rename(dict(zip(own, copied(tuple(own)), strict=True)))

    def _check_loss(self) -> None:
        if self._graph.loss is None:
            raise UnsupportedError(f"{self._what} need a loss, and this program has none: pass loss= to compile.")
        if behind := read_behind(self._graph):
            raise UnsupportedError(
                f"{self._what}: the loss itself reads {', '.join(map(repr, behind))}, and the curvature by the output "
                f"{self._output} alone is not theirs.\n  Let the model compute what they are for (logits). Jacobians, "
                "which are of the output, are for another program: without, curvature is taken past the parameters."
            )

    def _root(self, signed: bool = False) -> LossRoot:
        self._check_loss()
        return loss_root(self._graph, self._bound, self._scale, self._what, signed)

    def _of_root(self, root: LossRoot, samples: int = 0) -> tuple[Diagram, Diagram]:
        """The columns, and their weights."""
        self._take(root, samples)
        count = samples or root.columns
        return self._named(count, self._legs, self._weights(count, root.signed))

    def _columns(self, found: Weighted) -> tuple[Diagram, Diagram]:
        """One-hot columns, the same for every sample, and their weights."""
        self._take(found, 0)
        if [leg.size for leg in found.legs] != [leg.size for leg in self._legs]:  # the loss groups its axes otherwise
            self._legs = found.legs
        own = tuple(leg for leg in self._legs if leg.size != N)
        count = 1
        for leg in own:
            count *= int(leg.size)
        return self._named(count, own, self._weights(count, found.weight is not None))

    def _take(self, source: LossRoot | Weighted, samples: int) -> None:
        if self.source is not None and (self.source, self.samples) != (source, samples):
            raise InputError("a start asks for columns of one kind only, as root() or draws(4), and this one for two")
        self.source, self.samples = source, samples

    def _named(self, count: int, legs: tuple[Leg, ...], weights: Diagram) -> tuple[Diagram, Diagram]:
        lead = Leg(COLUMN, count)
        column = Tensor(self.column, (*column_leg(count), *legs))
        return Diagram((lead, *legs), (Product(ONE, (column,)),)), weights

    def _weights(self, count: int, weighted: bool) -> Diagram:
        legs = (*column_leg(count), BATCH)
        operands = (Tensor(f"weight:{self._number}", legs),) if weighted else ()
        return Diagram((Leg(COLUMN, count), BATCH), (Product(ONE, operands),))

    def _noise(self, legs: tuple[Leg, ...], sizes: dict[str, int]) -> tuple[str, tuple[Leg, ...]]:
        every = (*(Leg(name, size) for name, size in sizes.items()), *legs)
        name = f"noise:{self._number}:{len(self.noises)}"
        self.noises.append(Noise(name, every))
        return name, every


def output_legs(bound: Bound, name: str) -> tuple[Leg, ...]:
    """The legs of the value of a call."""
    return next((r.equations[-1].legs for c, r in bound if c.output.name == name), ())


def start_of(propagation: Propagation, at: AtOutput, output: str) -> Start:
    """What the propagation starts with. Raises `InputError` for what nothing can be propagated with."""
    where = f"propagation {type(propagation).__name__}"
    with foreign(f"{where}: start", InputError):
        found: object = propagation.start(at)
    if not isinstance(found, Diagram):
        raise InputError(
            f"{where}: start returns {type(found).__name__}: return a tn.Diagram, as output.root() or output.gradient"
        )
    lead = [leg for leg in found.legs if leg.name == COLUMN]
    rest = [leg for leg in found.legs if leg.name != COLUMN]
    own = tuple(leg for leg in at.legs if leg != BATCH)
    matrix = not lead and set(rest) == {*own, *copied(own)}
    plain = _is_column(found, at.column) and set(rest) <= set(at.legs)
    if not plain and not matrix and set(rest) != set(at.legs):
        raise InputError(
            f"{where}: start returns a diagram with legs {_shown(found.legs)}, and this output has {_shown(at.legs)}\n"
            f"  Return legs {_shown(at.legs)}, with a leg ν for several columns, or {_shown((*own, *copied(own)))} for "
            "a matrix of the whole batch; .sum(leg) the others, .relabel(old=new) those of another name."
        )
    _check_together(propagation, where, plain, bool(lead), matrix)
    noises = tuple(at.noises)
    if plain:
        return Start(output, at.source, at.samples, None, 0, False, noises)
    count = int(lead[0].size) if lead else 0
    order = (*own, *copied(own)) if matrix else (*column_leg(count or 1), *at.legs)
    return Start(output, at.source, at.samples, inline(Diagram(order, found.products)), count, matrix, noises)


def _is_column(diagram: Diagram, column: str) -> bool:
    """Whether it is what was asked for, the tensor of that name, and nothing else."""
    products = diagram.products
    operands = products[0].operands if len(products) == 1 and products[0].scale == 1 else ()
    only = operands[0] if len(operands) == 1 else None
    if not isinstance(only, Tensor) or only.name != column:
        return False
    return {leg for leg in diagram.legs if leg.size != 1} == {leg for leg in only.legs if leg.size != 1}


def _check_together(propagation: Propagation, where: str, plain: bool, several: bool, matrix: bool) -> None:
    """Residuals and `through` must mean something for what is propagated."""
    residual = propagation.residual
    if residual is Residual.COLUMNS and not plain:
        raise InputError(
            f"{where}: residual is COLUMNS, and start makes something else of the columns that it asks for\n"
            "  Return them as they are, output.hessian()[0], or leave residual out."
        )
    if residual is Residual.DIAGONAL and (several or matrix):
        raise InputError(
            f"{where}: residual is DIAGONAL, and start returns {'columns' if several else 'a matrix'}\n"
            "  Return a diagonal, with legs [n, *output], as (S * S * w).sum('ν') is, or leave residual out."
        )
    if matrix and not propagation.by_vjp:
        raise InputError(
            f"{where}: a matrix for the whole batch goes through a layer as (1/N) Σ_n J_nᵀ M J_n, and nothing takes "
            "the place of J\n  Leave `through` out."
        )


def along(propagation: Propagation) -> Callable[[Jacobian], Jacobian] | None:
    """What takes the place of a Jacobian; None: itself. Raises `InputError` for other legs."""
    if propagation.by_vjp:
        return None
    where = f"propagation {type(propagation).__name__}: through"

    def changed(jacobian: Jacobian) -> Jacobian:
        with foreign(where, InputError):
            found: object = propagation.through(jacobian)
        if not isinstance(found, Jacobian):
            raise InputError(f"{where} returns {type(found).__name__}: return a Jacobian, as squared(J) is")
        if (found.out, found.into, set(found.diagram.legs)) != (
            jacobian.out, jacobian.into, {*jacobian.out, *jacobian.into}
        ):  # fmt: skip
            raise InputError(
                f"{where} returns a Jacobian with legs {_shown(found.diagram.legs)} of one with "
                f"{_shown((*jacobian.out, *jacobian.into))}\n  It must have the same legs, out and into."
            )
        return found

    return changed


def _shown(legs: Sequence[Leg]) -> str:
    return f"[{', '.join(leg.name for leg in legs)}]"
