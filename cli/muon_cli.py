"""The command line of a project: LightningCLI, with interpolation, resuming and errors that say what happens."""

import json
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonargparse
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

# Imported for their effect: afterwards `--model.optimizer MuonAdamW` and `--trainer.callbacks+=WeightRMSMonitor` are
# found by their short names.
import lightning_muon.callbacks
import lightning_muon.optim  # noqa: F401
from lightning_muon.cli.checkpoint_fit import check_goes_on, explain_other_weights
from lightning_muon.cli.closing import print_closing
from lightning_muon.cli.commands import OTHER_COMMANDS
from lightning_muon.cli.errors import check_strategy, explain
from lightning_muon.cli.exit import debugging, exit_with
from lightning_muon.cli.gloo_threads import await_gloo_threads_at_exit
from lightning_muon.cli.optimizer_resume import KeepCommandLineOnResume
from lightning_muon.cli.program_name import program_name
from lightning_muon.cli.quiet import hush_lightning
from lightning_muon.cli.raised import message_for_the_user
from lightning_muon.cli.resume import CheckpointHyperparameters, ModuleArguments, read_plain_values, say
from lightning_muon.cli.saved_config import SaveRunConfig
from lightning_muon.cli.sources import INTERPOLATION, Given, flatten, plain_key, read_given
from lightning_muon.strategies import check_resumable, clip_by_norm, is_checkpoint_folder

