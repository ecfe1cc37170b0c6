"""The search of a comparison: it finds the optimum of a known loss, by the same runs however it is interrupted."""

import itertools
import math
import random
from collections.abc import Callable, Mapping

import pytest

from lightning_muon.experiments.contestant import Contestant, Settings
from lightning_muon.experiments.tuning import MOST_POINTS, Axis, Search, axes_of, search

ROLES = ("embedding", "head", "vector")
ADAMW = Contestant("adamw", ("optimizer/adamw",), Settings(0.002, 0.1, dict.fromkeys(ROLES, 0.002)), frozenset(ROLES))
OPTIMUM = {"lr": 0.0015, "weight_decay": 0.3, "embedding": 0.02, "head": 0.01, "vector": 0.004}


def bowl(settings: Settings) -> float:
    """Return a loss that is least at OPTIMUM, and infinite for learning rates over 0.1."""
    values = settings.values()
    if max(values[name] for name in ("lr", *settings.rates)) > 0.1:
        return math.inf
    decay = settings.weight_decay if settings.weight_decay is not None else OPTIMUM["weight_decay"]
    rates = sum(math.log(values[name] / OPTIMUM[name]) ** 2 for name in ("lr", *settings.rates))
    return rates + (decay - OPTIMUM["weight_decay"]) ** 2


def run(contestant: Contestant, loss: Callable[[Settings], float], axes: list[Axis]) -> tuple[Search, dict[str, float]]:
    """Search to the end; return what was found, and the losses by settings in the order of the runs."""
    known: dict[str, float] = {}
    while (found := search(contestant, axes, lambda settings: known.get(str(settings)))).wanted:
        for settings in found.wanted:
            assert str(settings) not in known, "asked twice"
            known[str(settings)] = loss(settings)
    return found, known


def test_it_finds_each_optimum_to_within_its_grid() -> None:
    axes = axes_of(ADAMW)
    found, known = run(ADAMW, bowl, axes)
    for axis in axes:
        if axis.name in OPTIMUM and axis.name != "weight_decay":
            ratio = found.best.values()[axis.name] / OPTIMUM[axis.name]
            step = min(other.factor for other in axes if other.name == axis.name)
            assert 1 / step < ratio < step, axis
    assert found.best.weight_decay == 0.3
    assert not found.at_edge
    assert found.best == min((settings for _, settings in found.visited), key=bowl)
    assert len(found.visited) == len(known) < 40


def test_the_rates_of_roles_follow_the_learning_rate_until_they_are_tuned_themselves() -> None:
    first = search(ADAMW, axes_of(ADAMW), lambda _: None)
    assert [settings.values() for settings in first.wanted] == [
        {"lr": lr, "weight_decay": 0.1, "embedding": lr, "head": lr, "vector": lr} for lr in (0.001, 0.002, 0.004)
    ]
    own = Contestant("polargrad", (), Settings(1.0, 0.0, {"embedding": 0.005}))  # not coupled
    assert {settings.rates["embedding"] for settings in search(own, axes_of(own), lambda _: None).wanted} == {0.005}
    found, _ = run(ADAMW, bowl, axes_of(ADAMW))
    last = [settings for stage, settings in found.visited if stage == "lr"][-1]
    assert last.rates == found.best.rates


def test_a_grid_grows_while_the_best_lies_at_its_end_and_says_if_it_may_grow_no_more() -> None:
    def downhill(settings: Settings) -> float:
        return -settings.lr

    found, known = run(ADAMW, downhill, [Axis("lr", 2.0)])
    assert len(known) == MOST_POINTS
    assert found.best.lr == pytest.approx(0.002 * 2 ** (MOST_POINTS - 2), rel=0.01)
    assert found.at_edge == ("lr",)


def test_where_every_run_diverges_lower_rates_are_tried() -> None:
    found, _ = run(ADAMW, lambda s: math.inf if s.lr > 2e-4 else abs(math.log(s.lr / 5e-5)), [Axis("lr", 2.0)])
    assert found.best.lr == pytest.approx(6.25e-5, rel=0.01)


