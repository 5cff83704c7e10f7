"""A rule: one declared layer, as text. Rows of these live in `tnbackprop/rules/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import update_wrapper
from types import MappingProxyType
from typing import Any

from ..errors import RuleError

Constant = int | float


@dataclass(frozen=True)
class Root:
    """The square root of a loss's Hessian with respect to its input: Σ_v S_v S_vᵀ = H, all scale of the loss included.

    columns  how many columns S has for each position
    code     torch code for S, [columns, *input]; may use operands and saved names in braces
    mixes    the axes of the input that the Hessian mixes (the classes); positions along the others are separate
    elementwise  torch code for its diagonal, [*input], as it is where outputs are taken not to mix ("": the exact one)
    sample   torch code for one random column s with E[s sᵀ] = H; ``{noise}`` is uniform on (0, 1), shaped as the input
    by_position  ``{noise}`` is one number for each position: it has no axes of `mixes`

    In the rule of a loss that is not reduced, it is that of each of its elements by its own position. A loss that is
    linear in one with a root (weighted samples, a factor) has that root, times the roots of the slopes.
    In the rule of a function that losses are linear in (log_softmax), it is that of minus its Hessian, the same for all
    elements along `mixes`, times ``{curvature}``: minus the sum of the loss's slopes along them, [*positions].
    """

    columns: int
    code: str
    sample: str
    mixes: tuple[int, ...] = (1,)
    elementwise: str = ""
    by_position: bool = False


@dataclass(frozen=True)
class Rule:
    """What one call of a layer computes, as formulas.

    formula    one or more lines ``name[legs] = expression``; the last line defines ``output``.
               Empty when every Jacobian is declared in `jacobian`: the module or the primitive runs itself, then;
               or when only native VJPs are known: no second derivatives, no matrices go through it, then.
    jacobian   operand name -> expression in which the operand's own legs are those of `legs`:
               ``{"input": "output[n,c] * (delta[c,k] - output[n,k])"}`` (overrides the derived one).
    legs       declared legs, ``{"input": "n, k", "output": "n, c"}``; needed where no formula says them.
    constants  numbers that the formula names (eps, s0, …).
    saved      runtime tensors of the forward: ``{"mask[*s]": "torch code"}``. The torch code may use
               ``{input}`` and every other operand or earlier saved name, in braces. A key without legs is a value
               that only other code reads (a tuple of outputs); a key that is a line of the formula is where its
               value comes from (the statistics that a native forward gives anyway).
    forward    torch code for the output, where the call itself will not do (a saved mask, say).
    vjp        operand name -> torch code of a native VJP; may use ``{cotangent}``, ``{output}``, operands, saved.
               For one cotangent; several columns go by the formula. One that reads ``{cotangents}`` in place of
               ``{cotangent}`` takes them all, on an axis in front.
               One code for several operands, ``"query, key, value"``, gives a tuple of theirs.
               A lowering: checked against the formula, never the definition.
    backward   ``"input, weight, bias"`` -> torch code of one kernel that gives a tuple of the gradients by all of them:
               by the input for each sample, by parameters summed over the samples. It runs where that sum is all that
               is asked of a parameter. A lowering, like `vjp`; where there is no formula, that sum is all that a
               parameter has.
    root       for a loss: the square root of its Hessian; elementwise losses need none, it follows from the formula.
    draw       for an elementwise loss without a root: torch code for a draw of its residual in the model's own
               distribution, over its deviation (mean 0, variance 1); ``{noise}`` is uniform on (0, 1), shaped as the
               input. Empty: normal, as for a squared error.
    kinks      what the derivative is where it does not exist; shown by `explain`.
    divisor    of a loss: the saved tensor that it is divided by besides N, as a mean over the kept labels is.
    functions  Python functions that the torch code calls by name. They read torch alone, and their source goes with
               the program: a loop over positions, say.
    """

    formula: str = ""
    jacobian: Mapping[str, str] = field(default_factory=dict)
    legs: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    saved: Mapping[str, str] = field(default_factory=dict)
    forward: str = ""
    vjp: Mapping[str, str] = field(default_factory=dict)
    root: Root | None = None
    draw: str = ""
    kinks: str = ""
    functions: tuple[Callable[..., Any], ...] = ()
    divisor: str = ""
    backward: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("formula", "forward", "draw", "kinks", "divisor"):
            _check_kind(name, getattr(self, name), str, "text")
        _check_kind("root", self.root, Root | None, "a tn.Root")
        for name in ("jacobian", "legs", "constants", "saved", "vjp", "backward"):
            _check_kind(name, getattr(self, name), Mapping, "a dictionary")
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
            for key, value in getattr(self, name).items() if name != "constants" else ():
                _check_kind(f"{name}[{key!r}]", value, str, "text")

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as what it was made of: a module may carry its rule."""
        values = (getattr(self, f.name) for f in fields(self))
        return Rule, tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values)


def _check_kind(field: str, value: object, kind: Any, shown: str) -> None:
    if not isinstance(value, kind):
        raise RuleError(f"{field} of a tn.Rule is {type(value).__name__}, not {shown}")


class Primitive:
    """A function that a rule can describe: `primitive` makes it, and it is called like the function itself.

    A plain function leaves no trace in the graph of a model that calls it; while a model is captured, `stand_in` is
    what a call runs.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        update_wrapper(self, function)
        self.function = function
        self.stand_in: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.stand_in or self.function)(*args, **kwargs)

    def __repr__(self) -> str:
        return f"primitive {self.function.__name__}"
