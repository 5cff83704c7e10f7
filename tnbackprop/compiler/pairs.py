"""Two tensors into one, and one into less: mm, bmm, mul, sum, and elementwise maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import sympy

from ..diagram import Leg, Size, argument, ordered_union
from .arrange import Groups, arranged, copies, copy_seconds, copy_work, matrix, matrix_seconds, merged, placed, sizes_of
from .by_rows import by_rows, shifted, shifted_by_rows
from .cost import Kernel, Work, size_at
from .printing import torch_code
from .store import Ref, Store

Legs = tuple[Leg, ...]
Into = tuple[tuple[str, str], ...]
"""Values that a step may be written over, with the code that does it (see `Step.into`)."""
NOWHERE: Into = ()


def sum_legs(store: Store, ref: Ref, gone: Legs) -> Ref:
    """Σ over legs of one value."""
    if not gone:
        return ref
    kept = tuple(leg for leg in ref.stored if leg not in gone)
    code, dims = _with_dims(store, ref, gone)
    work = Work(flops=((1, ref.stored),), moved=((1, ref.stored),), fresh=((1, kept),))
    name = store.add(f"{code}.sum({dims})", sizes_of(kept), Kernel.REDUCE, work, own=True)
    return Ref(name, kept, tuple(leg for leg in ref.order if leg not in gone))


def sum_of_squares(store: Store, ref: Ref, gone: Legs) -> Ref:
    """Σ x² over legs of one value: a norm where they are innermost, else row by row, or a square and a sum."""
    kept = tuple(leg for leg in ref.stored if leg not in gone)
    code, dims = _with_dims(store, ref, gone)
    innermost = ref.stored[len(ref.stored) - len(gone) :] == tuple(leg for leg in ref.stored if leg in gone)
    solid = store.resolve(ref.name) not in store.strided
    into = NOWHERE
    if innermost and solid:
        whole = dims if "," in dims else (dims.strip("()") or "None")
        code = f"torch.linalg.vector_norm({code}, dim={whole}).square()"
        work = Work(flops=((2, ref.stored),), moved=((1, ref.stored),), fresh=((1, kept),))
    else:
        work = Work(flops=((2, ref.stored),), moved=((3, ref.stored),), fresh=((1, ref.stored),))
        if dims == "0" and (found := _squares_by_rows(store, ref, gone, kept, code, work)):
            return found.reordered(tuple(leg for leg in ref.order if leg not in gone))
        into = ((store.resolve(ref.name), f"{code}.square_().sum({dims})"),)
        code = f"{code}.square().sum({dims})"
    name = store.add(code, sizes_of(kept), Kernel.REDUCE, work, own=True, into=into)
    return Ref(name, kept, tuple(leg for leg in ref.order if leg not in gone))


def _squares_by_rows(store: Store, ref: Ref, gone: Legs, kept: Legs, code: str, whole: Work) -> Ref | None:
    """Σ x² over the first axis of `code`, if that is faster row by row; what is added to all rows, row by row, too."""
    parts = shifted(store, ref, kept)
    if parts is not None:
        codes = _with_dims(store, parts[0], gone)[0], parts[1]
        return shifted_by_rows(store, whole, codes, ref.stored, kept)
    return by_rows(store, whole, (code, code), (ref.stored,), kept)


def _seconds(store: Store, kernel: Kernel, work: Work) -> float:
    return store.rates.seconds(kernel, work, store.batch, store.itemsize)


def _with_dims(store: Store, ref: Ref, gone: Legs) -> tuple[str, str]:
    """Code for the value with runs of legs merged, and the axes that are summed."""
    groups: list[Legs] = []
    for leg in ref.stored:
        if leg.size != 1 and groups and leg in gone and groups[-1][-1] in gone:
            groups[-1] = (*groups[-1], leg)
        else:
            groups.append((leg,))
    if copies(store, Ref(ref.name, ref.stored, ref.stored), tuple(groups)):
        groups = [(leg,) for leg in ref.stored]
    dims = [str(k) for k, group in enumerate(groups) if group[0] in gone]
    shown = dims[0] if len(dims) == 1 else f"({', '.join(dims)})"
    code = arranged(store, Ref(ref.name, ref.stored, ref.stored), tuple(groups))
    return code, "" if len(dims) == len(groups) == 1 else shown


def elementwise(store: Store, expr: sympy.Expr, args: tuple[Ref, ...]) -> Ref:
    """A map applied to values that broadcast by leg."""
    legs = ordered_union(*(ref.stored for ref in sorted(args, key=lambda r: -len(r.stored))))
    groups: Groups = tuple((leg,) for leg in legs)
    codes = {}
    for k, ref in enumerate(args):
        own = groups if set(ref.stored) == set(legs) else tuple((leg,) if leg in ref.stored else () for leg in legs)
        codes[argument(k)] = arranged(store, ref, own)
    work = Work(flops=((4, legs),), moved=((1 + len(args), legs),), fresh=((1, legs),))
    code, into = torch_code(expr, codes), NOWHERE
    if expr == argument(0) ** 2:
        code, into = _square(store, args[0], codes[argument(0)])
    name = store.add(code, sizes_of(legs), Kernel.ELEMENTWISE, work, own=code not in codes.values(), into=into)
    return Ref(name, legs, legs)


def _square(store: Store, ref: Ref, code: str) -> tuple[str, Into]:
    """Code for the square of a value that `code` reads, and how it is written over the value."""
    return f"{code}.square()", ((store.resolve(ref.name), f"{code}.square_()"),)


def contract_pair(store: Store, a: Ref, b: Ref, output: Legs, ordered: bool) -> Ref:
    """Σ a·b over the legs that are not in `output`."""
    private = tuple(leg for leg in a.order if leg not in b.order and leg not in output)
    a = sum_legs(store, a, private)
    b = sum_legs(store, b, tuple(leg for leg in b.order if leg not in a.order and leg not in output))
    summed = tuple(leg for leg in a.stored if leg in b.order and leg not in output)
    if not summed:
        return _multiplied(store, a, b, output if ordered else None)
    ways = [partial(_summed, a=a, b=b, summed=summed, output=output, ordered=ordered)]
    if (known := _known_product(store, a, b)) is not None:
        ways.append(partial(sum_legs, ref=known, gone=summed))
    return store.cheapest(ways) if len(ways) > 1 else ways[0](store)


def _summed(store: Store, a: Ref, b: Ref, summed: Legs, output: Legs, ordered: bool) -> Ref:
    """Σ a·b over legs that both have."""
    left = tuple(leg for leg in a.stored if leg not in b.order)
    right = tuple(leg for leg in b.stored if leg not in a.order)
    if not left and not right:
        return _dotted(store, a, b, summed)
    return _matmul(store, a, b, output, ordered)


def _multiplied(store: Store, a: Ref, b: Ref, wanted: Legs | None) -> Ref:
    """Elementwise product with broadcasting."""
    a, b, legs, codes = _factors(store, a, b, wanted)
    work = Work(flops=((1, legs),), moved=((1, legs), (1, a.stored), (1, b.stored)), fresh=((1, legs),))
    into = written_over(store, (a, b), codes, legs, "mul_")
    code = " * ".join(codes)
    if codes[0] == codes[1] and a.stored == legs:
        code, into = _square(store, a, codes[0])
    name = store.add(code, sizes_of(legs), Kernel.ELEMENTWISE, work, own=True, into=into)
    return Ref(name, legs, legs)


def _factors(store: Store, a: Ref, b: Ref, wanted: Legs | None) -> tuple[Ref, Ref, Legs, list[str]]:
    """The larger factor, the smaller one, the legs of their product, and code for each that broadcasts to them."""
    if len(b.stored) > len(a.stored):
        a, b = b, a
    legs = wanted or ordered_union(a.stored, b.stored)
    return a, b, legs, [arranged(store, r, tuple((leg,) if leg in r.stored else () for leg in legs)) for r in (a, b)]


def _known_product(store: Store, a: Ref, b: Ref) -> Ref | None:
    """The elementwise product, where it has been computed for something else."""
    a, b, legs, codes = _factors(store, a, b, None)
    name = store.by_code.get(" * ".join(codes))
    return Ref(name, legs, legs) if name is not None else None


def _dotted(store: Store, a: Ref, b: Ref, summed: Legs) -> Ref:
    """Both operands have the same legs and some are summed: multiply and sum."""
    kept = tuple(leg for leg in a.stored if leg not in summed)
    order = (*kept, *summed)
    groups: Groups = (*((leg,) for leg in kept), summed)
    if a.stored == b.stored == (*summed, *kept):
        order, groups = a.stored, (summed, *((leg,) for leg in kept))
    elif copies(store, a, groups) or copies(store, b, groups) or (store.alone and a.stored != order):  # as in memory
        order = a.stored
        groups = tuple((leg,) for leg in a.stored)
    dims = ", ".join(str(k) for k, group in enumerate(groups) if group[0] in summed)
    dims = dims if "," not in dims else f"({dims})"
    codes = [arranged(store, a, groups), arranged(store, b, groups)]
    work = Work(flops=((2, order),), moved=((4, order),), fresh=((1, order),))
    if dims == "0" and (found := by_rows(store, work, (codes[0], codes[1]), (order, order), kept)):
        return found
    into = written_over(store, (a, b), codes, order, "mul_", f".sum({dims})")
    code = f"({' * '.join(codes)}).sum({dims})"
    name = store.add(code, sizes_of(kept), Kernel.REDUCE, work, own=True, into=into)
    return Ref(name, kept, kept)


def _weighed(store: Store, large: Ref, small: Ref, summed: Legs) -> Ref:
    """Σ large·small over all legs of the small one, in the memory order of the large one: no copy of it."""
    kept = tuple(leg for leg in large.stored if leg not in summed)
    weights = arranged(store, small, tuple((leg,) if leg in small.stored else () for leg in large.stored))
    dims = ", ".join(str(k) for k, leg in enumerate(large.stored) if leg in summed)
    total = f".sum({dims if ',' not in dims else f'({dims})'})"
    code = arranged(store, Ref(large.name, large.stored, large.stored), tuple((leg,) for leg in large.stored))
    into = written_over(store, (large, small), (code, weights), large.stored, "mul_", total)
    code, work = f"({code} * {weights}){total}", _weighing(large)
    name = store.add(code, sizes_of(kept), Kernel.REDUCE, work, own=True, into=into)
    return Ref(name, kept, kept)


def _weighing(large: Ref) -> Work:
    return Work(flops=((2, large.stored),), moved=((4, large.stored),), fresh=((1, large.stored),))


def _weighing_seconds(store: Store, large: Ref, small: Ref) -> float:
    order = tuple((leg,) if leg in small.stored else () for leg in large.stored)
    copies_small = copy_seconds(store, small, tuple(group for group in order if group))
    return copies_small + _seconds(store, Kernel.REDUCE, _weighing(large))


def written_over(
    store: Store, refs: Sequence[Ref | None], codes: Sequence[str], order: Legs, method: str, then: str = ""
) -> Into:
    """The codes' sum or product written over each of them that is in memory in the result's order (see `Step.into`)."""
    found = []
    for k, ref in enumerate(refs):
        others = [*codes[:k], *codes[k + 1 :]]
        if ref is not None and ref.stored == order:
            name = store.resolve(ref.name)
            if all(name not in store.names_in(other) for other in others):
                found.append((name, codes[k] + "".join(f".{method}({other})" for other in others) + then))
    return tuple(found)


@dataclass(frozen=True)
class Product2:
    """One way to write Σ first·second as mm or bmm: legs of the result are head + left + right."""

    first: Ref
    second: Ref
    head: Legs
    left: Legs
    summed: Legs
    right: Legs

    @property
    def legs(self) -> Legs:
        return (*self.head, *self.left, *self.right)

    @property
    def kernel(self) -> Kernel:
        return Kernel.BMM if self.head else Kernel.MM

    @property
    def work(self) -> Work:
        moved = ((1, self.first.stored), (1, self.second.stored), (1, self.legs))
        return Work(flops=((2, (*self.legs, *self.summed)),), moved=moved, fresh=((1, self.legs),))

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(merged(group) for group in (self.head, self.left, self.right) if group)

    @property
    def leading(self) -> Groups:
        return (self.head,) if self.head else ()

    def seconds(self, store: Store, output: Legs | None) -> float:
        """The kernel, the copies that its operands need, and the copy that a wrong order of the result costs."""
        total = matrix_seconds(store, self.first, self.leading, self.left, self.summed)
        total += matrix_seconds(store, self.second, self.leading, self.summed, self.right)
        if output is not None and store.real(self.legs) != store.real(output):
            total += _seconds(store, Kernel.COPY, copy_work(self.legs))
        if store.alone and self.filled(store):  # for every sample; before a loop it is nothing
            total += _seconds(store, Kernel.COPY, copy_work(self.second.stored))
        return total + _seconds(store, self.kernel, self.work) * self._slower(store)

    def _slower(self, store: Store) -> float:
        """Matmul kernels are made for many columns: few of them had better be rows."""
        matrices = self.head or (self.left and self.right)
        narrow = matrices and size_at(merged(self.right), store.batch) < store.rates.narrow
        return store.rates.narrow_factor if narrow else 1.0

    def code(self, store: Store) -> str:
        """mv, mm, or bmm with the missing axis put in and taken out again."""
        if not self.head and not self.left:
            vector = placed(store, self.first, (self.summed,))
            return f"torch.mv({matrix(store, self.second, (), self.right, self.summed)}, {vector})"
        one = matrix(store, self.first, self.leading, self.left, self.summed)
        if not self.head and not self.right:
            return f"torch.mv({one}, {placed(store, self.second, (self.summed,))})"
        two = matrix(store, self.second, self.leading, self.summed, self.right)
        if not self.head:
            return f"torch.mm({one}, {two})"
        missing = (".squeeze(1)" if not self.left else "") + (".squeeze(-1)" if not self.right else "")
        if extra := self.filled(store):
            width = int(merged(self.right))
            shape = (*(merged(group) for group in (self.head, self.summed)), width + extra)
            code = f"torch.nn.functional.pad({two}, (0, {extra}))"
            two = store.add(code, shape, Kernel.COPY, copy_work(self.second.stored))
            missing = f".narrow(2, 0, {width}){missing}"
        return f"torch.bmm({one}, {two}){missing}"

    def filled(self, store: Store) -> int:
        """How many columns of zeros are put to an odd number of them that stay the same in all rounds of a loop."""
        columns = merged(self.right)
        odd = self.head and isinstance(columns, int) and columns > 1 and columns % 2
        stays = (store.rounds > 1 or store.alone) and store.resolve(self.second.name) not in store.varying
        return -int(columns) % store.rates.odd if odd and stays else 0


def _matmul(store: Store, a: Ref, b: Ref, output: Legs, ordered: bool) -> Ref:
    """The orientation that needs the fewest copies and gives the order asked for."""
    ways = [_oriented(*pair, output, follow) for follow in (ordered, False) for pair in ((a, b), (b, a))]
    ways += [replace(w, summed=tuple(leg for leg in w.second.stored if leg in w.summed)) for w in ways]
    best = min(dict.fromkeys(ways), key=lambda way: way.seconds(store, output if ordered else None))
    if not best.head and not (best.left and best.right):
        large, small = (best.first, best.second) if best.left else (best.second, best.first)
        if _weighing_seconds(store, large, small) < best.seconds(store, output if ordered else None):
            return _weighed(store, large, small, best.summed)
    filled = best.filled(store) > 0
    name = store.add(best.code(store), best.shape, best.kernel, best.work, strided=filled, own=True)
    return Ref(name, best.legs, best.legs)


def _oriented(first: Ref, second: Ref, output: Legs, follow: bool) -> Product2:
    """first @ second, the legs of each group in the order of the output or of the memory."""

    def along(legs: Legs) -> Legs:
        return tuple(sorted(legs, key=output.index)) if follow else legs

    shared = tuple(leg for leg in first.stored if leg in second.stored)
    return Product2(
        first,
        second,
        head=along(tuple(leg for leg in shared if leg in output)),
        left=along(tuple(leg for leg in first.stored if leg not in second.stored)),
        summed=tuple(leg for leg in shared if leg not in output),
        right=along(tuple(leg for leg in second.stored if leg not in first.stored)),
    )
