"""What is propagated: where a sweep starts, with what it goes back through a layer, and what a layer adds to it.

A propagation is a description in the language of diagrams, of which the compiler makes a sweep. One from outside is a
class as those here are (`examples/add_a_propagation.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

from ..diagram.algebra import squared
from ..diagram.core import BATCH, COLUMN, Diagram, Leg, Size, V
from ..diagram.jacobian import Jacobian
from ..errors import InputError

Sampler = Callable[[Any, Any], Any]
"""(output, uniform numbers in (0, 1) as large as y) -> y, drawn from the model's own distribution: torch code."""


class Residual(Enum):
    """What the second derivatives of a layer, R = Σ_z g_z ∂²z/∂u² with the gradient g, add to what is propagated."""

    NONE = "nothing: what is propagated stands for a Gauss-Newton matrix"
    DIAGONAL = "the diagonal of R, to what is propagated to u"
    COLUMNS = "columns that start at u, with weights: Σ_v w_v s_v s_vᵀ = R"


class Output(ABC):
    """The model's output f, as a propagation sees it. All that it gives are diagrams; legs of one name are one leg.

    A program may be for any batch, so the values of these diagrams are not known yet.
    """

    @property
    @abstractmethod
    def legs(self) -> tuple[Leg, ...]:
        """Of the output: the batch `n` and the elements of a sample."""

    @property
    @abstractmethod
    def value(self) -> Diagram:
        """f, legs [n, *output]."""

    @property
    @abstractmethod
    def gradient(self) -> Diagram:
        """∂L/∂f, legs [n, *output]."""

    @abstractmethod
    def root(self) -> Diagram:
        """All columns S of the root of the loss Hessian, S Sᵀ = ∂²L/∂f²: legs [ν, n, *output]."""

    @abstractmethod
    def draws(self, samples: int, sampler: Sampler | None = None) -> Diagram:
        """`samples` columns as the loss draws them, E[Σ_v s_v s_vᵀ] = ∂²L/∂f²: legs [ν, n, *output].

        With a sampler, gradients of the labels that it draws: E[Σ_v s_v s_vᵀ] is the Fisher information of f.
        """

    @abstractmethod
    def hessian(self, mixed: bool = True) -> tuple[Diagram, Diagram]:
        """S and weights w of any sign, Σ_v w_v S_v S_vᵀ = ∂²L/∂f²: legs [ν, (n,) *output] and [ν, n].

        mixed  whether outputs mix; without, the elements of a softmax are taken to stand for themselves
        """

    @abstractmethod
    def elements(self) -> Diagram:
        """One column for each element of a sample's output, which is 1 there and else 0: legs [ν, *output]."""

    @abstractmethod
    def uniform(self, *legs: Leg, **sizes: int) -> Diagram:
        """Random numbers in [0, 1), new ones for every call of the program: legs [*sizes, *legs]."""

    @abstractmethod
    def signs(self, *legs: Leg, **sizes: int) -> Diagram:
        """Random signs, 1 or -1, new ones for every call of the program: legs [*sizes, *legs]."""

    @abstractmethod
    def other(self, diagram: Diagram) -> Diagram:
        """The same with the output's legs, but for n, called as those of the other side of a matrix."""


@dataclass(frozen=True)
class Handed:
    """What a layer on its own is handed in at its output in place of a start, for files that `tn.generate` writes.

    name     of the argument
    about    what the file says of it, after its shape
    columns  whether it is any number V of columns
    matrix   whether it is one matrix for the whole batch
    weights  the name of a weight of each column for each sample; "" for none
    told     what the file says of those
    pulled   the function that gives it at the inputs; "" for none
    what     it gives, as a text that the input's name follows
    """

    name: str
    about: str = ""
    columns: bool = False
    matrix: bool = False
    weights: str = ""
    told: str = ""
    pulled: str = ""
    what: str = ""

    @property
    def value(self) -> str:
        """The value that diagrams read. No part of a layer has a colon in its name."""
        return f"{self.name}:"

    @property
    def values(self) -> tuple[str, ...]:
        """It, and the weights of its columns."""
        return (self.value, f"{self.weights}:") if self.weights else (self.value,)

    @property
    def count(self) -> Size:
        """How many columns it is."""
        return V if self.columns else 1

    def shape(self, value: tuple[Size, ...]) -> tuple[Size, ...]:
        """At a value [N, ...]."""
        return value[1:] * 2 if self.matrix else (*((V,) if self.columns else ()), *value)


