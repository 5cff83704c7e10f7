"""What to write for a text that is no formula: the notations that people bring along, said in ours."""

from __future__ import annotations

import ast
import keyword
import re
import string

LOOKALIKES = dict(zip("−–·×⋅∗÷²", ("-", "-", "*", "*", "*", "*", "/", "**2"), strict=True))
"""What is meant by characters that papers use."""
FUNCTION_HINTS = {
    "sum": "a leg that is not on the left is summed",
    "einsum": "write the product: a leg that is not on the left is summed",
    "matmul": "write the product: a leg that is not on the left is summed",
    "dot": "write the product: a leg that is not on the left is summed",
    "mean": "a leg that is not on the left is summed: divide by its size, a capital letter",
    "norm": "write the sum of the squares as a line of its own, and its sqrt",
    "var": "write the mean, the centred values and the mean of their squares, each as a line of its own",
    "std": "write the mean, the centred values and the mean of their squares, each as a line of its own",
    "where": "write a if condition else b",
    "max": "write maximum(x, y), of two values",
    "min": "write minimum(x, y), of two values",
    "clamp": "write minimum(maximum({a}, low), high)",
    "relu": "write maximum({a}, 0)",
    "relu6": "write minimum(maximum({a}, 0), 6)",
    "leaky_relu": "write {x} if {x} > 0 else slope * {x}",
    "gelu": "write {x} * erfc(-{x} / sqrt(2)) / 2",
    "silu": "write {x} * sigmoid({a})",
    "swish": "write {x} * sigmoid({a})",
    "pow": "write {x}**2",
    "square": "write {x}**2",
    "rsqrt": "write {x}**(-1/2)",
}
"""For functions that one would expect; {a} is the first argument, {x} the same as a factor."""
_OF_A_LEG = {"softmax": "{e} / {s}", "log_softmax": "{x} - log({s})", "logsumexp": "log({s})"}
"""Functions of all values along a leg: what stands in their place after the lines of `_along_a_leg`."""


def function_hint(call: ast.Call, left: ast.expr | None) -> str:
    """What to write for a function that formulas do not have; "" where it is not known.

    left   what the line defines, None: it is an expression
    """
    name = ast.unparse(call.func).rpartition(".")[2]
    if name in _OF_A_LEG and call.args and isinstance(left, ast.Subscript):
        return _along_a_leg(_OF_A_LEG[name], left, call.args[0])
    a = ast.unparse(call.args[0]) if call.args else "x"
    plain = not call.args or isinstance(call.args[0], ast.Subscript | ast.Call | ast.Name | ast.Constant)
    return FUNCTION_HINTS.get(name, "").format(a=a, x=a if plain else f"({a})")


def _along_a_leg(result: str, left: ast.Subscript, argument: ast.expr) -> str:
    """The lines of a softmax along the last leg, or along those that are not on the left."""
    kept = [ast.unparse(item) for item in _items(left)]
    reads = [node for node in ast.walk(argument) if isinstance(node, ast.Subscript)]
    own = dict.fromkeys(ast.unparse(item) for read in reads for item in _items(read))
    legs, x, lines = [leg for leg in kept if leg in own], ast.unparse(argument), []
    gone = [leg for leg in own if leg not in kept]
    every, rest = ", ".join(legs), ", ".join(legs[:-1])
    if result == _OF_A_LEG["logsumexp"]:
        every, rest = ", ".join([*legs, *gone]), every
    elif gone:
        lines, x = [f"h[{every}] = {x}"], f"h[{every}]"
    lines += [f"e[{every}] = exp({x})", f"s[{rest}] = e[{every}]"]
    plain = x if lines[0].startswith("h[") or isinstance(argument, ast.Subscript) else f"({x})"
    last = result.format(x=plain, e=f"e[{every}]", s=f"s[{rest}]")
    shown = "\n".join(f"  {line}" for line in lines)
    return f"write it in lines, and here {last}:\n{shown}\nor put torch.nn's module behind: it is safe for large values"


def _items(node: ast.Subscript) -> list[ast.expr]:
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def slice_hint(part: ast.Slice, line: str) -> str:
    """The index that a slice is, on a leg with a name."""
    leg = next(letter for letter in "ijkl" + string.ascii_lowercase if not re.search(rf"\b{letter}\b", line))
    try:
        start, stop, step = (
            default if node is None else int(ast.literal_eval(node))
            for node, default in ((part.lower, 0), (part.upper, -1), (part.step, 1))
        )
    except (ValueError, TypeError):
        return f"a part of an axis is an index: write {leg} + 2, or 3*{leg} + 2"
    size = str(len(range(start, stop, step))) if 0 <= start < stop and step > 0 else "…"
    index = f"{'' if step == 1 else f'{step}*'}{leg} {'-' if start < 0 else '+'} {abs(start)}"
    give = f"leg {leg} of {size} elements, by another tensor or by the constant {leg.upper()}={size}"
    return f"a part of an axis is an index: write {index} for {ast.unparse(part)}, with a {give}"


def line_hint(line: str, column: int) -> str:
    """For a line that Python does not read: words of Python, round brackets, and equations of einsum."""
    word = re.match(r"\w*", line[column:])
    if word is not None and keyword.iskeyword(word[0]):
        return f"'{word[0]}' is a word of Python: choose another name"
    if "->" in line:
        return _of_einsum(*line.replace('"', "").replace("'", "").split("->", 1))
    return "legs stand in square brackets: name[leg, leg]" if re.match(r"\w+\(.*\) *=", line) else ""


def _of_einsum(left: str, right: str) -> str:
    """The formula for "oi,ni->no", "n i, o i -> n o" or "w[o, i], x[n, i] -> y[n, o]"."""
    if "[" in left:
        return f"write {right.strip()} = {re.sub(r'] *,', '] *', left.strip())}"
    output, *terms = (_legs(term) for term in (right, *left.split(",")))
    batch = "n" if any("n" in term for term in terms) else output[0] if output else "n"
    names = ["input" if batch in term else "weight" for term in terms]
    counted = [f"{name}{names[:k].count(name) + 1}" if name in names[:k] else name for k, name in enumerate(names)]
    reads = [f"{name}[{', '.join(term)}]" for name, term in zip(counted, terms, strict=True)]
    return f"a formula names its tensors: write output[{', '.join(output)}] = {' * '.join(reads)}"


def _legs(term: str) -> list[str]:
    """One letter each, or words with spaces between them."""
    words = re.findall(r"\.\.\.|\w+" if " " in term.strip() else r"\.\.\.|\w", term)
    return ["*s" if word == "..." else word.lower() for word in words]
