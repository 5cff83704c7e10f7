"""The texts that the checks of generated files are made of."""

from __future__ import annotations

EXAMPLE = '''
def example(samples, seed=0):
    """Values for every argument, in float64."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, (shape, low, high) in ARGUMENTS.items():
        shape = [samples if size == "N" else size for size in shape]
        if isinstance(low, int):
            values[name] = torch.randint(low, high + 1, shape, generator=generator)
        else:
            values[name] = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    return complete(values, generator)


def call(function, values):
    """The function of those values that are its arguments."""
    code = function.__code__
    return function(**{name: values[name] for name in code.co_varnames[: code.co_argcount]})


def compare(label, got, want, tolerance=TOLERANCE):
    """Print the largest difference, and return whether it is small enough."""
    same = got.shape == want.shape
    error = float((got - want).abs().max() / max(1.0, float(want.abs().max()))) if same else float("inf")
    right = error <= tolerance
    print(f"{'ok   ' if right else 'WRONG'} {label}: {error:.1e}")
    return right
'''

AUTOGRAD = '''
def sampled(name):
    """Whether the first axis of an argument is that of the samples."""
    return name in ARGUMENTS and ARGUMENTS[name][0][:1] == ("N",)


def flattened(value, lead):
    """All axes behind the first `lead` as one, which has size 1 where there are none."""
    return value.reshape(*value.shape[:lead], value.shape[lead:].numel())


def of_copies(values):
    """The output where every sample has a copy of its own of each argument, and the copies: [N, *argument]."""
    samples = len(values[BATCH])
    copies = {}
    for name in DIFFERENTIABLE:
        value = values[name] if sampled(name) else values[name].expand(samples, *values[name].shape)
        copies[name] = value.clone().requires_grad_()
    outputs = []
    for n in range(samples):
        sample = {name: value[n : n + 1] for name, value in (values | copies).items() if sampled(name)}
        sample |= {name: copy[n] for name, copy in copies.items() if not sampled(name)}
        outputs.append(call(forward, values | sample))
    return torch.cat(outputs), copies


def derivatives(number, copies, create_graph=False):
    """By each sample's copies: {argument: [N, *argument]}."""
    leaves = list(copies.values())
    found = torch.autograd.grad(number, leaves, retain_graph=True, create_graph=create_graph, materialize_grads=True)
    return dict(zip(copies, found, strict=True))
'''

GRADIENTS = '''
def gradients(values):
    """Individual gradients, {argument: [N, *argument]}."""
    output, copies = of_copies(values)
    return derivatives(total(values, output), copies)
'''

PULLED = '''
def pulled(values, columns):
    """Columns [V, N, *output] pulled back: {argument: [V, N, *argument]}."""
    output, copies = of_copies(values)
    rows = [derivatives((output * column).sum(), copies) for column in columns]
    return {name: torch.stack([row[name] for row in rows]) for name in copies}
'''

JACOBIANS = '''
def jacobians(values):
    """Derivatives of all C elements of the output, {argument: [C, N, *argument]}."""
    output = call(forward, values)
    columns = torch.eye(output[0].numel(), dtype=output.dtype).reshape(-1, 1, *output.shape[1:])
    return pulled(values, columns.expand(-1, *output.shape))
'''

AS_COLUMNS = '''
def gradients_as_columns(values):
    """Of the empirical Fisher: {argument: [1, N, *argument]}."""
    return {name: gradient.unsqueeze(0) for name, gradient in gradients(values).items()}
'''

TEXTS = {
    "gradients": GRADIENTS,
    "pulled": PULLED,
    "jacobians": JACOBIANS,
    "gradients_as_columns": AS_COLUMNS,
}
"""Texts by the name of their function."""
CALLS = {
    "jacobians": ("pulled",),
    "gradients_as_columns": ("gradients",),
    "pulled_columns": ("pulled",),
    "averages": ("jacobians",),
}
"""Which of them a function calls."""

CHECK_DEFINITIONS = '''
def check_definitions(values, found):
    """What has a definition in first derivatives."""
    made, right = {}, []
    for (quantity, name), got in found.items():
        if quantity in REFERENCES:
            derive, define = REFERENCES[quantity]
            if derive not in made:
                made[derive] = derive(values)
            right.append(compare(f"{quantity} of {name}", got, define(made[derive][STATE.get(name, name)])))
    return right
'''

