"""The health of a run in figures: what is measured, what is healthy, and what to do where it is not."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from lightning_muon.cli.quantity import (
    UNKNOWN,
    Quantity,
    above,
    best,
    final,
    growth,
    late_growth,
    lowest,
    measured,
    median,
    none,
    peak,
    percent,
    risen,
    signed_percent,
    under,
    under_percent,
    up_to,
    values,
)
from lightning_muon.cli.run_log import RunLog
from lightning_muon.cli.tags import OWN_LOSS, UPDATE_RMS, VALIDATION_LOSS, WEIGHT_DECAY, matching


def quantities(runs: Iterable[RunLog]) -> list[Quantity]:
    """Return the lines that have a value in at least one run."""
    runs = list(runs)
    tags = list(chain.from_iterable(run.scalars for run in runs))
    losses = chain.from_iterable(map(_loss, matching(tags, OWN_LOSS)))
    updates = map(_update_rms, matching(tags, UPDATE_RMS))
    lines = [STEPS, *losses, NOT_FINITE, *HEALTH, WARNINGS, *updates, *COST]
    return [line for line in lines if any(line.measure(run) is not None for run in runs)]


def not_finite(run: RunLog) -> list[str]:
    """Return the tags under which a run logged NaN or infinity."""
    return [tag for tag, logged in run.scalars.items() if not all(math.isfinite(value) for _, value in logged)]


def _loss(tag: str) -> list[Quantity]:
    lines = [
        Quantity(f"{tag}, final", UNKNOWN, measured(tag, final)),
        Quantity(f"{tag}, best", UNKNOWN, measured(tag, best)),
    ]
    if matching([tag], VALIDATION_LOSS):
        advice = "the validation loss rose from its best: the model overfits, or diverges; take the best checkpoint"
        healthy = under_percent(0.02, 0.2)
        lines.append(Quantity(f"{tag}, above its best", healthy, measured(tag, risen), advice, percent))
    return lines


def _update_rms(tag: str) -> Quantity:
    return Quantity(f"update RMS of {tag.partition('/')[2]}, median", UNKNOWN, measured(tag, median))


def _last_step(run: RunLog) -> float | None:
    return max((logged[-1][0] for logged in run.scalars.values() if logged), default=None)


def _largest_decay(reduce: Callable[[Sequence[float]], float]) -> Callable[[RunLog], float | None]:
    """Measure the weight decay by a reduction, of the group that has the largest."""

    def measure(run: RunLog) -> float | None:
        curves = [values(run, tag) for tag in matching(run.scalars, WEIGHT_DECAY)]
        return max(map(reduce, curves), default=None)

    return measure


def _is_in_half_precision(run: RunLog) -> bool:
    """Whether weights are, or were not seen to be in more; in float32 nothing is lost."""
    bits = values(run, "weight_bits")
    return not bits or min(bits) <= 16


def _decisions(run: RunLog) -> float | None:
    return None if run.texts is None else len(run.texts.get("weight_decay/decisions", []))


def _warnings(run: RunLog) -> float | None:
    return None if run.texts is None else len(run.texts.get("warnings", []))


STEPS = Quantity("last step", UNKNOWN, _last_step, show="{:.0f}".format)
NOT_FINITE = Quantity(
    "tags with NaN or infinity",
    none(0),
    lambda run: len(not_finite(run)),
    "a value is not finite from some step on: go back to a checkpoint before it, lower the learning rate or clip",
    "{:.0f}".format,
)
WARNINGS = Quantity("warnings", none(math.inf), _warnings, show="{:.0f}".format)  # a run says them itself

# The ranges of docs/reading-the-monitors.md.
WEIGHT_RMS = under(1.0, 4.0)
BF16_HEADROOM = above(1.0, 0.5)  # under half a spacing the typical update is rounded away
DOUBLINGS_TO_OVERFLOW = above(16, 4)
OUTPUT_RMS = under(1e3, 65504.0)  # float16 ends there; bfloat16 adds nothing under 256 to what is larger than that
ORTHOGONALITY_ERROR = up_to(0.7, 0.9)
# Five steps of Newton-Schulz with Jordan's coefficients end at 1.2024 at most; the rest is room for rounding, and for
# optimizers whose scale is not known.
LARGEST_SINGULAR_VALUE = up_to(1.3, 2.0)
OPTIMIZER_SHARE = under_percent(0.2, 0.5)
_LATE_GROWTH = under_percent(0.1, 1.0)

HEALTH = (
    Quantity(
        "weight RMS, peak of the largest",
        WEIGHT_RMS,
        measured("weight_rms/max", peak),
        "the weights are large: let them decay more, by weight_decay or AutoWeightDecay",
    ),
    Quantity("weight RMS, final of the largest", UNKNOWN, measured("weight_rms/max", final)),
    Quantity("weight RMS, growth since the start", UNKNOWN, measured("weight_rms/max", growth), show="×{:.3g}".format),
    Quantity(
        "weight RMS, growth in the last quarter",
        _LATE_GROWTH,
        measured("weight_rms/max", late_growth),
        "the weights still grow: harmless in a short run; in a long one let them decay more, by weight_decay or"
        " AutoWeightDecay",
        signed_percent,
    ),
    Quantity("largest weight", UNKNOWN, measured("weight_absmax/max", final)),
    Quantity(
        "bf16 headroom, median of the smallest",
        BF16_HEADROOM,
        measured("bf16_headroom/min", median),
        "bfloat16 weights lose updates: keep weights in float32 (bf16-mixed, not bf16-true), or let them decay more",
        concerns=_is_in_half_precision,
    ),
    Quantity("updates that bf16 would lose", UNKNOWN, measured("lost_updates/mean", median), show=percent),
    Quantity(
        "doublings until bf16 overflows, fewest",
        DOUBLINGS_TO_OVERFLOW,
        measured("doublings_to_overflow/min", lowest),
        "the largest weight nears the end of bfloat16's range: the run diverges; lower the learning rate",
        "{:.1f}".format,
    ),
    Quantity(
        "layer output RMS, peak of the largest",
        OUTPUT_RMS,
        measured("output_rms/max", peak),
        "the outputs are large: what later layers add is rounded away; lower the learning rate, or decay more",
    ),
    Quantity(
        "layer output RMS, growth in the last quarter",
        _LATE_GROWTH,
        measured("output_rms/max", late_growth),
        "the outputs still grow, with the weights behind them: let those decay, by weight_decay or AutoWeightDecay",
        signed_percent,
    ),
    Quantity(
        "orthogonality error, median of the mean",
        ORTHOGONALITY_ERROR,
        measured("orthogonality_error/mean", median),
        "updates have lost rank: look at the gradients of the worst layer, by per_parameter",
    ),
    Quantity("orthogonality error, largest", UNKNOWN, measured("orthogonality_error/max", peak)),
    Quantity("singular value of the update, smallest", UNKNOWN, measured("singular_value_min/min", median)),
    Quantity(
        "singular value of the update, largest",
        LARGEST_SINGULAR_VALUE,
        measured("singular_value_max/max", median),
        "the iteration for the polar factor diverges: take another orthogonalizer, or its default options",
    ),
    Quantity("condition number of the gradient, median", UNKNOWN, measured("gradient_condition/mean", median)),
    Quantity("condition number of the momentum, median", UNKNOWN, measured("momentum_condition/mean", median)),
    Quantity("stable rank of the gradient, median", UNKNOWN, measured("gradient_stable_rank/mean", median)),
    Quantity("stable rank of the momentum, median", UNKNOWN, measured("momentum_stable_rank/mean", median)),
    Quantity("weight decay, largest", UNKNOWN, _largest_decay(peak)),
    Quantity("weight decay, final", UNKNOWN, _largest_decay(final)),
    Quantity("decisions about the weight decay", UNKNOWN, _decisions, show="{:.0f}".format),
)

COST = (
    Quantity(
        "optimizer's share of the step",
        OPTIMIZER_SHARE,
        measured("optimizer_share", median),
        "the optimizer takes much of the step: larger batches, the preset optimizer/fast, or more devices",
        percent,
    ),
)
