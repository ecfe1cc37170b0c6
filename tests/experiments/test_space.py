"""What --vary takes, and the names of the trials."""

from typing import Any

import pytest

from lightning_muon.experiments import Trial
from lightning_muon.experiments.space import Choices, Range, grid, parse


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("0.01,2e-2,1", (0.01, 0.02, 1)),
        ("true,null,relu", (True, None, "relu")),
        ("[1, 2],[3]", ([1, 2], [3])),
        ("optimizer/moonlight,optimizer/fast", ("optimizer/moonlight", "optimizer/fast")),
        ("7", (7,)),
        ("2026-01-02", ("2026-01-02",)),
        ("log:1e-4..1e-1/4", (1e-4, 1e-3, 1e-2, 1e-1)),
        ("0..1/5", (0, 1)),  # of whole numbers there are only two
        ("0.0..1.0/5", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("log:1..64/7", (1, 2, 4, 8, 16, 32, 64)),
    ],
)
def test_choices(spec: str, values: tuple[Any, ...]) -> None:
    assert parse(f"a.b={spec}") == Choices("a.b", values)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("1e-4..1e-1", Range("a", 1e-4, 1e-1)),
        ("log:1e-4..1e-1", Range("a", 1e-4, 1e-1, log=True)),
        ("-1..8", Range("a", -1, 8)),
    ],
)
def test_ranges(spec: str, expected: Range) -> None:
    found = parse(f"--a={spec}")
    assert found == expected
    assert found.is_of_integers == ("e" not in spec)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lr", "expected KEY="),
        ("lr=", "expected KEY="),
        ("=1", "expected KEY="),
        ("lr=a..b", "between two numbers"),
        ("lr=2..1", "must be below the second"),
        ("lr=log:0..1", "must be above 0, and below the second"),
        ("lr=1..2/1", "at least 2 points"),
        ("lr=log:1,2", "after log: expected two numbers"),
        ("lr=[1", "not a list of YAML values"),
        ("lr=0.1,1e-1", "the value 0.1 stands there twice"),
    ],
)
def test_a_wrong_specification_is_explained(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as raised:
        parse(text)
    assert str(raised.value).startswith(f"--vary {text}: ")


def test_a_grid_has_all_combinations_with_names_of_folders() -> None:
    dimensions = [
        parse("model.optimizer.init_args.lr=0.01,0.02"),
        parse("config=optimizer/moonlight,schedule/constant"),
    ]
    assert grid(dimensions) == [
        Trial(f"lr={lr},{preset.partition('/')[2]}", {"model.optimizer.init_args.lr": lr, "config": preset})
        for lr in (0.01, 0.02)
        for preset in ("optimizer/moonlight", "schedule/constant")
    ]


def test_names_are_unique_and_short() -> None:
    names = [trial.name for trial in grid([Choices("text", ("a/b", "a b", "x" * 300, {"class_path": "my.Own"}))])]
    assert names == ["text=a-b", "text=a-b-2", f"text={'x' * 115}", "text=Own"]
