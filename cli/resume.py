"""The module's arguments, with a checkpoint: the command line wins, the checkpoint fills in the rest, and says so.

Lightning lets the checkpoint's hyperparameters replace the arguments, whatever was asked for, and in silence.
"""

import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_muon.cli.nearest import nearest_path
from lightning_muon.cli.sources import INTERPOLATION, Given, plain_key

_TRAINER_FINDS = {"last", "best", "hpc"}


@rank_zero_only
def say(line: str) -> None:
    """Tells the user something, once for all ranks."""
    sys.stderr.write(f"{line}\n")


@dataclass(frozen=True)
class ModuleArguments:
    """What a module is made with: the class, where it is chosen by the configuration, and its arguments."""

    class_path: str | None
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointHyperparameters(ModuleArguments):
    """The arguments of the module that a checkpoint was saved from, as ``save_hyperparameters()`` put them there."""

    @classmethod
    def of(cls, ckpt_path: str | Path | None) -> "CheckpointHyperparameters | None":
        """Reads them from a checkpoint file, or from a sharded checkpoint's directory.

        Returns:
            ``None`` if there is no checkpoint, if it holds no hyperparameters, or if only the trainer will know which
            one it is (``last``, ``best``, a URL).

        Raises:
            FileNotFoundError: If there is nothing at the path.
            ValueError: If what is there is no checkpoint.
        """
        if ckpt_path is None or str(ckpt_path) in _TRAINER_FINDS or ":" in str(ckpt_path)[2:]:
            return None
        path = Path(ckpt_path)
        if not path.exists():
            raise FileNotFoundError(f"--ckpt_path: '{ckpt_path}' does not exist{nearest_path(path, '*.ckpt')}")
        checkpoint = read_plain_values(path)
        if checkpoint is None:
            say(f"'{ckpt_path}' holds more than plain values: its hyperparameters are not compared")
            return None
        saved = checkpoint.get("hyper_parameters")
        return cls.from_saved(saved) if saved else None

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> "CheckpointHyperparameters":
        """Reads the form in which Lightning saves them, the class among the arguments."""
        arguments = {key: value for key, value in saved.items() if key not in {"_instantiator", "_class_path"}}
        return cls(saved.get("_class_path"), arguments)

    def as_layer(self, current: ModuleArguments, given: Sequence[Given]) -> str | None:
        """A config in YAML that lies above the defaults and below what the user asked for.

        Left out are arguments that the module does not take (any more), and values that follow, by interpolation, a key
        that the user asked for: with ``T_max: ${trainer.max_steps}``, a new ``--trainer.max_steps`` is a new ``T_max``.

        Returns:
            ``None`` if the checkpoint is of another class of module, whose arguments say nothing about this one.
        """
        if self.class_path != current.class_path:
            return None
        follows = _following_keys(given)
        arguments = {
            key: _without(value, f"model.{key}", follows)
            for key, value in self.arguments.items()
            if key in current.arguments and f"model.{key}" not in follows and _is_plain(value)
        }
        model = {"class_path": self.class_path, "init_args": arguments} if self.class_path else arguments
        layer: str = yaml.safe_dump({"model": plain(model)}, default_flow_style=True, width=sys.maxsize)
        return layer

    def report(self, without: ModuleArguments, used: ModuleArguments) -> None:
        """Prints one line for each argument that differs from the checkpoint, and one for what comes from it.

        The arguments of the learning-rate scheduler are left to
        :class:`~lightning_muon.cli.optimizer_resume.KeepCommandLineOnResume`, which knows what becomes of them.

        Args:
            without: The module's arguments as they would be without the checkpoint.
            used: The module's arguments as they are.
        """
        if self.class_path != used.class_path:
            say(f"model: {self.class_path or 'another class'} in the checkpoint, {used.class_path} used")
            return
        known = {key: self.arguments[key] for key in used.arguments if key in self.arguments and key != "lr_scheduler"}
        for key, old, new in differences(known, {key: used.arguments[key] for key in known}):
            say(f"model.{key}: {old} in the checkpoint, {new} used")
        taken = [f"model.{key}={new}" for key, _, new in differences(without.arguments, used.arguments)]
        if taken:
            say(f"from the checkpoint: {', '.join(taken)}")


def read_plain_values(path: Path) -> dict[str, Any] | None:
    """Reads what a checkpoint file, or a sharded checkpoint's directory, holds besides weights.

    Returns:
        ``None`` if that is more than plain values.

    Raises:
        ValueError: If what is there is no checkpoint.
    """
    file = path / "meta.pt" if path.is_dir() else path
    if not zipfile.is_zipfile(file):
        raise ValueError(f"--ckpt_path: '{path}' is not a checkpoint")
    try:
        # Memory-mapped, because the weights are not read here.
        checkpoint: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except UnpicklingError:
        return None
    return checkpoint


def differences(old: object, new: object, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields ``(key, old, new)`` for each value that differs; two different classes are one difference."""
    old, new = plain(old), plain(new)
    if isinstance(old, dict) and isinstance(new, dict):
        if old.get("class_path") != new.get("class_path"):
            yield key, old.get("class_path"), new.get("class_path")
            return
        for name in dict.fromkeys([*old, *new]):
            yield from differences(old.get(name), new.get(name), plain_key(f"{key}.{name}" if key else str(name)))
    elif old != new:
        yield key, _class_or_value(old), _class_or_value(new)


def _class_or_value(value: object) -> object:
    return value["class_path"] if isinstance(value, dict) and "class_path" in value else value


def plain(value: object) -> Any:
    """Tuples as lists, because YAML knows no tuples."""
    if isinstance(value, Mapping):
        return {key: plain(child) for key, child in value.items()}
    return [plain(child) for child in value] if isinstance(value, (list, tuple)) else value


def _is_plain(value: object) -> bool:
    try:
        yaml.safe_dump(plain(value))
    except yaml.YAMLError:
        return False
    return True


def _following_keys(given: Sequence[Given]) -> set[str]:
    """The keys whose value follows what the user asked for, or the settings of this run, by interpolation.

    A module's argument that follows another one of the module's comes from the checkpoint with it, unless the user
    asked for that one. Whatever follows another key, such as ``trainer.max_steps``, follows this run's.
    """
    written = {entry.key: entry.value for entry in given}
    moved = {entry.key for entry in given if entry.asked}
    follows: set[str] = set()
    while True:
        further = {
            key
            for key, value in written.items()
            if key not in follows and any(_is_moved(target, moved) for target in INTERPOLATION.findall(str(value)))
        }
        if not further:
            return follows
        follows |= further
        moved |= further


def _is_moved(target: str, moved: set[str]) -> bool:
    return plain_key(target) in moved or not target.startswith("model.")


def _without(node: object, prefix: str, keys: set[str]) -> object:
    if not isinstance(node, Mapping):
        return node
    paths = {name: plain_key(f"{prefix}.{name}") for name in node}
    return {name: _without(child, paths[name], keys) for name, child in node.items() if paths[name] not in keys}