@dataclass(frozen=True)
class Propagation(ABC):
    """Base class. A subclass is a frozen dataclass; what is equal is propagated once, for all quantities that ask.

    together  all columns are there at once, for a quantity that multiplies them with each other
    """

    together: bool = field(default=False, kw_only=True)

    needs_loss: ClassVar[bool] = True
    residual: ClassVar[Residual] = Residual.NONE
    handed: ClassVar[Handed | None] = None  # None: it starts at a layer's output as at a model's
    letter: ClassVar[str] = "s"  # names of its values in the source begin so

    @abstractmethod
    def start(self, output: Output) -> Diagram:
        """What is propagated at the model's output.

        With legs [n, *output] it is a cotangent, or a diagonal; with a leg `ν` more, several of them. With those of
        both sides of a matrix and no n, [*output, *output~], it is a matrix for the whole batch, and goes through a
        layer as (1/N) Σ_n J_nᵀ M J_n. Columns that are given back as they are go in as many rounds as is best, with
        their weights where they have some; everything else is computed at the output.
        """

    def through(self, J: Jacobian) -> Jacobian:
        """What takes the place of the Jacobian, in every layer and in `extract`."""
        return J

    @property
    def alone(self) -> Propagation:
        """What is propagated in a layer on its own, whose columns somebody else has made."""
        return self

    @property
    def single(self) -> bool:
        """Whether it is one column: kernels that take no more of them may then stand for several operators."""
        return False

    @property
    def by_vjp(self) -> bool:
        """Whether it goes back as a gradient does."""
        return type(self).through is Propagation.through


def check_propagation(found: object, owner: str) -> None:
    """A frozen instance that can be compared. Raises `InputError`."""
    if isinstance(found, type) and issubclass(found, Propagation):
        raise InputError(f"{owner}: propagates is the class {found.__name__}: give an instance, {found.__name__}()")
    if not isinstance(found, Propagation):
        raise InputError(f"{owner}: propagates is {found!r}, not a tn.Propagation: return tn.Exact(), tn.Draws(4), …")
    name = type(found).__name__
    unknown = vars(found).keys() - {each.name for each in fields(found)}
    if unknown:
        raise InputError(
            f"{owner}: {name} has {', '.join(sorted(unknown))}, which no field declares, so that two of them could be "
            f"taken for one\n  Write @dataclass(frozen=True) above class {name}, and a line {min(unknown)}: type in it."
        )
    try:
        hash(found)
    except TypeError as error:
        raise InputError(f"{owner}: {name} cannot be told apart: {error}\n  Give it a tuple for a list.") from error


@dataclass(frozen=True)
class Gradient(Propagation):
    """The gradient of the loss."""

    handed: ClassVar[Handed | None] = Handed(
        "cotangent", pulled="vjp", what="Vector-Jacobian product: the cotangent pulled back to"
    )
    letter: ClassVar[str] = "g"

    def start(self, output: Output) -> Diagram:
        return output.gradient

    @property
    def single(self) -> bool:
        return True


@dataclass(frozen=True)
class Labels(Gradient):
    """The gradients of the labels as columns of the empirical Fisher, ∇ℓ_n / √N for a loss that averages.

    It is the gradient's own sweep: what is made of it divides by `g.scale`.
    """


@dataclass(frozen=True)
class Exact(Propagation):
    """All columns of the root of the loss Hessian."""

    handed: ClassVar[Handed | None] = Handed(
        "columns",
        ", for any V, are those of a root of the loss's Hessian by the output (or of the GGN's part of it), "
        "Σ_v S_v S_vᵀ, exact or drawn.",
        columns=True,
        pulled="vjp_columns",
        what="Vector-Jacobian products: the columns pulled back to",
    )

    def start(self, output: Output) -> Diagram:
        return output.root()

    @property
    def alone(self) -> Propagation:
        return Exact()


