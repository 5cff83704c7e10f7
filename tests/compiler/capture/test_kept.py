"""What modules keep besides tensors: which containers are found, and how far objects are entered."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tnbackprop.compiler.capture.kept import attributes_kept, containers


def holding(value: Any) -> nn.Module:
    module = nn.Module()
    module.value = value
    return module


def found(value: Any) -> list[Any]:
    """But for those that every module has, its hooks, which are empty."""
    return [each for each in containers(holding(value)) if each]


def test_containers_in_each_other() -> None:
    inner = list[Any]([1])
    assert found(({"a": inner},)) == [{"a": inner}, inner]
    inner.append(inner)
    assert len(found(inner)) == 1


def test_attributes_of_an_object_and_what_they_hold() -> None:
    assert found([SimpleNamespace(a=[1])]) == [[SimpleNamespace(a=[1])], {"a": [1]}, [1]]


def test_objects_of_objects_are_not_entered() -> None:
    """They may be a whole program: a trainer with its data, queues that other threads write to."""
    inner = SimpleNamespace(a=[1])
    assert found(SimpleNamespace(inner=inner)) == [{"inner": inner}]


@pytest.mark.parametrize("value", [math, SimpleNamespace, torch.ops.aten.add, torch.ops.aten.add.Tensor, torch.ones(2)])
def test_what_is_not_opened(value: Any) -> None:
    assert not found(value)


def test_attributes_that_are_new_are_gone() -> None:
    module, state = holding([1]), SimpleNamespace(a=1)
    module.state = state
    with attributes_kept(module):
        module.new, module.value, state.b, state.a = 1, [2], 2, 3
    assert not hasattr(module, "new") and module.value == [1] and module.state is state and vars(state) == {"a": 1}
