"""The configuration that is saved with a run, and the folder of a run that did not begin."""

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from itertools import chain, count
from operator import or_
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_muon.cli.choice import Choices
from lightning_muon.cli.class_changes import ClassesKeepArguments
from lightning_muon.cli.secrets import Secrets


class MaskingParser(ClassesKeepArguments):
    """A parser whose YAML, saved with a run or shown by ``--print_config``, holds no value from the environment.

    Such a value is as it was written, ``${oc.env:TOKEN}``. Classes that were chosen are named.

    Attributes:
        secrets: Which values come from the environment.
        choices: What was chosen; the configuration names it.
    """

    secrets = Secrets()
    choices: Choices | None = None

    @override
    def dump(self, namespace: Namespace, format: str = "parser_mode", **options: Any) -> str:
        text: str = super().dump(namespace, format=format, **options)
        chosen = self.choices is not None and self.choices.paths
        if not (self.secrets.written or chosen) or format.startswith("json"):
            return text
        tree = self.secrets.masked(yaml.safe_load(text))
        if self.choices is not None:
            tree = self.choices.nested(tree)
        comments = [line for line in text.splitlines() if line.startswith("#")]
        masked = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        return "\n".join([*comments, masked])


def try_integers_first(parser: LightningArgumentParser) -> None:
    """Let arguments of type ``int | float`` stay integers where they are one; call it once all are added.

    jsonargparse takes the first type that fits, and to the trainer ``limit_val_batches`` 1 is one batch, 1.0 all of
    them. Which type of ``Union[int, float]`` comes first, Python's cache of such types decides: a module that was
    imported before may have written it the other way round.
    """
    for action in parser._actions:
        types = get_args(getattr(action, "_typehint", None))
        if int in types and float in types and all(isinstance(one, type) for one in types):
            first, *rest = sorted(types, key=lambda one: one is not int)
            # Not Union, whose order is that of an equal one in the cache.
            action._typehint = reduce(or_, rest, first)  # type: ignore[attr-defined]


class SaveRunConfig(SaveConfigCallback):
    """Save the whole configuration of a run to its log directory; files of earlier runs stay.

    ``fit`` writes ``config.yaml``, another subcommand a file of its own name, such as ``validate.yaml``. A run in the
    directory of an earlier one writes ``config-1.yaml``, ``config-2.yaml``, …
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.already_saved:
            return
        subcommand = TrainerFn(stage).value
        stem = "config" if subcommand == "fit" else subcommand
        directory = Path(str(trainer.log_dir))  # a collective: it is broadcast
        if trainer.is_global_zero:
            names = chain([f"{stem}.yaml"], (f"{stem}-{number}.yaml" for number in count(1)))
            file = next(directory / name for name in names if not (directory / name).exists())
            directory.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f".{file.name}.unfinished")
            unfinished.write_text(self.parser.dump(self.config, skip_none=False), encoding="utf-8")
            unfinished.replace(file)
        self.already_saved = True


class NewFolders:
    """The folders that a run makes before its first step; removed again if it is refused before.

    Only files that this process wrote are removed, and folders that were not there before and are empty then.

    Args:
        trainer: The trainer, before it starts.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._logs = [Path(path) for path in _log_dirs(trainer)] if trainer.is_global_zero else []
        self._new = [path for log in self._logs for path in (log, *log.parents) if not path.exists()]
        self._before = {file for log in self._logs if log.is_dir() for file in log.iterdir()}

    def remove(self) -> None:
        """Remove what this run has written so far."""
        for log in self._logs:
            own = [log.glob(pattern) for pattern in ("*.yaml", ".*.unfinished", "metrics.csv", f"*.{os.getpid()}.*")]
            for file in chain.from_iterable(own):
                if file not in self._before:
                    file.unlink(missing_ok=True)
        for folder in sorted(self._new, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # it was not made, or is not empty
                folder.rmdir()


def _log_dirs(trainer: Trainer) -> Iterator[str]:
    if not trainer.loggers:
        yield trainer.default_root_dir
    for logger in trainer.loggers:
        log_dir = getattr(logger, "log_dir", None)
        if isinstance(log_dir, str) and "://" not in log_dir:
            yield log_dir
