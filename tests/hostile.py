"""Names that nobody should have to fear: for modules, parameters, keys, buffers, classes, quantities, batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

CANARY = "canary(1)"
"""Code that a test notices: a builtin of this name. Without a dot, for torch takes none in names."""

NAMES = (
    "class", "lambda", "None", "match", "print", "len", "dict", "torch", "mm", "matmul", "like", "memory", "progress",
    "tensors", "results", "N", "V", "n", "v", "each", "u", "g", "i", "total", "t0", "u0", "x", "y", "x0", "slice_0",
    "column_0", "noise_0", "draw_0", "root_0", "weight_0", "slot_0_0", "added", "window_gram", "program", "loss",
    "output", "both_x", "both_0", "g_first", "input_x", "of", "s0_h0", "h0_output", "p_first_weight", "b_first",
    "loss_p", "noise_first", "model", "self", "super", "builtins", "constants", "noise", "state", "STATE", "INPUTS",
    "first", "first_weight", "weight", "_", "__", "0", "7up", "ß", "π", "变量", "ν", "μ", "𝟙", "🙂", "a b", " ", "\t",
    "'",
    '"', "'''", '"""', 'x"""', "\\", "\\'", "\\n", "\n", "\r", "\x00", "\x0b", "\x1c", "\u2028", "\u2029", "\x85",
    "\u202e", "\ufeff", "\udc80", "{x}", "{}", "{{", "}", "%s", "#", "# x", "a#b", "kfac#0", "::", "a:b", ":g",
    "f'{x}'", "[", "](", ",", "=", "x=1", "*", "->", ";", "layer" * 60, "é" * 300, f"\n{CANARY}\n",
    f'"""\n{CANARY}\n"""', f"{{{CANARY}}}", f"'+{CANARY}+'", f"x\r{CANARY}#", f"']; {CANARY} #", f"x\u2028{CANARY}",
    f'")\n{CANARY}\n#', f"')\n{CANARY}\n#", f'"]\n{CANARY}\n#', f'"), {CANARY}, ("',
)  # fmt: skip


PLACES = ("first", "kept", "key", "scale", "shift", "left", "right", "linear", "scaled", "loss_class", "class")
"""Where `Model` has names: two modules, a key, a parameter, a buffer, two inputs, classes."""


def class_named(base: type[nn.Module], name: str) -> type[nn.Module]:
    """A class of this name that does what its base does. Python takes no surrogates and no zeros here."""
    taken = name.replace("\x00", "0").encode("utf-8", "replace").decode()
    made: type[nn.Module] = type(base)(taken, (base,), {"__module__": base.__module__})
    return made


class Scaled(nn.Module):
    """tanh(x * parameter + buffer), whatever these are called; no rule of its own."""

    def __init__(self, scale: str, shift: str) -> None:
        super().__init__()
        self.names_of_two = scale, shift
        self.register_parameter(scale, nn.Parameter(torch.randn(3)))
        self.register_buffer(shift, torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.names_of_two
        parameter, buffer = self._parameters[scale], self._buffers[shift]
        assert parameter is not None and buffer is not None
        return torch.tanh(x * parameter + buffer)


class Model(nn.Module):
    """Layers of these names, one of them in a dictionary, on a batch with these keys."""

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names_of_parts = names
        self.add_module(names["first"], class_named(nn.Linear, names["linear"])(3, 3))
        self.add_module(names["kept"], nn.ModuleDict({names["key"]: nn.Linear(3, 3)}))
        self.scaled_part = class_named(Scaled, names["scaled"])(names["scale"], names["shift"])
        self.last_part = nn.Linear(3, 4)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        names, parts = self.names_of_parts, self._modules
        first, kept = parts[names["first"]], parts[names["kept"]]
        assert first is not None and isinstance(kept, nn.ModuleDict)
        hidden = torch.tanh(first(batch[names["left"]]) + torch.sin(batch[names["right"]]))
        result: Tensor = self.last_part(self.scaled_part(kept[names["key"]](hidden)))
        return result


def fits(place: str, name: str) -> bool:
    """Whether torch and Python take this name there: no dots, nothing that a module has already."""
    if place in ("left", "right", "linear", "scaled", "loss_class", "class"):
        return True
    owner = nn.ModuleDict() if place == "key" else Model.__new__(Model)
    return "." not in name and bool(name) and not hasattr(owner, name)
