"""Whether a checkpoint suits the run that is to go on from it."""

import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from lightning_muon.cli.nearest import listed
from lightning_muon.cli.resume import ModuleArguments, differences

# In the words of torch, and in those of FSDP2Strategy.
_OTHER_SHAPE = (
    re.compile(
        r"size mismatch for (\S+): copying a param with shape torch.Size\(\[([\d, ]*)\]\) from checkpoint,"
        r" the shape in current model is torch.Size\(\[([\d, ]*)\]\)"
    ),
    re.compile(r"(\S+) has the shape \(([\d, ]*)\) in the checkpoint and \(([\d, ]*)\) in the model"),
)
_OTHER_NAMES = (
    (re.compile(r"Missing key\(s\) in state_dict: (.*)"), "only in the model"),
    (re.compile(r"Unexpected key\(s\) in state_dict: (.*)"), "only in the checkpoint"),
)


def check_goes_on(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    """Refuse to train from a checkpoint with which nothing is left to do.

    Args:
        checkpoint: Its progress is read; the weights may be missing.
        trainer: As it is before the checkpoint is restored.

    Raises:
        ValueError: If ``max_steps`` or ``max_epochs`` was reached when the checkpoint was saved.
    """
    steps, epochs = checkpoint.get("global_step", 0), _epochs_done(checkpoint)
    if trainer.max_steps != -1 and steps >= trainer.max_steps:
        reached, limit = f"at step {steps}", "max_steps"
    elif trainer.max_epochs not in {None, -1} and epochs >= (trainer.max_epochs or 0):
        reached, limit = f"through {epochs} epochs", "max_epochs"
    else:
        return
    remedy = (
        "leave --trainer.fast_dev_run out" if getattr(trainer, "fast_dev_run", False) else f"raise --trainer.{limit}"
    )
    raise ValueError(f"--ckpt_path: the checkpoint is already {reached}: {remedy}")


def _epochs_done(checkpoint: Mapping[str, Any]) -> int:
    """How many epochs need no more training, also where the last one still lacks its end."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs = loop.get("epoch_progress", {}).get("current", {})
    batches = loop.get("epoch_loop.batch_progress", {})
    seen = batches.get("current", {})
    # `processed` counts a batch or an epoch before its last hooks, in which checkpoints are saved.
    complete = batches.get("is_last_batch") and seen["processed"] == seen["ready"]
    done: int = epochs.get("ready" if complete else "processed", 0)
    return done


def explain_other_weights(
    message: str, module_name: str, saved: ModuleArguments | None, used: ModuleArguments
) -> str | None:
    """One line in place of a list of all parameters that differ between a checkpoint and the module.

    Args:
        message: What was raised.
        module_name: The class of the module that the checkpoint was loaded into.
        saved: The arguments of the checkpoint's module, if they are known.
        used: The arguments of the module.

    Returns:
        ``None`` if the message is about something else.
    """
    if f"loading state_dict for {module_name}:" not in message and "of another model than" not in message:
        return None
    found = [match for pattern in _OTHER_SHAPE for match in pattern.findall(message)]
    parts = [f"{name} is {_size(there)} there and {_size(here)} here" for name, there, here in found]
    for pattern, where in _OTHER_NAMES:
        names = re.findall(r'"([^"]+)"', (pattern.findall(message) or [""])[0])
        parts += [f"{name} is {where}" for name in names]
    parts += re.findall(r"\S+ is (?:not in the checkpoint|in the checkpoint only)", message)
    if not parts:
        return None
    more = f", and {len(parts) - 2} more" if len(parts) > 2 else ""
    return f"--ckpt_path: it is of another module: {', '.join(parts[:2])}{more}{_different_arguments(saved, used)}"


def _size(numbers: str) -> str:
    return "×".join(number.strip() for number in numbers.split(",") if number.strip()) or "a single number"


def _different_arguments(saved: ModuleArguments | None, used: ModuleArguments) -> str:
    """The arguments that may be why, which those of optimizer and schedule are not."""
    if saved is None or saved.class_path != used.class_path:
        return ""
    shared = used.arguments.keys() & saved.arguments.keys() - {"optimizer", "lr_scheduler"}
    mine = {key: used.arguments[key] for key in used.arguments if key in shared}
    changes = differences({key: saved.arguments[key] for key in mine}, mine)
    return listed(
        "; of its arguments differ:", (f"model.{key} ({old} there, {new} here)" for key, old, new in changes), 4
    )
