"""What a run takes from its checkpoint, and what from the command line.

Lightning replaces the module's arguments by the checkpoint's hyperparameters, whatever was asked for, and says nothing.
"""

import zipfile
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_muon.cli.added_optimizer import ADDED_HYPERPARAMETERS
from lightning_muon.cli.errors.suggestions import nearest_path
from lightning_muon.cli.given import INTERPOLATION, Given, plain_key
from lightning_muon.cli.layers import Layer
from lightning_muon.cli.output import say
from lightning_muon.cli.resume.reading import check_reachable, is_url, read_checkpoint

_FOUND_BY_THE_TRAINER = {"last", "best", "hpc"}


class Change(NamedTuple):
    """A value in the checkpoint, and the value in this run."""

    old: Any
    new: Any


@dataclass(frozen=True)
class ModuleArguments:
    """The class of a module, if the configuration chooses it, and its arguments as plain values."""

    class_path: str | None
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says about the run that wrote it.

    Attributes:
        module: The module's arguments, from ``save_hyperparameters()``; ``None`` if it was not called.
        steps: Optimizer steps taken.
        epochs: Epochs that are complete, also if only the end of the last one is missing.
    """

    module: ModuleArguments | None
    steps: int
    epochs: int

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "SavedRun":
        """Take the facts from a loaded checkpoint; the weights may be missing."""
        saved = {**checkpoint.get("hyper_parameters", {}), **checkpoint.get(ADDED_HYPERPARAMETERS, {})}
        arguments = {key: value for key, value in saved.items() if key not in {"_instantiator", "_class_path"}}
        module = ModuleArguments(saved.get("_class_path"), arguments) if saved else None
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        batches = loop.get("epoch_loop.batch_progress", {})
        seen = batches.get("current", {})
        # `processed` counts a batch or an epoch before its last hooks, in which checkpoints are saved.
        complete = batches.get("is_last_batch") and seen["processed"] == seen["ready"]
        epochs = loop.get("epoch_progress", {}).get("current", {}).get("ready" if complete else "processed", 0)
        return cls(module, checkpoint.get("global_step", 0), epochs)


@dataclass
class ResumePlan:
    """What a run takes from its checkpoint; shared by the parser, the checks and the callback.

    The facts are added as they become known: ``saved`` before parsing, or where only the trainer finds the checkpoint,
    when it is loaded; ``used`` and ``seed`` after parsing.

    Attributes:
        path: The checkpoint that ``--ckpt_path`` names; ``None`` without one, and for ``last``, ``best`` or a URL.
        saved: What it says about its run, once it is read.
        used: The module's arguments in this run.
        seed: The seed of this run.
    """

    path: Path | None = None
    saved: SavedRun | None = None
    used: ModuleArguments = field(default_factory=lambda: ModuleArguments(None, {}))
    seed: int | bool | None = None

    @classmethod
    def of(cls, ckpt_path: str | None, *, fitting: bool = False, trusted: bool = False) -> "ResumePlan":
        """Read the checkpoint, a file or a sharded checkpoint's folder, without its weights.

        Args:
            ckpt_path: What ``--ckpt_path`` names.
            fitting: Whether training is to go on from it.
            trusted: Whether the user allows it to run code when it is loaded.

        Raises:
            FileNotFoundError: If there is nothing at the path.
            ValueError: If it is not a checkpoint, or damaged, or if it cannot be read.
        """
        if ckpt_path is None or ckpt_path in _FOUND_BY_THE_TRAINER:
            return cls()
        if not ckpt_path:
            raise ValueError("--ckpt_path: a value is missing after it")
        if is_url(ckpt_path):
            check_reachable(ckpt_path)
            return cls()
        path = Path(ckpt_path)
        _check_whole(path)
        if not path.exists():
            raise FileNotFoundError(f"--ckpt_path: '{ckpt_path}' does not exist{nearest_path(path, '*.ckpt')}")
        checkpoint = read_checkpoint(path, fitting=fitting, trusted=trusted)
        if checkpoint is None:
            say(f"'{ckpt_path}' holds more than plain values: its hyperparameters are not compared")
            return cls(path)
        return cls(path, SavedRun.of(checkpoint))

    @property
    def saved_module(self) -> ModuleArguments | None:
        """The arguments of the checkpoint's module, if they are known."""
        return self.saved.module if self.saved else None

    def layer(self, current: ModuleArguments, given: Sequence[Given]) -> Layer | None:
        """Return the checkpoint's arguments as a config, to lie above the defaults and below what was asked for.

        It leaves out arguments that the module does not take, and values that follow a key of this run by
        interpolation: with ``T_max: ${trainer.max_steps}``, a new ``--trainer.max_steps`` gives a new ``T_max``.

        Args:
            current: The module's arguments without the checkpoint.
            given: What the user gave.

        Returns:
            ``None`` if the checkpoint is of another class of module, whose arguments do not apply to this one.
        """
        saved = self.saved_module
        if saved is None or saved.class_path != current.class_path:
            return None
        follows = _following_keys(given)
        arguments = {
            key: _without(value, f"model.{key}", follows)
            for key, value in saved.arguments.items()
            if key in current.arguments and f"model.{key}" not in follows and _is_plain(value)
        }
        return Layer.of({"model": plain(arguments)}) if arguments else None

    def print_differences(self, without: ModuleArguments | None = None) -> None:
        """Print one line for each argument that differs from the checkpoint, and one for what comes from it.

        The learning-rate scheduler's arguments are left to the callback, which decides what becomes of the schedule.

        Args:
            without: The module's arguments without the checkpoint, if it was laid below what was asked for.
        """
        saved, used = self.saved_module, self.used
        if saved is None:
            return
        if saved.class_path != used.class_path:
            say(f"model: {saved.class_path or 'another class'} in the checkpoint, {used.class_path or 'another'} used")
            return
        for key, (old, new) in self.argument_changes({"lr_scheduler"}):
            say(f"model.{key}: {old} in the checkpoint, {new} used")
        changed = differences(without.arguments, used.arguments) if without else ()
        if taken := [f"model.{key}={new}" for key, (_, new) in changed]:
            say(f"from the checkpoint: {', '.join(taken)}")

    def argument_changes(self, without: Container[str]) -> Iterator[tuple[str, Change]]:
        """Yield what differs in the arguments that the checkpoint's module and this run's share, without some of them.

        Modules of two classes share none.
        """
        saved, used = self.saved_module, self.used
        if saved is not None and saved.class_path == used.class_path:
            shared = [key for key in used.arguments if key in saved.arguments and key not in without]
            old, new = ({key: run.arguments[key] for key in shared} for run in (saved, used))
            yield from differences(old, new)

    def class_specs(self, argument: str) -> Change:
        """Return an argument that is a class, in the checkpoint and in this run, as ``class_path`` and ``init_args``.

        The class path is ``None`` where there is no such class.
        """
        specs = []
        for module in (self.saved_module, self.used):
            value = module.arguments.get(argument) if module else None
            spec = value if isinstance(value, Mapping) else {"class_path": value}
            specs.append({"class_path": spec.get("class_path"), "init_args": plain(spec.get("init_args") or {})})
        return Change(*specs)