# Without it `${model.dim}` could not be told from a key of the parser's root, which lies above the subcommand.
jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class MuonCLI(LightningCLI):
    """LightningCLI with what training with Muon needs; :func:`~lightning_muon.cli.main` is the usual way in.

    It has the subcommands ``fit``, ``validate``, ``test`` and ``predict``, and differs from its parent in this:

    - ``default_config`` lies below every ``--config``; several ``--config`` are laid over one another, and
      ``callbacks+:`` in a file appends to the list below it.
    - ``${model.dim}`` and ``${trainer.max_steps}`` follow whatever overrides these keys, in a later file or on the
      command line. The ``config.yaml`` that is saved with a run holds plain values: it repeats that run, and changing
      ``trainer.max_steps`` on top of it changes ``trainer.max_steps`` only.
    - The module's own ``optimizer`` argument makes the optimizer (``auto_configure_optimizers`` is off), so
      ``--model.optimizer AdamW`` and ``--model.optimizer.lr 0.01`` do what they say.
    - With ``--ckpt_path``, what was asked for, on the command line or in a ``--config``, wins over the checkpoint;
      the rest of the module's arguments comes from the checkpoint; each difference is printed.
    - An error of the user is one line on stderr and exit code 2. ``LIGHTNING_MUON_DEBUG=1`` shows the traceback.

    Args:
        model_class: The module to train, or ``None`` to choose one by ``--model``.
        datamodule_class: Its data, or ``None`` to choose it by ``--data``, or to have none.
        default_config: A YAML file with the defaults of all subcommands.
        args: The command line, by default that of the program.
    """

    def __init__(
        self,
        model_class: type[LightningModule] | Callable[..., LightningModule] | None = None,
        datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | None = None,
        *,
        default_config: str | Path | None = None,
        args: Sequence[str] | None = None,
    ) -> None:
        self.default_config = None if default_config is None else str(default_config)
        self.checkpoint: CheckpointHyperparameters | None = None
        self.given: list[Given] = []
        self._args = list(sys.argv[1:] if args is None else args)
        await_gloo_threads_at_exit()
        with _errors_in_one_line(self):
            super().__init__(
                model_class,
                datamodule_class,
                save_config_callback=SaveRunConfig,
                parser_kwargs={
                    "parser_mode": "omegaconf+",
                    "prog": program_name(),
                    # Errors come to us as exceptions, and `--trainer.max_step` is a mistake, not an abbreviation.
                    "exit_on_error": False,
                    "allow_abbrev": False,
                },
                args=self._args,
                auto_configure_optimizers=False,
            )

    def parser_in_use(self) -> LightningArgumentParser:
        """The parser of the subcommand on the command line, or the main one when there is none."""
        head, _ = self._args_of_subcommand()
        parser: LightningArgumentParser = self._subcommand_parsers.get(head[-1] if head else "", self.parser)
        return parser

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        # For `--help` and for errors that list the subcommands: `main` has run these before it comes here.
        commands = parser._subcommands_action
        if commands is None:
            return
        for name, summary in OTHER_COMMANDS.items():
            commands.add_subcommand(name, self.init_parser(description=summary), help=summary)

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand in self._args_of_subcommand()[0]:
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # Its arguments will not be asked for: half a second of start-up is saved.
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        head, tail = self._args_of_subcommand()
        if len(head) > 1 and head[-1] in self.subcommands() and head[0].startswith("--"):
            raise ValueError(f"'{head[0]}' stands before the subcommand; write '{head[-1]} {head[0]} …'")
        self.given = read_given(self.default_config, tail)
        ckpt_path = self._given_value("ckpt_path")
        self.checkpoint = None if ckpt_path is None else CheckpointHyperparameters.of(str(ckpt_path))
        if self.checkpoint is None:
            self._parse(parser, tail)
            return
        try:
            self._parse(parser, tail)
        except ArgumentError:
            # An option may suit only a class that the checkpoint brings, such as the momentum of its optimizer.
            module_class = self._given_value("model", "model.class_path")
            self._parse(parser, [f"--model={module_class}"] if module_class else [])
        without = self._module_arguments()
        layer = self.checkpoint.as_layer(without, self.given)
        self._parse(parser, tail, *([layer] if layer else []))
        self.checkpoint.report(without, self._module_arguments())

    def _given_value(self, *keys: str) -> object:
        return next((entry.value for entry in reversed(self.given) if entry.key in keys), None)

    def _args_of_subcommand(self) -> tuple[list[str], list[str]]:
        """The arguments up to the subcommand, and those behind it."""
        position = next((at for at, arg in enumerate(self._args) if arg in self.subcommands()), len(self._args))
        return self._args[: position + 1], self._args[position + 1 :]

    def _parse(self, parser: LightningArgumentParser, tail: Sequence[str], *layers: str) -> None:
        """Parses arguments of the subcommand on top of the default config and of further layers, each in YAML.

        The default config goes in as the first ``--config``. jsonargparse's ``default_config_files`` are not used: they
        lose the ``class_path`` of an argument whose default is itself a class, as an optimizer's is.
        """
        head, _ = self._args_of_subcommand()
        if head and head[-1] in self.subcommands():
            defaults = [self.default_config] if self.default_config else []
            head += [f"--config={layer}" for layer in [*defaults, *layers]]
        # The parser's root lies above the subcommand; on the command line a key is meant from the subcommand on.
        tail = [INTERPOLATION.sub(rf"${{{head[0]}.\1}}", arg) for arg in tail]
        self.config = parser.parse_args([*head, *tail])

    @override
    def _parse_ckpt_path(self) -> None:
        """Nothing is left to do: the checkpoint's hyperparameters were laid below what was asked for."""

    def _module_arguments(self) -> ModuleArguments:
        """The module's arguments as plain values, those that are not set being ``None``."""
        subcommand = self.config["subcommand"]
        dumped = json.loads(self.parser.dump(self.config, skip_link_targets=False, format="json"))
        # A module that takes no arguments has no keys either.
        module, values = self.config[subcommand].get("model"), dumped[subcommand].get("model", {})
        class_path = None
        if module and self.subclass_mode_model:
            class_path = module["class_path"]
            module, values = module.get("init_args"), values.get("init_args", {})
        return ModuleArguments(class_path, {name: values.get(name) for name in (vars(module) if module else ())})

    def _check_lengths(self) -> None:
        """Refuse lengths, such as a schedule's, that follow ``trainer.max_steps`` where that is -1, for no limit."""
        if self.config[self.config["subcommand"]].get("trainer.max_steps") != -1:
            return
        for key, value in flatten(dict(self._module_arguments().arguments), "model"):
            written = next((str(entry.value) for entry in reversed(self.given) if entry.key == plain_key(key)), "")
            if value == -1 and "trainer.max_steps" in written:
                raise ValueError(
                    f"{plain_key(key)} follows trainer.max_steps, which is -1, for no limit:"
                    f" give --{plain_key(key)}, or --trainer.max_steps"
                )

    @override
    def before_instantiate_classes(self) -> None:
        self._check_lengths()
        resume = KeepCommandLineOnResume(
            self._module_arguments(),
            seed=self.config[self.config["subcommand"]].get("seed_everything"),
            compared=self.checkpoint is not None,
        )
        self.trainer_defaults = {"callbacks": [resume]}

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        hush_lightning(fitting=self.subcommand == "fit")
        if self.subcommand == "predict":
            # It logs nothing: no empty run is to stand beside the real ones.
            config["logger"] = False
            self.save_config_callback = None
        if config["logger"] is False:
            # Lightning's monitor refuses to run without a logger, where it has nothing to do.
            kept = [entry for entry in config["callbacks"] or [] if not isinstance(entry, LearningRateMonitor)]
            config["callbacks"] = kept
        check_strategy(config["strategy"], self.given)
        trainer = super()._instantiate_trainer(config, callbacks)
        if isinstance(trainer.strategy, FSDPStrategy):
            clip_by_norm(trainer.strategy)
        self._check_checkpoint(trainer)
        return trainer

    def _check_checkpoint(self, trainer: Trainer) -> None:
        """Refuse a checkpoint that the strategy could not read, or would read wrongly."""
        ckpt_path = self._given_value("ckpt_path")
        path = Path(str(ckpt_path))
        if ckpt_path is None or not path.exists():  # which one it is, `last` for instance, only the trainer will know
            return
        saved = read_plain_values(path) if self.subcommand == "fit" else None
        if saved is not None:
            # The trainer would only find out once the folder of the run is made.
            check_goes_on(saved, trainer)
        fsdp = isinstance(trainer.strategy, FSDPStrategy)
        if fsdp and self.subcommand == "fit":
            check_resumable(path)
        if is_checkpoint_folder(path) and not fsdp and not isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"--ckpt_path: '{path}' is a sharded checkpoint: add --trainer.strategy fsdp2, or make a file of it by"
                f" '{program_name()} consolidate {path} <file>'"
            )

    def before_predict(self) -> None:
        """Warns of predictions that mean nothing."""
        if self.config["predict"].get("ckpt_path") is None:
            say("no --ckpt_path: the model predicts untrained")

    def after_fit(self) -> None:
        """Prints the final metrics, and what to do with the run."""
        print_closing(self.trainer, self.model, program_name())

    def explain_checkpoint(self, error: Exception) -> str | None:
        """One line for an error that says that the checkpoint is of a module with other weights."""
        module = getattr(self, "model", None)
        if (
            module is None
            or self._given_value("ckpt_path") is None
            or not isinstance(error, (RuntimeError, ValueError))
        ):
            return None
        return explain_other_weights(str(error), type(module).__name__, self.checkpoint, self._module_arguments())

    def user_packages(self) -> set[str]:
        """The top-level packages in which errors of the user are raised: ours, and those of the module and the data."""
        modules = [cls.__module__ for cls in (self.model_class, self.datamodule_class) if cls is not None]
        modules += [str(entry.value) for entry in self.given if entry.key in _CLASS_KEYS]
        return {"lightning_muon", *(module.split(".")[0] for module in modules)} - {"lightning", "torch"}


_CLASS_KEYS = {"model", "data", "model.class_path", "data.class_path"}


@contextmanager
def _errors_in_one_line(cli: MuonCLI) -> Iterator[None]:
    """Shows what the user did wrong as one line; genuine bugs keep their traceback."""
    try:
        yield
    except (ArgumentError, OmegaConfBaseException) as error:
        if debugging():
            raise
        exit_with(explain(str(error), cli.parser_in_use(), cli.given))
    except Exception as error:
        message = cli.explain_checkpoint(error) or message_for_the_user(error, cli.user_packages())
        if debugging() or message is None:
            raise
        exit_with(message)
