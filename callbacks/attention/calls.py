"""The calls of attention in a forward pass, each with the module that made it."""

import functools
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_muon.callbacks.measures.output_rms import compiled_names, named_layers

SUPPORTED = (
    "modules that call torch.nn.functional.scaled_dot_product_attention, nn.MultiheadAttention, and models of"
    " transformers with attn_implementation 'sdpa' or 'eager'"
)

# In the files of models of transformers; its arguments begin with module, query, key, value, attention_mask.
_EAGER = "eager_attention_forward"


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call of attention.

    Either queries and keys are known, or the logits as they go into the softmax.
    """

    query: Tensor | None = None  # (…, heads, queries, features), or of one head (batch, queries, features)
    key: Tensor | None = None  # (…, key_heads, keys, features)
    mask: Tensor | None = None  # broadcasts to (…, heads, queries, keys): true where a key is seen, or what is added
    is_causal: bool = False  # a query sees the keys up to its own place
    scale: float | None = None  # default: 1/√features
    softcap: float | None = None  # c·tanh(logits/c)
    logits: Tensor | None = None  # (batch, heads, queries, keys), masked


See = Callable[[str, nn.Module, AttentionCall], None]


class AttentionCalls:
    """Report each call of attention in the forward passes between :meth:`start` and :meth:`stop`.

    It is reported with the name and the innermost module that made it, before the call is computed. Outside of forward
    passes of modules, nothing is replaced. Hooks in what ``torch.compile`` has compiled do not run, and functions that
    were replaced would be compiled again: modules in it, and around it, are left out.

    Args:
        module: The module whose parts attend.
        see: What to call with each. It runs in the forward pass, without gradient and without autocast.
    """

    def __init__(self, module: LightningModule, see: See) -> None:
        self.see = see
        layers = dict(named_layers(module))
        self.compiled = compiled_names(module)
        around = {name[:end] for name in self.compiled for end, letter in enumerate(name) if letter == "."}
        self.modules = {
            name: layer
            for name, layer in layers.items()
            if name not in self.compiled and name not in around and _may_attend(layer)
        }
        self.replaced = list(_functions_in_files({type(layer) for layer in self.modules.values()}))
        self._handles: list[RemovableHandle] = []
        self._inside: list[tuple[str, nn.Module]] = []

    def start(self, names: Collection[str] | None = None) -> None:
        """Register the hooks, unless they are registered; of all modules, or of some alone."""
        if not self._handles:
            for name in self.modules if names is None else names:
                module = self.modules[name]
                self._handles.append(module.register_forward_pre_hook(self._entering(name)))
                self._handles.append(module.register_forward_hook(self._leaving, always_call=True))

    def stop(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()
        if self._inside:
            self._inside.clear()
            _remove(self)

    @torch.no_grad()
    def report(self, call: AttentionCall) -> None:
        """Report a call to the listener."""
        name, module = self._inside[-1]
        tensor = call.query if call.query is not None else call.logits
        if tensor is not None and not tensor.is_nested:
            with torch.autocast(tensor.device.type, enabled=False):
                self.see(name, module, call)

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, _inputs: Any) -> None:
            if not self._inside:
                _add(self)
            self._inside.append((name, module))

        return enter

    def _leaving(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        if self._inside:
            self._inside.pop()
            if not self._inside:
                _remove(self)


def looks_like_attention(module: nn.Module) -> bool:
    """Return whether the class of a module says that it attends."""
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _may_attend(module: nn.Module) -> bool:
    """Return whether a module may call attention: layers of torch do not, except its own attention."""
    own = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, nn.MultiheadAttention)
    return not own


# Several listeners share one replacement: they enter and leave a module in the same order, so if each undid its own,
# the first one's would stay.
_listeners: list[AttentionCalls] = []
_originals: list[tuple[dict[str, Any], str, Any]] = []
_heads_of_multihead: list[int] = []  # of torch's multi-head attention that is running


def _add(listener: AttentionCalls) -> None:
    _listeners.append(listener)
    if len(_listeners) == 1:
        names = ("scaled_dot_product_attention", "multi_head_attention_forward", "softmax")
        for name, wrap in zip(names, (_watch_sdpa, _watch_multihead, _watch_softmax), strict=True):
            _replace(vars(F), name, wrap)
    for namespace, name in listener.replaced:
        if not hasattr(namespace[name], "_watched"):
            _replace(namespace, name, _watch_eager if name == _EAGER else _watch_sdpa)


def _remove(listener: AttentionCalls) -> None:
    _listeners.remove(listener)
    if not _listeners:
        while _originals:
            namespace, name, original = _originals.pop()
            namespace[name] = original
        _heads_of_multihead.clear()


def _replace(namespace: dict[str, Any], name: str, wrap: Callable[[Any], Any]) -> None:
    original = namespace[name]
    _originals.append((namespace, name, original))
    replacement = wrap(original)
    replacement._watched = True
    namespace[name] = replacement


def _report(call: AttentionCall) -> None:
    for listener in _listeners:
        listener.report(call)


def _watch_sdpa(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_of(
        query: Tensor,
        key: Tensor,
        value: Tensor,  # noqa: ARG001 - as callers name it
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG001
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> AttentionCall:
        return AttentionCall(query, key, attn_mask, is_causal, scale)

    @functools.wraps(original)
    def attend(*arguments: Any, **options: Any) -> Any:
        _report(call_of(*arguments, **options))
        return original(*arguments, **options)

    return attend


def _watch_eager(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_of(
        _module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,  # noqa: ARG001 - as callers name it
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> AttentionCall:
        mask = position_bias if attention_mask is None else attention_mask
        if position_bias is not None and attention_mask is not None:
            mask = attention_mask + position_bias
        return AttentionCall(query, key, mask, scale=scaling, softcap=softcap)

    @functools.wraps(original)
    def attend(*arguments: Any, **options: Any) -> Any:
        # After five arguments their order differs between models, which pass them by name.
        _report(call_of(*arguments[:5], **options))
        return original(*arguments, **options)

    return attend


def _watch_multihead(original: Callable[..., Any]) -> Callable[..., Any]:
    """With ``need_weights`` the function multiplies queries and keys itself: its softmax is watched."""

    @functools.wraps(original)
    def attend(*arguments: Any, **options: Any) -> Any:
        _heads_of_multihead.append(options["num_heads"] if "num_heads" in options else arguments[4])
        try:
            return original(*arguments, **options)
        finally:
            _heads_of_multihead.pop()

    return attend


def _watch_softmax(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def softmax(input: Tensor, *arguments: Any, **options: Any) -> Any:  # as callers name it
        if _heads_of_multihead and input.ndim == 3:  # (batch · heads, queries, keys)
            _report(AttentionCall(logits=input.unflatten(0, (-1, _heads_of_multihead[-1]))))
        return original(input, *arguments, **options)

    return softmax


def _functions_in_files(classes: set[type]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the functions that attend which the files of some classes have under names of their own."""
    for file in {kind.__module__ for kind in classes} & sys.modules.keys():
        namespace = vars(sys.modules[file])
        for name, value in namespace.items():
            if value is F.scaled_dot_product_attention or (name == _EAGER and callable(value)):
                yield namespace, name
