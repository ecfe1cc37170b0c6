"""What the monitors say on several processes is what they say on one device."""

import math
from functools import cache
from pathlib import Path

import pytest

from tests.processes import REPOSITORY, launch

PROGRAM = Path(__file__).with_name("sharded_monitors.py")
BROKEN = "net.2.weight"

SPREAD = [
    (2, ("ddp", "fsdp", "adamw_fsdp2", "foreign_fsdp2")),
    pytest.param(3, ("ddp_sharded_state", "fsdp2", "foreign_ddp"), marks=pytest.mark.slow),
    pytest.param(4, ("hsdp",), marks=pytest.mark.slow),
    # All but the first take half a minute.
    pytest.param(2, ("ddp_sharded_state", "fsdp2"), marks=pytest.mark.slow),
    pytest.param(3, ("ddp", "fsdp", "foreign_fsdp2"), marks=pytest.mark.slow),
]

# The first is time; and under FSDP1 Lightning converts the module to the precision of the trainer.
UNLIKE = {"optimizer_share", "optimizer_state/bytes", "weight_bits"}

Found = dict[str, dict[str, list[dict[str, float]]]]


@cache
def by_rank(world_size: int, *ways: str) -> list[Found]:
    """By rank, what sharded_monitors.py finds of each way."""
    return launch(PROGRAM, "find", world_size, *ways, path=[REPOSITORY])


@pytest.fixture(scope="module")
def on_one_device() -> Found:
    return by_rank(1, "one", "adamw", "foreign", "fsdp2")[0]


# κ and rank come from a few steps of an iteration; κ near its end, from a difference of almost equal numbers.
ESTIMATES = ("gradient_", "momentum_")


def measured_by(way: str, tag: str) -> bool:
    """Whether a way shows what a tag is about: FSDP1 flattens matrices, a sharded state splits those of a fusion."""
    fusion_or_summary = "in_proj" in tag or tag.endswith(("/max", "/mean", "/min"))
    if way == "ddp_sharded_state" and tag.startswith("momentum_"):
        return not fusion_or_summary
    return not (way == "fsdp" and tag.startswith(ESTIMATES))


def differences(found: list[dict[str, float]], expected: list[dict[str, float]], rel: float) -> list[str]:
    """What is found otherwise than expected, of the tags that are in both."""
    return [
        f"step {step}, {tag}: {here[tag]} instead of {there[tag]}"
        for step, (here, there) in enumerate(zip(found, expected, strict=True))
        for tag in sorted(here.keys() & there.keys())
        if tag not in UNLIKE
        and here[tag]
        != pytest.approx(
            there[tag],
            rel=1e-2 if tag.startswith(ESTIMATES) else rel,
            abs=1e-3 if tag.startswith("singular") else 0,
            nan_ok=True,
        )
    ]


@pytest.mark.parametrize(("world_size", "ways"), SPREAD)
def test_the_same_numbers_on_every_rank(on_one_device: Found, world_size: int, ways: tuple[str, ...]) -> None:
    """As float64 has it on whole weights, and as on one device, whose weights go a little other ways."""
    ranks = by_rank(world_size, *ways)
    for way in ways:
        shares = {found[way]["logged"][-1]["optimizer_share"] for found in ranks}
        assert len(shares) == 1, way
        assert 0 < max(shares) < 1, way
        alone = next((kind for kind in ("adamw", "foreign") if way.startswith(kind)), "one")
        for kind in ("", " with NaN"):
            expected = on_one_device[alone + kind]["logged"]
            for found in ranks:
                logged = found[way + kind]["logged"]
                for step, step_expected in zip(logged, expected, strict=True):
                    assert {t for t in step if measured_by(way, t)} == {t for t in step_expected if measured_by(way, t)}
                assert not differences(logged[1::2], found[way + kind]["expected"][1::2], rel=1e-6), way + kind
                assert not differences(logged, expected, rel=1e-4), way + kind


