"""Updates that overlap: one computes while another's data is on its way."""

from collections.abc import Iterable, Iterator

# How many updates are under way at a time: one that arrives, one that computes, one that returns.
STAGES = 3


def overlap(updates: Iterable[Iterator[None]]) -> None:
    """Run updates that pause where they have something on its way, each one stage behind the one before it.

    The newest goes first, so that its data travels while the older ones compute. The order of all stages depends on
    nothing but the number of updates: ranks that run the same updates issue the same collectives.

    Args:
        updates: Each pauses at most twice.
    """
    under_way: list[Iterator[None]] = []
    for update in [*updates, *(iter(()) for _ in range(STAGES - 1))]:
        under_way = [update, *under_way[: STAGES - 1]]
        for stage in under_way:
            next(stage, None)