@dataclass(frozen=True)
class Draws(Propagation):
    """`samples` columns of that root, drawn as the loss does: labels of the model's own, or normal numbers.

    sampler  ``(output, uniform) -> y``: torch code that draws labels from the likelihood p(y|f) that the loss is the
             negative logarithm of, of uniform numbers in (0, 1) of y's shape. Columns are then √c ∂ℓ_n(f_n, ŷ_n)/∂f_n
             with the factor c that the loss puts on ℓ_n, and E[Σ_v s_v s_vᵀ] = c E[∇ℓ ∇ℓᵀ] is the Fisher information
             of f for any loss, be its Hessian indefinite. None: what the loss's own rule says
    """

    samples: int = 1
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        if type(self.samples) is not int or self.samples < 1:
            raise InputError(f"samples={self.samples!r}: draw at least one column per sample")
        if self.sampler is not None and not callable(self.sampler):
            raise InputError(f"sampler={self.sampler!r}: give a function (output, uniform) -> y, or None")

    def start(self, output: Output) -> Diagram:
        return output.draws(self.samples) if self.sampler is None else output.draws(self.samples, self.sampler)

    @property
    def single(self) -> bool:
        return self.samples == 1

    @property
    def alone(self) -> Propagation:
        """Columns that are handed in are drawn already, and there is one set of them."""
        return Exact()


@dataclass(frozen=True)
class Identity(Propagation):
    """The elements of the model's output, one column for each: no loss."""

    needs_loss: ClassVar[bool] = False

    def start(self, output: Output) -> Diagram:
        return output.elements()


@dataclass(frozen=True)
class Hessian(Propagation):
    """Columns of the loss Hessian, and of what else the Hessian has at every layer, with weights."""

    residual: ClassVar[Residual] = Residual.COLUMNS
    handed: ClassVar[Handed | None] = Handed(
        "hessian_columns",
        ", for the same V, with their weights give the whole Hessian of the loss by the output, Σ_v w_v S_v S_vᵀ.",
        columns=True,
        weights="hessian_weights",
        told=" may be negative, and are all 1 for a convex loss on this output.",
    )

    def start(self, output: Output) -> Diagram:
        return output.hessian()[0]


@dataclass(frozen=True)
class Diagonal(Propagation):
    """The diagonal of the Hessian at every value, each from the next: h_u = (J∘J)ᵀ h_z + diag R."""

    residual: ClassVar[Residual] = Residual.DIAGONAL
    handed: ClassVar[Handed | None] = Handed(
        "diagonal",
        " is that of the loss's Hessian by the output, or what the next layer has pulled back to its input.",
        pulled="pulled_diagonal",
        what="The diagonal, pulled back with the squared Jacobian to",
    )
    letter: ClassVar[str] = "h"
    mixed: ClassVar[bool] = True

    def start(self, output: Output) -> Diagram:
        S, w = output.hessian(self.mixed)
        return (S * S * w).sum(COLUMN)

    def through(self, J: Jacobian) -> Jacobian:
        return squared(J)

    @property
    def alone(self) -> Propagation:
        return Diagonal()


@dataclass(frozen=True)
class Elementwise(Diagonal):
    """The same, from a loss whose outputs are taken not to mix."""

    mixed: ClassVar[bool] = False


@dataclass(frozen=True)
class Average(Propagation):
    """One matrix for the whole batch at every value: Ḡ_u = (1/N) Σ_n J_nᵀ Ḡ_z J_n."""

    handed: ClassVar[Handed | None] = Handed(
        "average",
        " is one matrix for the whole batch: the sum of the loss's Hessians by the output over the samples, or what "
        "the next layer has pulled back to its input.",
        matrix=True,
        pulled="pulled_average",
        what="The mean of J_nᵀ average J_n, with the Jacobian J_n by",
    )
    letter: ClassVar[str] = "k"

    def start(self, output: Output) -> Diagram:
        S = output.root()
        return (S * output.other(S)).sum(COLUMN, BATCH.name)


HANDED = tuple(each.handed for each in (Gradient, Exact, Hessian, Diagonal, Average) if each.handed is not None)
"""What is handed in for the propagations that are built in."""
COTANGENT = HANDED[0].value
