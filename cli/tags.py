"""Which tags of a run are losses, decays and updates, whatever they are called, and what a logger put before them."""

import re
from collections import Counter
from collections.abc import Iterable

# The two that follow are those of callbacks/page/charts.py, which a report cannot import: torch comes with it.
QUANTITIES = (
    "weight_rms|weight_absmax|doublings_to_overflow|bf16_headroom|lost_updates|output_rms|orthogonality_error"
    "|singular_value_min|singular_value_max|update_rms|parameter_update_rms|weight_decay"
    "|gradient_condition|momentum_condition|gradient_stable_rank|momentum_stable_rank"
)
LOSS = rf"^(?!(.+-)?(lr-|({QUANTITIES})/)).*[Ll]oss.*"

_VALIDATION = r"(.*[/_.-])?(val|valid|validation|eval)([/_.-]|$)"
# The template logs the loss of a model that knows frequencies only, for comparison: it is none of the run's own.
OWN_LOSS = rf"(?!.*unigram){LOSS}"
VALIDATION_LOSS = rf"(?={_VALIDATION}){OWN_LOSS}"
OTHER_LOSS = rf"(?!{_VALIDATION}){OWN_LOSS}"
UPDATE_RMS = "update_rms/.+"
WEIGHT_DECAY = "weight_decay/.+"

_OF_A_MONITOR = re.compile(rf"(?P<prefix>(.+?-)??)(({QUANTITIES})/.+|optimizer_share|weight_bits)")


def matching(tags: Iterable[str], pattern: str) -> list[str]:
    """Return the tags that a pattern matches as a whole, each once, in their order."""
    return [tag for tag in dict.fromkeys(tags) if re.fullmatch(pattern, tag)]


def logger_prefix(tags: Iterable[str]) -> str:
    """Return what a logger's ``prefix`` put before the tags, with its hyphen; empty if there is none.

    It is what stands before most of the monitors' tags, because a tag may look by chance as if it had one.
    """
    before = Counter(found["prefix"] for tag in tags if (found := _OF_A_MONITOR.fullmatch(tag)))
    return max(before, key=lambda prefix: (before[prefix], len(prefix)), default="")
