"""Parameter groups as version 0.1 made them, before each role had a group of its own."""

from collections.abc import Sequence
from typing import Any

ENTRIES = ("params", "param_names", "reasons", "layouts", "shardings")


def earlier_groups(groups: Sequence[dict[str, Any]], *, backwards: bool = False) -> list[dict[str, Any]]:
    """Merge groups of ``route_parameters`` into ``muon``, ``adamw`` and ``adamw_vectors``.

    With ``backwards``, the groups and the parameters in them are in the opposite order.
    """
    merged: dict[str, dict[str, Any]] = {}
    for group in groups[:: -1 if backwards else 1]:
        name = "adamw_vectors" if group["role"] == "vector" else group["algorithm"]
        own = {key: value for key, value in group.items() if key not in {*ENTRIES, "role"}}
        into = merged.setdefault(name, {**own, "name": name})
        for key in ENTRIES:
            if key in group:
                into[key] = [*into.get(key, ()), *group[key][:: -1 if backwards else 1]]
    return list(merged.values())
