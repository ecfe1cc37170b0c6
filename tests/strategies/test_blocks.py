"""Which modules are blocks, for both versions of FSDP."""

import pytest
from torch import nn

from lightning_muon.strategies import BlockWrapPolicy, find_blocks


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.stack = nn.ModuleList([Layer(), Layer(), nn.ReLU(), nn.ReLU()])
        self.tail = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        self.head = nn.Linear(2, 4, bias=False)


def test_what_repeats_is_a_block_and_what_it_holds_is_not() -> None:
    model = Model()
    assert {*find_blocks(model)} == {model.stack[0], model.stack[1], model.tail[2][0], model.tail[2][1]}


def test_classes_and_functions_choose_inner_ones_first() -> None:
    model = Model()
    found = find_blocks(model, ["Layer", "Embedding"])
    assert {*found} == {*model.stack[:2], model.embedding}
    nested = find_blocks(model, ["Layer", "ModuleList"])
    assert nested.index(model.stack[0].experts) < nested.index(model.stack[0]) < nested.index(model.stack)
    assert find_blocks(model, lambda name, _: name == "tail") == [model.tail]
    assert find_blocks(model, []) == []


def test_what_is_tied_to_the_rest_stays_with_it() -> None:
    model = Model()
    model.head.weight = model.embedding.weight
    model.stack[1] = model.stack[0]  # a layer that is used twice is tied to nothing else
    assert find_blocks(model, ["Layer", "Embedding"]) == [model.stack[0]]


def test_no_match_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"no module of class 'layer'; did you mean 'Layer'\? There are Emb"):
        find_blocks(Model(), ["layer"])
    with pytest.raises(ValueError, match="matches no module of Model"):
        find_blocks(Model(), lambda *_: False)


def test_fsdp1_wraps_the_same() -> None:
    model = Model()
    policy = BlockWrapPolicy()._run_policy(model, ignored_modules={model.stack[0]}, root_kwargs={"a": 1})
    assert policy == {block: {"a": 1} for block in find_blocks(model) if block is not model.stack[0]}
