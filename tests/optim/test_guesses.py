"""What is said of a guess, the rules that settle it, and strict routing."""

import itertools
import re
import warnings

import pytest
import torch
import yaml
from torch import nn

from lightning_muon.optim import Rule, find_routes, route_parameters


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tensor = nn.Parameter(torch.randn(3, 8, 8))


class Pooled(nn.Module):
    """A head and tensors of unknown role, all guesses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.mixing = nn.ModuleList(Mixing() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.pooler = nn.Linear(8, 8)


def warning_of(model: nn.Module) -> str:
    with pytest.warns(UserWarning, match="is a guess") as caught:
        find_routes(model)
    assert len(caught) == 1
    return str(caught[0].message)


def test_one_warning_lists_all_guesses() -> None:
    text = warning_of(Pooled())
    assert text.startswith("the role of 3 parameters is a guess:\n")
    assert "adamw updates pooler.weight (8, 8): output head, perhaps" in text
    assert "adamw updates mixing.*.tensor, 2 such as mixing.0.tensor, (3, 8, 8): 3-D parameter of Mixing" in text


def test_the_rules_of_the_warning_settle_it() -> None:
    text = warning_of(Pooled())
    rules = [Rule(*arguments) for arguments in re.findall(r'Rule\("(.*)", "(.*)"\)', text)]
    assert {rule.pattern for rule in rules} == {"pooler.weight", "mixing.*.tensor"}
    entries = yaml.safe_load(text[text.index("    rules:") :])["rules"]
    assert [Rule(**entry) for entry in entries] == rules
    before = {route.name: route.algorithm for route in find_routes(Pooled())}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routes = find_routes(Pooled(), rules)
    assert {route.name: route.algorithm for route in routes} == before
    assert {route.confidence for route in routes} == {"known"}


def test_a_pattern_takes_nothing_but_guesses() -> None:
    model = Pooled()
    model.mixing[1] = nn.Linear(8, 8)
    model.mixing[1].tensor = nn.Parameter(torch.zeros(8))
    assert 'Rule("mixing.0.tensor", "adamw")' in warning_of(model)


def test_many_guesses_are_not_all_described() -> None:
    model = nn.ModuleDict({f"part_{chr(97 + index)}": Mixing() for index in range(20)})
    text = warning_of(model)
    assert text.count("3-D parameter of Mixing") == 12
    assert "and 8 more" in text
    assert text.count("    Rule(") == 20


def test_strict_routing_refuses_to_guess() -> None:
    text = warning_of(Pooled())
    for route in (find_routes, route_parameters):
        with pytest.raises(ValueError, match="strict routing: the role of 3 parameters is a guess") as error:
            route(Pooled(), strict=True)
        assert str(error.value).endswith(text)
    rules = [Rule("pooler.weight", "adamw"), Rule("mixing.*", "adamw")]
    assert route_parameters(Pooled(), rules, strict=True)


def test_strict_routing_of_what_is_known() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    assert route_parameters(model, strict=True)


def test_frozen_parameters_are_no_guesses() -> None:
    model = Pooled()
    model.mixing.requires_grad_(False)
    model.pooler.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_routes(model, strict=True)


def test_a_part_is_routed_as_it_is_alone() -> None:
    def network(*widths: int) -> nn.Sequential:
        layers = [nn.Linear(fan_in, fan_out) for fan_in, fan_out in itertools.pairwise(widths)]
        return nn.Sequential(*layers)

    gan = nn.Module()
    gan.generator, gan.discriminator = network(10, 32, 64), network(64, 32, 1)
    for part in (gan.generator, gan.discriminator):
        alone = [(group["role"], group["params"]) for group in route_parameters(part)]
        within = [(group["role"], group["params"]) for group in route_parameters(gan, part=part)]
        assert [role for role, _ in alone] == [role for role, _ in within] == ["matrix", "head", "vector"]
        ids = [[[id(parameter) for parameter in parameters] for _, parameters in routed] for routed in (alone, within)]
        assert ids[0] == ids[1]
