"""Values of settings that Lightning and torch take without a check, to fail later or to train wrongly."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from lightning_muon.cli.given import Given, place_of, plain_key, value_of
from lightning_muon.cli.layers import flatten

# The least value of settings of the trainer that Lightning does not check, or after what follows them.
_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "min_epochs": 0,
    "min_steps": 0,
    "num_sanity_val_steps": -1,
}
# Lengths of torch's schedulers, in steps or epochs: they divide by them.
_LENGTHS = {"T_0", "T_max", "T_mult", "step_size", "step_size_down", "step_size_up", "total_iters", "total_steps"}
_LARGEST_SEED = 2**32 - 1  # NumPy's


def check_settings(config: Mapping[str, Any], given: Sequence[Given]) -> None:
    """Refuse values that are out of range.

    Args:
        config: The configuration of a subcommand as plain values: nested dicts and lists.
        given: What the user gave, for the file of a wrong value.

    Raises:
        ValueError: For the first such value, with its key and its range.
    """
    for key, problem in _problems(config):
        raise ValueError(f"{key} {problem}{place_of(key, given)}")


def check_lengths(config: Mapping[str, Any], given: Sequence[Given]) -> None:
    """Refuse lengths, such as a schedule's, that follow ``trainer.max_steps`` where that is -1, for no limit.

    Args:
        config: The configuration of a subcommand as plain values.
        given: What the user gave.

    Raises:
        ValueError: For the first such length.
    """
    if config["trainer"]["max_steps"] != -1:
        return
    for key, value in flatten({"model": config["model"]}):
        name = plain_key(key)
        if value == -1 and "trainer.max_steps" in str(value_of(given, name)):
            raise ValueError(
                f"{name} follows trainer.max_steps, which is -1, for no limit: give --{name}, or --trainer.max_steps"
            )


def _problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    seed = config.get("seed_everything")
    if _is_number(seed) and not 0 <= seed <= _LARGEST_SEED:
        yield "seed_everything", f"must be from 0 to {_LARGEST_SEED}, got {seed}"
    trainer = config.get("trainer") or {}
    for name, value in trainer.items():
        least = _LEAST.get(name)
        if least is not None and _is_number(value) and value < least:
            yield f"trainer.{name}", f"must be at least {least}, got {value}"
        if name == "val_check_interval" and value == 0 and _is_number(value):
            yield f"trainer.{name}", "must be over 0, got 0; --trainer.limit_val_batches 0 turns validation off"
        if isinstance(value, float) and not math.isfinite(value):
            yield f"trainer.{name}", f"must be a finite number, got {value}"
    nested = {"trainer": {"callbacks": trainer.get("callbacks")}, "model": config.get("model")}
    for key, value in flatten(nested):
        if _is_number(value) and (problem := _problem_of_class(plain_key(key), value, trainer.get("max_steps"))):
            yield plain_key(key), f"must be {problem}, got {value}"


def _problem_of_class(key: str, value: float, max_steps: int | None) -> str | None:
    """Return what an argument of a callback, an optimizer or a schedule must be, if it is not."""
    of_schedule = ".lr_scheduler." in key
    if (of_schedule or ".optimizer." in key) and not math.isfinite(value):
        return "a finite number"
    if key.startswith("trainer.") and math.isnan(value):
        return "a number"
    # In a run without steps, a length that follows max_steps is 0.
    if of_schedule and key.rpartition(".")[2] in _LENGTHS and value < 1 and not value == max_steps == 0:
        return "at least 1"
    return "at least 0" if key == "trainer.callbacks.patience" and value < 0 else None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
