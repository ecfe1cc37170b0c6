"""Refuse a checkpoint that does not suit the run: by its kind, its progress or its weights."""

import re

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_muon.cli.errors.suggestions import listed
from lightning_muon.cli.output import program_name
from lightning_muon.cli.resume.plan import ResumePlan, SavedRun

# As torch writes it, and as FSDP2Strategy does.
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


def check_checkpoint(plan: ResumePlan, trainer: Trainer, *, fitting: bool) -> None:
    """Refuse a checkpoint that the strategy cannot read, or from which it would train wrongly.

    This runs before the trainer starts, which would make the folder of the run first. What only the trainer finds, such
    as ``last``, is checked when it is loaded.

    Args:
        plan: With the path of the checkpoint, if it is known.
        trainer: The trainer, before the checkpoint is restored.
        fitting: Whether training goes on from the checkpoint.

    Raises:
        ValueError: If nothing is left to train, or the strategy and the kind of checkpoint do not go together.
    """
    if plan.path is None:
        return
    if fitting and plan.saved:
        check_progress(plan.saved, trainer)
    if fitting:
        from lightning_muon.strategies import clear_leftovers  # noqa: PLC0415 - runs without a checkpoint start faster

        clear_leftovers(plan.path.parent)
    if fitting and isinstance(trainer.strategy, FSDPStrategy):
        from lightning_muon.strategies import check_resumable  # noqa: PLC0415 - only sharded runs need it

        check_resumable(plan.path)
    if plan.path.is_dir() and not isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
        raise ValueError(
            f"--ckpt_path: '{plan.path}' is a sharded checkpoint: add --trainer.strategy fsdp2, or make a file of it by"
            f" '{program_name()} consolidate {plan.path} <file>'"
        )


def check_progress(saved: SavedRun, trainer: Trainer) -> None:
    """Refuse to train from a checkpoint that has already reached ``max_steps`` or ``max_epochs``.

    Raises:
        ValueError: With the limit that must be raised.
    """
    if trainer.max_steps != -1 and saved.steps >= trainer.max_steps:
        reached, limit = f"at step {saved.steps}", "max_steps"
    elif trainer.max_epochs not in {None, -1} and saved.epochs >= (trainer.max_epochs or 0):
        reached, limit = f"through {saved.epochs} epochs", "max_epochs"
    else:
        return
    fast = getattr(trainer, "fast_dev_run", False)
    remedy = "leave --trainer.fast_dev_run out" if fast else f"raise --trainer.{limit}"
    raise ValueError(f"--ckpt_path: the checkpoint is already {reached}: {remedy}")


def explain_other_weights(message: str, module_name: str, plan: ResumePlan) -> str | None:
    """Return one line for an error that lists all parameters that differ between a checkpoint and the module.

    Args:
        message: The error's message.
        module_name: The class of the module that the checkpoint was loaded into.
        plan: With the module's arguments in the checkpoint and in this run, which may explain the difference.

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
    # Arguments of optimizer and schedule do not change the weights.
    changes = plan.argument_changes({"optimizer", "lr_scheduler"})
    why = (f"model.{key} ({old} there, {new} here)" for key, (old, new) in changes)
    different = listed("; of its arguments differ:", why, most=4)
    saved = plan.saved_module
    if saved and saved.class_path and saved.class_path != plan.used.class_path:
        different = f"; it is of --model {saved.class_path}"
    return f"--ckpt_path: it is of another module: {', '.join(parts[:2])}{more}{different}"


def _size(numbers: str) -> str:
    return "×".join(number.strip() for number in numbers.split(",") if number.strip()) or "a single number"