CHECK_SECOND = '''
def check_second_derivatives(values, found):
    """Diagonals of Hessians, at up to 32 entries of each: autograd differentiates once more for every entry."""
    right = []
    for (quantity, name), got in found.items():
        if quantity in SECOND:
            number, per_sample = SECOND[quantity]
            output, copies = of_copies(values)
            own = copies[STATE.get(name, name)]
            (first,) = torch.autograd.grad(number(values, output), own, create_graph=True)
            size = first[0].numel()
            entries = range(0, size, -(-size // 32))
            rows = []
            for k in entries:
                row = torch.zeros_like(own)
                if first.requires_grad:
                    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
                    (row,) = torch.autograd.grad(flattened(first, 1)[:, k].sum(), own, **options)
                rows.append(flattened(row, 1)[:, k])
            want = torch.stack(rows, 1) if per_sample else torch.stack(rows, 1).sum(0)
            label = f"{quantity} of {name}, {len(entries)} of {size} entries"
            if got.shape != (own.shape if per_sample else own.shape[1:]):
                right.append(compare(label, got, own))
                continue
            right.append(compare(label, got.reshape(*want.shape[:-1], size)[..., list(entries)], want))
    return right
'''

CHECK_FACTORS = '''
def check_factors():
    """Kronecker factors where they are exact, against the block V Vᵀ: both times a vector."""
    right = []
    for (quantity, name), (exact, pull, names, sizes, order) in KRONECKER.items():
        values = exact(quantity, name)
        factors, V = computed(values, (quantity, name))[quantity, name], pull(values)
        samples = "1 sample" if len(values[BATCH]) == 1 else "the same columns everywhere"
        label = f"{quantity} of {' and '.join(names)}, {samples}"
        d = [factor.shape[-1] for factor in factors]
        rows = V[STATE[name]].reshape(-1, *sizes).permute(0, *(k + 1 for k in order))
        blocks = len(factors[0]) if factors[0].ndim == 3 else 1
        if len(names) == 2:  # a joined bias is the last row of the last factor
            weight, bias = rows.reshape(len(rows), 1, d[0], d[1] - 1), V[STATE[names[1]]].reshape(len(rows), 1, d[0], 1)
            rows = torch.cat([weight, bias], 3)
        rows = rows.reshape(len(rows), blocks, *d)
        vector = torch.randn(rows.shape[1:], generator=torch.Generator().manual_seed(0), dtype=rows.dtype)
        along = (rows * vector).flatten(2).sum(2)
        want = (along.reshape(*along.shape, *[1] * len(d)) * rows).sum(0)
        for k, factor in enumerate(factors):
            moved = vector.movedim(k + 1, 1)
            matrix = factor.diag() if factor.ndim == 1 else factor
            times = matrix.reshape(blocks, d[k], d[k]) @ moved.reshape(blocks, d[k], -1)
            vector = times.reshape(moved.shape).movedim(1, k + 1)
        right.append(compare(label, vector, want))
    return right
'''

CHECK_RECORDED = '''
def check_recorded(found):
    """What autograd has no definition of: what it was when this file was written."""
    right = []
    for key, numbers in RECORDED.items():
        want = torch.tensor(numbers, dtype=torch.float64)
        right.append(compare(f"{key[0]} of {key[1]}, as recorded", record(found[key]), want, 1e-5))
    print(f"{len(RECORDED)} results are compared with numbers that were recorded when this file was written")
    return right


def record(value):
    """One number for a tensor, or for each of several."""
    tensors = value if isinstance(value, tuple) else (value,)
    return torch.stack([t.double().flatten() @ torch.cos(torch.arange(t.numel()).double()) for t in tensors])
'''

MAIN = '''
def check():
    """Compare the results for SAMPLES samples with their definitions; returns the exit status."""
    values = example(SAMPLES)
    found = computed(values)
$RIGHT
    print(f"{sum(right)} of {len(right)} agree")
    return 0 if all(right) else 1


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        print(__doc__)
        sys.exit(2 if sys.argv[1:] else 0)
    sys.exit(check())
'''
