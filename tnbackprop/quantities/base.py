"""What a quantity is: a name, options, and a few lines of algebra that never see a layer type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

from ..algebra import Cotangents, Uses
from ..approximate import Factors
from ..diagram import Diagram


class Source(Enum):
    """What is propagated backwards."""

    GRADIENT = "gradient of the loss"
    ROOT = "columns of the root of the loss Hessian"
    SAMPLE = "sampled columns of that root"
    IDENTITY = "the elements of the model's output, one column for each"
    DIAGONAL = "the diagonal of the Hessian at every value, each from the next"
    ELEMENTWISE = "the same, from a loss whose outputs are taken not to mix"
    AVERAGE = "one matrix for the whole batch at every value"
    HESSIAN = "columns of that root, and of what else the Hessian has at every layer, with weights"


@dataclass(frozen=True)
class Propagation:
    """What a quantity needs at the output of every layer; `samples` columns where they are drawn."""

    source: Source = Source.GRADIENT
    samples: int = 0
    together: bool = False  # all columns at once, for a quantity that multiplies them with each other


class Scale(Enum):
    """Which multiples of the individual gradients ∇ℓ_n a quantity is made of; each docstring gives the formulas."""

    PAPER = "paper"
    UNSCALED = "unscaled"
    BACKPACK = "backpack"


@dataclass(frozen=True)
class Quantity(ABC):
    """Base class. A subclass is a frozen dataclass with a default `name`, its key in the result."""

    name: str

    @property
    def propagates(self) -> Propagation:
        """What is propagated: the gradient, unless a quantity says otherwise."""
        return Propagation()

    @abstractmethod
    def extract(self, J: Uses, g: Cotangents) -> Diagram | Factors:
        """The quantity of one parameter: `J.T @ g` has legs [n, *parameter]; every other leg comes from algebra."""