def _check_whole(path: Path) -> None:
    """Restore a checkpoint after a kill, and check its bytes; of a folder only what is quick."""
    from lightning_muon.strategies import find_whole  # noqa: PLC0415 - runs without a checkpoint start faster

    try:
        if path.is_dir():
            may_be_one = any(file.name in {"meta.pt", ".metadata"} for file in path.iterdir())
        elif path.exists():
            with path.open("rb") as stream:
                may_be_one = stream.read(2) == b"PK"  # a zip archive, perhaps without its end
            if may_be_one and zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    may_be_one = any(name.endswith("/data.pkl") for name in archive.namelist())
        else:
            may_be_one = True
        if may_be_one:
            find_whole(path, quick=True)
    except OSError as error:
        raise ValueError(f"--ckpt_path: '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--ckpt_path: {error}") from error


def differences(old: object, new: object, key: str = "") -> Iterator[tuple[str, Change]]:
    """Yield the key and both values for each value that differs; two different classes are one difference."""
    old, new = plain(old), plain(new)
    if isinstance(old, dict) and isinstance(new, dict):
        if old.get("class_path") != new.get("class_path"):
            yield key, Change(old.get("class_path"), new.get("class_path"))
            return
        for name in dict.fromkeys([*old, *new]):
            yield from differences(old.get(name), new.get(name), plain_key(f"{key}.{name}" if key else str(name)))
    elif old != new:
        yield key, Change(_class_or_value(old), _class_or_value(new))


def _class_or_value(value: object) -> object:
    return value.get("class_path", value) if isinstance(value, dict) else value


def plain(value: object) -> Any:
    """Return nested mappings and sequences as dicts and lists: YAML has no tuples."""
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
    """Return the keys whose value follows, by interpolation, what the user asked for or another setting of this run.

    An argument of the module that follows another one of the module comes from the checkpoint with it, unless the user
    asked for that one. What follows any other key, such as ``trainer.max_steps``, follows this run's value.
    """
    moved = {entry.key for entry in given if entry.asked}
    targets = {entry.key: INTERPOLATION.findall(str(entry.value)) for entry in given}
    follows: set[str] = set()
    while True:
        further = {
            key
            for key in targets.keys() - follows
            if any(plain_key(target) in moved or not target.startswith("model.") for target in targets[key])
        }
        if not further:
            return follows
        follows |= further
        moved |= further


def _without(node: object, prefix: str, keys: set[str]) -> object:
    if not isinstance(node, Mapping):
        return node
    paths = {name: plain_key(f"{prefix}.{name}") for name in node}
    return {name: _without(child, paths[name], keys) for name, child in node.items() if paths[name] not in keys}
