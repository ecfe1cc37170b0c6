"""What attention modules say of their heads, by themselves and by their configuration."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

# The names in transformers, timm, diffusers, torch, GPT-2 and Llama code, of attributes and of entries of `config`.
_QUERIES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nheads", "num_q_heads")
_KEYS = (
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "num_k_heads"),
    *("n_local_heads", "n_query_groups", "num_query_groups"),
)
_SIZES = (
    "qk_head_dim",
    "head_dim",
    "head_size",
    "attention_head_size",
    "key_value_proj_dim",
    "d_kv",
    "dim_head",
    "d_head",
)
_VALUE_SIZES = ("v_head_dim",)
OUTPUT_PROJECTIONS = frozenset({"proj", "out_proj", "o_proj", "c_proj", "to_out", "wo", "out", "dense", "o"})


@dataclass(frozen=True)
class Heads:
    """The heads of an attention module.

    Args:
        queries: Number of heads.
        keys: Number of heads of keys, and of values, which groups of query heads share.
        size: Rows of a query's or key's head; ``None`` if nothing says it.
        value_size: Rows of a value's head, where they differ.
    """

    queries: int
    keys: int
    size: int | None = None
    value_size: int | None = None

    @property
    def fused(self) -> tuple[int, int, int]:
        """Numbers of heads in a fused projection of query, key and value."""
        return self.queries, self.keys, self.keys

    def rows(self, count: int, fan_out: int, width: int) -> int | None:
        """Return the rows of a head if ``count`` of them are all the outputs of a projection, else ``None``.

        The size of a head is what the modules say, or the part of a query's head in the ``width`` of all of them.
        """
        size = self.size or width // self.queries
        return size if size * count == fan_out > 0 else None


def heads_of(modules: Iterable[nn.Module]) -> Heads | None:
    """Return what the first of some modules says that knows a number of heads, each by itself or by its ``config``.

    Modules before it may have said the size of a head.
    """
    seen: list[object] = []
    for module in modules:
        seen += [module, getattr(module, "config", None)]
        queries = _first(seen, _QUERIES)
        if queries is not None:
            keys = _first(seen, _KEYS)
            if keys is None and any(getattr(place, "multi_query", None) is True for place in seen):
                keys = 1
            if keys is None:
                keys = queries // (_first(seen, ("num_key_value_groups",)) or 1)
            fits = 0 < keys <= queries and queries % keys == 0
            return Heads(queries, keys, _first(seen, _SIZES), _first(seen, _VALUE_SIZES)) if fits else None
    return None


def first_number(places: Iterable[object], *names: str) -> int | None:
    """Return the first positive whole number under one of some names."""
    return _first(places, names)


def _first(places: Iterable[object], names: Sequence[str]) -> int | None:
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def width_behind(attention: nn.Module | None) -> int | None:
    """Return the number of inputs of the output projection in a module, which is the width of all query heads."""
    for name, child in attention.named_children() if attention is not None else ():
        if name.lower() in OUTPUT_PROJECTIONS:
            for part in child.modules():  # it may be in a sequence with dropout
                weight = getattr(part, "weight", None)
                if isinstance(weight, Tensor) and weight.ndim >= 2:  # also a convolution
                    return weight.shape[0 if type(part).__name__ == "Conv1D" else 1]
    return None


def listed(numbers: Sequence[int]) -> str:
    """Write numbers as a list in a sentence, such as ``12, 4 and 4``."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