@pytest.mark.parametrize(("world_size", "ways"), [*SPREAD[:2], *SPREAD[3:]])
def test_the_same_decay_on_every_rank(on_one_device: Found, world_size: int, ways: tuple[str, ...]) -> None:
    """Computed from the same numbers, to the last digit; and the weights that come of it are those of one device."""
    ranks = by_rank(world_size, *ways)
    for aim in ("to a number", "to the end of bf16, each matrix"):
        alone = on_one_device[f"one {aim}"]
        (sets,) = alone["sets"]
        assert all(0 < decay < 50 for tag, decay in sets.items() if tag.startswith("decay"))
        for way in {"ddp", "fsdp2", "fsdp"} & set(ways):
            for found in ranks:
                steered = found[f"{way} {aim}"]
                assert steered["sets"] == ranks[0][f"{way} {aim}"]["sets"]
                assert [step.keys() for step in steered["logged"]] == [step.keys() for step in alone["logged"]]
                # The growth of a step is a small difference of norms in float32.
                assert not differences(steered["logged"], alone["logged"], rel=1e-3), way
                assert not differences(steered["sets"], alone["sets"], rel=1e-3), way
                assert not differences(steered["expected"], alone["expected"], rel=1e-4), way


def test_one_device_under_fsdp2(on_one_device: Found) -> None:
    """Its parameters are DTensors all the same."""
    for kind in ("", " with NaN"):
        found, expected = on_one_device[f"fsdp2{kind}"]["logged"], on_one_device[f"one{kind}"]["logged"]
        assert [step.keys() for step in found] == [step.keys() for step in expected]
        assert not differences(found, expected, rel=1e-4)


def test_there_is_something_to_compare(on_one_device: Found) -> None:
    """Every quantity is there, the decay is turned on, and a NaN on one rank is seen."""
    *_, last = on_one_device["one"]["logged"]
    for quantity in ("weight_rms", "weight_absmax", "orthogonality_error", "singular_value_min", "singular_value_max"):
        names = {tag.split("/")[1] for tag in last if tag.startswith(quantity)} - {"max", "mean", "min"}
        assert names == {f"net.{i}.weight" for i in (0, 2, 4, 6)} | {
            f"attention.{name}" for name in ("in_proj_weight", "out_proj.weight")
        }
    assert len([tag for tag in last if tag.startswith("bf16_headroom/net") or "bf16_headroom/att" in tag]) == 3
    outputs = {tag.split("/")[1] for tag in last if tag.startswith("output_rms/")} - {"max", "mean", "min"}
    assert outputs == {"attention", *(f"net.{i}" for i in range(7))}
    assert last["weight_decay/matrix"] == 0.5
    *_, expected = on_one_device["one"]["expected"]
    sources, measures = ("gradient", "momentum"), ("condition_log10", "stable_rank")
    for quantity in [f"{source}_{measure}" for source in sources for measure in measures]:
        names = {tag.split("/")[1] for tag in last.keys() & expected.keys() if tag.startswith(quantity)}
        assert len(names) == 4, quantity
        assert len({last[f"{quantity}/{name}"] for name in names}) > 2, quantity
    groups = {tag for tag in last.keys() & expected.keys() if tag.startswith("update_rms/")}
    assert groups == {"update_rms/matrix", "update_rms/vector"}
    assert len([tag for tag in last.keys() & expected.keys() if tag.startswith("parameter_update_rms/")]) == 6
    foreign = on_one_device["foreign"]["logged"][-1]
    assert sum(tag.startswith("singular_value_max") and value > 0 for tag, value in foreign.items()) == 3 + 6
    *_, broken = on_one_device["one with NaN"]["logged"]
    assert math.isnan(broken["orthogonality_error/max"])
    assert math.isnan(broken[f"orthogonality_error/{BROKEN}"])
    assert not math.isnan(broken["orthogonality_error/net.4.weight"])