def test_no_decay_is_among_the_decays() -> None:
    found, _ = run(ADAMW, lambda s: s.weight_decay or 0.0, [Axis("weight_decay", 3.0)])
    assert found.best.weight_decay == 0
    assert not found.at_edge
    without = Contestant("x", (), Settings(0.1, 0.0))
    found, _ = run(without, lambda s: abs((s.weight_decay or 0.0) - 0.3), [Axis("weight_decay", 3.0)])
    assert found.best.weight_decay == 0.3
    assert not [axis for axis in axes_of(Contestant("x", (), Settings(0.1))) if axis.name == "weight_decay"]


def test_roles_whose_rates_only_rise_together_are_found() -> None:
    """So it is with AdamW on a language model: a larger rate of the embedding alone gains little, and costs decay."""

    def valley(settings: Settings) -> float:
        embedding, head = (math.log(settings.rates[role] / 0.02) for role in ("embedding", "head"))
        return (embedding + head) ** 2 + 10 * (embedding - head) ** 2

    found, _ = run(ADAMW, valley, axes_of(ADAMW))
    assert valley(found.best) < 0.5 < valley(ADAMW.start)


def test_what_was_tuned_early_is_tuned_again() -> None:
    """With the first decay, a large rate is best; with a larger decay, the rate is too large."""

    def loss(settings: Settings) -> float:
        rate = math.log(max(settings.rates.values()) / 0.002) - 3
        decay = math.log((settings.weight_decay or 1e-9) / 0.1) - 3
        return rate**2 + 1.2 * rate * decay + decay**2

    axes = [Axis("roles", 3.0), Axis("weight_decay", 3.0)]
    found, known = run(ADAMW, loss, axes)
    first_round = list(known.values())[:11]
    assert loss(found.best) < min(first_round) / 4
    assert len(known) <= 20


def test_a_value_that_rounding_has_moved_is_not_run_again() -> None:
    """0.0333 times 3 is 0.0999, which is 0.1."""
    _, known = run(ADAMW, lambda s: abs(math.log((s.weight_decay or 1.0) / 0.03)), [Axis("weight_decay", 3.0)])
    decays = sorted(float(name.split("wd=")[1].split(",")[0]) for name in known)
    assert len(decays) > 3
    assert all(after > 2 * before for before, after in itertools.pairwise(decays))


def test_known_losses_alone_decide_what_runs_next() -> None:
    """Any order of results, and any point at which the search is begun again, leads to the same runs."""
    _, expected = run(ADAMW, bowl, axes_of(ADAMW))
    draw = random.Random(0)  # noqa: S311
    for _ in range(20):
        known: dict[str, float] = {}
        while (found := search(ADAMW, axes_of(ADAMW), lambda s, k=known: k.get(str(s)))).wanted:  # type: ignore[misc]
            settings = draw.choice(found.wanted)
            known[str(settings)] = bowl(settings)
        assert known == expected


@pytest.mark.parametrize(
    ("tuned", "names"),
    [
        (("lr", "weight_decay", "roles", "each_role"), ["lr", "roles", *ROLES, "weight_decay", "lr"]),
        (("weight_decay", "embedding"), ["embedding", "weight_decay"]),
        ((), []),
    ],
)
def test_what_is_tuned_can_be_chosen(tuned: tuple[str, ...], names: list[str]) -> None:
    axes = axes_of(ADAMW, tuned)
    assert [axis.name for axis in axes] == names
    if not axes:
        assert search(ADAMW, axes, lambda _: None) == Search(ADAMW.start)


def test_options_are_those_of_the_command_line() -> None:
    options: Mapping[str, object] = ADAMW.start.options()
    assert options == {
        "model.optimizer.lr": 0.002,
        "model.optimizer.weight_decay": 0.1,
        "model.lr_by_role": {"embedding": 0.002, "head": 0.002, "vector": 0.002},
    }
    assert Settings(1.0).options() == {"model.optimizer.lr": 1.0}
