"""Values from the environment, ``${oc.env:…}``: the run uses them, and its files keep the text that asks for them."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lightning_muon.cli.given import INTERPOLATION, Given, plain_key
from lightning_muon.cli.layers import flatten

_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?(\w+)")


class Secrets:
    """Which values come from the environment, by their keys.

    Args:
        given: What the user gave.
        saved: The module's arguments in the checkpoint, which lie above the defaults and below what was asked for.

    Attributes:
        written: What was written, such as ``${oc.env:TOKEN}``, by its key in the form of
            :func:`~lightning_muon.cli.given.plain_key`. What leads to such a key, as ``${data.token}``, counts too.
    """

    def __init__(self, given: Sequence[Given] = (), saved: Mapping[str, Any] | None = None) -> None:
        of_checkpoint = [
            Given(plain_key(key), value, None, asked=False) for key, value in flatten(saved or {}, "model")
        ]
        asked = [entry for entry in given if entry.asked]
        in_order = [*(entry for entry in given if not entry.asked), *of_checkpoint, *asked]
        last = {key: value for entry in in_order for key, value in _leaves(entry)}
        texts = {key: value for key, value in last.items() if isinstance(value, str) and "${" in value}
        self.written = {key: text for key, text in texts.items() if _VARIABLE.search(text)}
        names = {name for text in self.written.values() for name in _VARIABLE.findall(text)}
        self._values = {value for value in map(os.environ.get, names) if value}
        while further := {key: text for key, text in texts.items() if key not in self.written and self._leads(text)}:
            self.written |= further

    def masked(self, tree: Any, prefix: str = "", *, only_texts: bool = False) -> Any:
        """Return nested dicts and lists with what was written in place of the values.

        Args:
            tree: The values; it is not changed.
            prefix: The key of the tree.
            only_texts: Leave numbers as they are.
        """
        if not self.written:
            return tree
        counts = Counter(plain_key(key) for key, _ in flatten(tree, prefix))
        return self._masked(tree, prefix, counts, only_texts)

    def _masked(self, node: Any, key: str, counts: Mapping[str, int], only_texts: bool) -> Any:
        if isinstance(node, Mapping):
            return {
                name: self._masked(child, f"{key}.{name}" if key else str(name), counts, only_texts)
                for name, child in node.items()
            }
        if isinstance(node, (list, tuple)):
            return [self._masked(child, f"{key}.{number}", counts, only_texts) for number, child in enumerate(node)]
        name = plain_key(key)
        if name not in self.written or (only_texts and not isinstance(node, str)):
            return node
        # The entries of a list share a key: there, only what holds the value is meant.
        is_meant = counts[name] == 1 or any(value in str(node) for value in self._values)
        return self.written[name] if is_meant else node

    def _leads(self, text: str) -> bool:
        return any(plain_key(target) in self.written for target in INTERPOLATION.findall(text))


def _leaves(entry: Given) -> Sequence[tuple[str, object]]:
    """Return the values in what was given for a key: on the command line a list or dict is one text."""
    if isinstance(entry.value, str) and entry.value.lstrip()[:1] in {"[", "{"}:
        try:
            return [(plain_key(key), value) for key, value in flatten(yaml.safe_load(entry.value), entry.key)]
        except yaml.YAMLError:
            pass
    return [(entry.key, entry.value)]
