"""The optimizer step on the parameters of GPT-2 small, in turns with torch's Muon and fused AdamW."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from benchmarks.floor import machine_rates
from benchmarks.gpu.measuring import Measuring
from benchmarks.gpu.subject import MakeOptimizer, fused_adamw, muon_adamw, preset, preset_names, state_dtypes
from benchmarks.optimizer_step import compare, floor_ms, gpt, make_contestant, torch_muon

REFERENCE = "torch Muon + AdamW, fused"
# Presets whose step is that of the default with another number, and AdamW, which is measured as torch's fused one.
ALIKE = {"adamw", "keller_jordan", "moonlight", "mup", "naive"}
# Presets of other optimizers, for comparisons of losses. Shampoo's state of this vocabulary would take 20 GB.
OTHERS = {"adam", "sgd", "shampoo", "soap"}
# Orthogonalizers whose FLOPs are products of bfloat16 matrices alone. Only these have a floor.
IN_BFLOAT16 = {"newton_schulz", "polar_express"}
ROUNDS = 15
SECONDS = 4.0  # of the rounds of one contestant


def measure_steps(measuring: Measuring) -> None:
    """Measure the step of each optimizer, with its floor, its state and its peak memory."""
    build: Callable[[], nn.Module] = partial(gpt, *((32, 1, 64) if measuring.tiny else (768, 12, 50257)))
    device = measuring.device
    rates = machine_rates(device, side=256 if measuring.tiny else None)
    reference = make_contestant(build, device, partial(torch_muon, fused=True))
    reference.prepare()
    reference.step()
    contestants = all_contestants(measuring)
    for name in measuring.each([REFERENCE, *contestants]):
        with measuring.row(name) as row:
            made = reference if name == REFERENCE else make_contestant(build, device, contestants[name])
            row.update(compare(made, reference, device, 2 if measuring.tiny else ROUNDS, SECONDS))
            if has_floor(made.optimizers):
                row["floor ms"] = floor_ms(made, rates)
                row["× floor"] = row["ms"] / row["floor ms"]
            del made


def all_contestants(measuring: Measuring) -> dict[str, Callable[[nn.Module], list[Any]]]:
    """Return the contestants other than the reference, the most important ones first."""
    found: dict[str, MakeOptimizer] = {"torch AdamW, fused": fused_adamw, "MuonAdamW": muon_adamw()}
    names = [name for name in preset_names() if name not in ALIKE | OTHERS]
    names.sort(key=lambda name: name != "fast")
    found.update({name: partial(_from_preset, name) for name in names})
    found.update(state_dtypes())
    if measuring.device == "cuda":
        found["MuonAdamW, compile"] = muon_adamw(compile=True)
    made = {name: partial(_alone, make) for name, make in found.items()}
    return {"torch Muon + AdamW": torch_muon, **made}


def has_floor(optimizers: list[Any]) -> bool:
    """Return whether the matrices are orthogonalized by products of bfloat16 matrices, not compiled."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "orthogonalizer" in group:
                return group["orthogonalizer"] in IN_BFLOAT16 and not group.get("compile", False)
            if "ns_steps" in group:  # torch's Muon
                return True
    return False


def _from_preset(name: str, model: nn.Module) -> Any:
    return preset(name)(model)


def _alone(make: MakeOptimizer, model: nn.Module) -> list[Any]:
    return [make(model)]
