"""The parameters of adapters: what is trained beside a model whose own weights are frozen.

AdamW updates them, as in the papers of the methods and in peft: LoRA, arXiv:2106.09685, and LoRA+, arXiv:2402.12354,
for which the factor B takes a higher rate than A. Muon on the factors is recent: Qu et al. (2026), arXiv:2605.10468,
find it as good or better; Cesista et al. (2026), arXiv:2606.12921, that the best rate then depends on the rank and on
the scales of the factors. One rule chooses it, ``Rule("*.lora_[AB].*", "muon")``, and the roles say where the matrices
are.
"""

import re
from dataclasses import replace

from torch import nn

from lightning_muon.optim.routing.fused_weights import fused
from lightning_muon.optim.routing.heads import first_number
from lightning_muon.optim.routing.place import Place, is_vector
from lightning_muon.optim.routing.roles import Confidence, Role, vector
from lightning_muon.optim.update.matrix_layout import MatrixLayout

# The names without peft: https://github.com/microsoft/LoRA (A, B), https://github.com/kohya-ss/sd-scripts and diffusers
# (down, up), torchtune (a, b).
_LORA_NAME = re.compile(r"^lora_(a|b|down|mid|up)$", re.IGNORECASE)
# What peft trains as it is: copies of modules, among them a new head.
_COPIES = frozenset({"modules_to_save", "original_module"})
_INPUT_FACTORS = frozenset({"lora_A", "lora_a", "lora_down"})
_OUTPUT_FACTORS = frozenset({"lora_B", "lora_b", "lora_up"})


def adapter_role(place: Place) -> Role | None:
    """Return the role of a parameter of an adapter, ``None`` for others."""
    confidence: Confidence = "known"
    found = _in_peft(place)
    if found is None:
        confidence, found = "by name", _by_name(place)
    if found is None:
        return None
    name, tuner = found
    if is_vector(place.parameter):
        return vector(f"vector of an adapter, {name}", confidence)
    if name == "trainable_tokens_delta":
        return Role("embedding", "adamw", "rows of an embedding, which an adapter trains", confidence=confidence)
    layout, said = _layout(name, tuner, place)
    reason = f"adapter, {name}{said}"
    return Role("adapter", "adamw", reason, layout, confidence=confidence)


def _in_peft(place: Place) -> tuple[str, Place | None] | None:
    """Return the name of what a layer of peft trains beside its base layer, and the place of that layer.

    Each class of such layers lists these names: ``adapter_layer_names``. A model of peft keeps the prompts that it
    learns in ``prompt_encoder``.
    """
    for depth, (name, module) in enumerate(place.steps()):
        names = getattr(module, "adapter_layer_names", ())
        if name not in _COPIES and isinstance(names, tuple | list) and name in names:
            path = ".".join(reversed(place.names[depth:]))
            return name, replace(place, owner=module, path=path, name="weight", around=place.around[depth:])
        if name == "prompt_encoder" and hasattr(module, "peft_config"):
            return "learned prompts", None
    return None


def _by_name(place: Place) -> tuple[str, None] | None:
    for name in [place.name, *place.names[:2]]:  # a parameter, a layer, or a layer in a dictionary
        if _LORA_NAME.search(name):
            return name, None
    return None


def _layout(name: str, tuner: Place | None, place: Place) -> tuple[MatrixLayout, str]:
    """Return where the matrices of a factor are, for a rule that sends it to Muon, and what to say of it."""
    if tuner is None or place.parameter.ndim != 2:
        return MatrixLayout(), ""
    experts = first_number([tuner.owner], "num_experts") or 1
    fan_out, rank = place.parameter.shape
    if experts > 1 and name in _INPUT_FACTORS and fan_out % experts == 0:
        return MatrixLayout(blocks=experts), f" of {experts} experts"
    if experts > 1 and name in _OUTPUT_FACTORS and rank % experts == 0:
        # peft reads it as (out, rank, experts)
        layout = MatrixLayout(blocks=experts, interleaved=rank // experts, along_inputs=True)
        return layout, f" of {experts} experts"
    base = getattr(tuner.owner, "base_layer", None)
    if name not in _OUTPUT_FACTORS:
        return MatrixLayout(), ""
    if isinstance(base, nn.MultiheadAttention) and fan_out == 3 * base.embed_dim:
        return MatrixLayout(blocks=3), ", 3 fused blocks"
    inputs = first_number([tuner.owner], "in_features") or 0
    blocks = fused(tuner, fan_out, inputs)  # the outputs are those of the base layer
    if blocks is None or blocks.layout == MatrixLayout():
        return MatrixLayout(), ""
    return blocks.layout, f", {blocks.said or f'{blocks.layout.blocks} fused blocks'}"
