"""The weights of queries and keys: which rows of which weights make those of each head."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_muon.callbacks.attention.calls import AttentionCall
from lightning_muon.callbacks.attention.logits import by_head, sampled_places
from lightning_muon.optim.sharding.dtensor import dtensor_sharding, is_dtensor, is_sharded_by_rows, local_tensor
from lightning_muon.optim.sharding.wrappers import is_flattened
from lightning_muon.optim.update.state import HALF

# Layers of queries and of keys, and layers of both, by the names that they have in their attention.
SEPARATE = (
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("to_q", "to_k"),
    ("wq", "wk"),
    ("q", "k"),
    ("q_lin", "k_lin"),
    ("query_proj", "key_proj"),
    ("q_b_proj", ""),  # DeepSeek's latent attention, whose keys come from two places
)
PACKED = ("qkv", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "wqkv", "to_qkv", "in_proj", "attn_qkv", "qkv_lin")

# How far the ratio of two norms may vary if they are of the same numbers, rotated.
SAME, SAME_IN_HALF = 1e-3, 2e-2
COMPARED = 256  # queries


class NotClippable(Exception):  # noqa: N818 - not an error: a finding
    """Why the weights of an attention do not say how large its logits are."""


@dataclass
class Part:
    """A parameter with rows of heads.

    Args:
        module: The module that has it.
        name: Its name there.
        heads: The head of each row, or of each place along ``dim``; the number of heads where it belongs to none.
        dim: The dimension along which the heads are.
    """

    module: nn.Module
    name: str
    heads: Tensor
    dim: int = 0
    _local: Tensor | None = field(default=None, repr=False)

    @property
    def parameter(self) -> Tensor:
        """The parameter as it is now: FSDP2 exchanges it for the forward pass."""
        found: Tensor = getattr(self.module, self.name)
        return found

    def check(self) -> None:
        """Raise a NotClippable if its rows cannot be scaled where they are."""
        parameter = self.parameter
        if is_flattened(parameter):
            raise NotClippable("FSDP1 has flattened its weights: take strategy fsdp2")
        if is_dtensor(parameter) and not is_sharded_by_rows(parameter):
            raise NotClippable(f"its {self.name} is placed as {parameter.placements}")
        if not parameter.requires_grad:
            raise NotClippable(f"its {self.name} is frozen")

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Multiply the rows of each head by a factor (heads,). No communication."""
        parameter = self.parameter
        local = local_tensor(parameter)
        if self._local is None:
            self._local = self._own_heads(parameter).to(local.device)
        with_others = torch.cat([factors, factors.new_ones(1)])  # a factor of one leaves the bits as they are
        shape = [-1 if dim == self.dim else 1 for dim in range(local.ndim)]
        local.mul_(with_others[self._local].view(shape).to(local.dtype))

    def _own_heads(self, parameter: Tensor) -> Tensor:
        """Return the heads of the rows that this rank has."""
        sharding = dtensor_sharding(parameter) if is_dtensor(parameter) else None
        if sharding is None or self.dim != 0 or not any(p.is_shard() for p in parameter.placements):  # type: ignore[attr-defined]
            return self.heads
        start, stop = sharding.ranges[dist.get_rank(sharding.group)]
        row = max(1, parameter[:1].numel()) if parameter.ndim > 1 else 1
        return self.heads[start // row : stop // row]


@dataclass
class HeadWeights:
    """The weights that make the queries and keys of an attention.

    Args:
        heads: Number of heads.
        query: Parts that make queries.
        key: Parts that make keys; none where heads share a key.
    """

    heads: int
    query: Sequence[Part]
    key: Sequence[Part]

    def check(self) -> None:
        """Raise a NotClippable if they cannot be scaled where they are."""
        for part in (*self.query, *self.key):
            part.check()

    def scale(self, factors: Tensor) -> None:
        """Multiply the logits of each head by a factor (heads,).

        Query and key are each multiplied by its root, as in Kimi K2 (arXiv:2507.20534, algorithm 1). Where several
        heads share a key, it stays, so that no other head changes, and the query takes the whole factor: so does K2
        with the rotary keys that its heads share.
        """
        for_query = factors.sqrt() if self.key else factors
        for part in self.query:
            part.scale(for_query)
        for part in self.key:
            part.scale(for_query)


class Projections:
    """Find the weights of attentions by comparing what their layers return with the queries and keys of their calls.

    Rotary positions keep norms. A head's queries are a block of a layer's outputs if the ratio of their norms is the
    same for all places. Where it is not, as with QK-norm, no scale of the weights is one of the logits.

    Args:
        modules: The modules that may attend, by name.
        all_modules: All modules, by name.
        names: The names of an attention's layer of queries and that of keys, or the one of both. Default: those that
            are usual.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], all_modules: Mapping[str, nn.Module], names: Sequence[str] = ()
    ) -> None:
        self._layers = {
            name: layers
            for name, module in modules.items()
            # The call may stand in a small module of its own, beside the layers.
            if (layers := _layers(module, names) or _layers(all_modules.get(name.rpartition(".")[0]), names))
        }
        self._outputs: dict[nn.Module, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def start(self) -> None:
        """Remember outputs of the layers."""
        if not self._handles:
            layers = {layer for layers in self._layers.values() for layer in layers if layer is not None}
            self._handles = [layer.register_forward_hook(self._remember) for layer in layers]

    def stop(self) -> None:
        """Forget them."""
        while self._handles:
            self._handles.pop().remove()
        self._outputs.clear()

    def _remember(self, layer: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            self._outputs[layer] = output.detach()

    @torch.no_grad()
    def find(self, name: str, module: nn.Module, call: AttentionCall) -> HeadWeights | None:
        """Return the weights of an attention, in the forward pass that calls it; ``None`` if all queries are zero.

        Raises:
            NotClippable: If its logits do not follow its weights, or these are not found.
        """
        if isinstance(module, nn.MultiheadAttention):
            return _of_multihead(module)
        if call.query is None or call.key is None:
            raise NotClippable("its queries are not seen")
        if name not in self._layers:
            raise NotClippable("its layers of queries and keys are not found: name them by projections")
        query, key = by_head(call.query), by_head(call.key)
        query_layer, key_layer = self._layers[name]
        heads = query.shape[1]
        if not query.any():
            return None
        blocks = self._blocks(query_layer, query)
        if blocks is None or len(set(blocks)) < heads:
            raise NotClippable(
                "its queries are not what its layer returns, but for a rotation, as with QK-norm, which bounds the"
                " logits by itself"
            )
        of_queries = _parts(query_layer, blocks, heads, query.shape[-1])
        of_keys = None if key_layer is None else self._blocks(key_layer, key)
        shared = of_keys is None or len(set(of_keys)) < heads
        keys = (
            [] if shared or key_layer is None or of_keys is None else _parts(key_layer, of_keys, heads, key.shape[-1])
        )
        return HeadWeights(heads, of_queries, keys)

    def _blocks(self, layer: nn.Module, heads: Tensor) -> list[int] | None:
        """Return which block of a layer's outputs each head is; ``None`` if one is none.

        Args:
            layer: The layer.
            heads: Queries or keys, (batch, heads, places, features).
        """
        output = self._outputs.get(layer)
        batch, _, length, features = heads.shape
        if output is None or output.numel() % (batch * length * features):
            return None
        chosen = sampled_places(batch, length, COMPARED, 0)
        blocks = output.reshape(batch, length, -1, features)[chosen].flatten(0, 1)
        found = _norms(heads.transpose(1, 2)[chosen].flatten(0, 1))  # (places, heads)
        ratios = found.unsqueeze(2) / _norms(blocks).unsqueeze(1)  # (places, heads, blocks)
        spread = ratios.amax(0) / ratios.amin(0) - 1
        least, block = spread.nan_to_num(torch.inf).min(1)
        tolerance = SAME_IN_HALF if heads.dtype in HALF or output.dtype in HALF else SAME
        return block.tolist() if bool((least <= tolerance).all()) else None


def _norms(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64)
    return norms


def _layers(attention: nn.Module | None, names: Sequence[str]) -> tuple[nn.Module, nn.Module | None] | None:
    """Return the layer of an attention's queries and that of its keys, which may be the same or not known."""
    if attention is None:
        return None
    pairs = [(names[0], names[-1])] if names else [*SEPARATE, *((name, name) for name in PACKED)]
    inside = dict(attention.named_modules())
    for query, key in pairs:
        if query in inside:
            return inside[query], inside.get(key) if key else None
    return None


def _parts(layer: nn.Module, blocks: Sequence[int], heads: int, features: int) -> list[Part]:
    """Return weight and bias of a layer, given the block of its outputs that each head is.

    Raises:
        NotClippable: If its weight is no parameter of it alone.
    """
    parameters = layer._parameters
    weight = parameters.get("weight")
    kind = type(layer).__name__
    if weight is None or not weight.is_floating_point() or not (isinstance(layer, nn.Linear) or kind == "Conv1D"):
        raise NotClippable(f"its layer is a {kind}, whose outputs do not come from one weight alone")
    is_transposed = not isinstance(layer, nn.Linear)  # Conv1D of transformers: (in, out)
    outputs = layer.nf if is_transposed else layer.out_features
    of_rows = torch.full((int(outputs) // features,), heads)  # type: ignore[arg-type]
    of_rows[list(blocks)] = torch.arange(heads)
    of_rows = of_rows.repeat_interleave(features)
    parts = [Part(layer, "weight", of_rows, int(is_transposed))]
    return [*parts, Part(layer, "bias", of_rows)] if parameters.get("bias") is not None else parts


def _of_multihead(module: nn.MultiheadAttention) -> HeadWeights:
    """Return the weights of torch's own attention, which has no QK-norm."""
    heads, width = module.num_heads, module.embed_dim
    of_width = torch.arange(heads).repeat_interleave(width // heads)
    none = torch.full((width,), heads)

    def packed(place: int) -> Tensor:
        return torch.cat([of_width if place == i else none for i in range(3)])

    def parts(place: int, separate: str) -> Iterator[Part]:
        if module._qkv_same_embed_dim:
            yield Part(module, "in_proj_weight", packed(place))
        else:
            yield Part(module, separate, of_width)
        if module.in_proj_bias is not None:
            yield Part(module, "in_proj_bias", packed(place))

    key = list(parts(1, "k_proj_weight"))
    if module.bias_k is not None:
        key.append(Part(module, "bias_k", of_width, dim=2))
    return HeadWeights(heads, list(parts(0, "q_proj_weight")), key)
