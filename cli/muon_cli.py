"""The command line of a project: LightningCLI with interpolation, resuming, and errors in one line."""

import json
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace, set_parsing_settings
from jsonargparse.typing import PositiveFloat
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import FSDPStrategy
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

# Imported for their effect: `--model.optimizer MuonAdamW` and `--trainer.callbacks+=WeightRMSMonitor` find classes that
# are imported by their short names, and --help lists them.
import lightning_muon.callbacks
import lightning_muon.optim  # noqa: F401
from lightning_muon.callbacks import PredictionWriter
from lightning_muon.callbacks.stop_on_signal import StopOnSignal
from lightning_muon.cli.choice import choose, settle
from lightning_muon.cli.ending import ending_on_signals, errors_in_one_line
from lightning_muon.cli.errors.files import check_folders
from lightning_muon.cli.errors.missing import check_complete
from lightning_muon.cli.errors.parser import check_strategy
from lightning_muon.cli.errors.settings import check_lengths, check_settings
from lightning_muon.cli.from_data import FromData
from lightning_muon.cli.given import INTERPOLATION, Given, given_in, value_of
from lightning_muon.cli.layers import SECTIONS, Layer, default_files, read_layers
from lightning_muon.cli.output import OTHER_COMMANDS, program_name, resume_command, say
from lightning_muon.cli.process_group import await_gloo_threads_at_exit, leave_the_store_of_earlier_attempts
from lightning_muon.cli.resume.callback import KeepCommandLineOnResume
from lightning_muon.cli.resume.checks import check_checkpoint
from lightning_muon.cli.resume.newest import LAST, newest_checkpoint
from lightning_muon.cli.resume.plan import ModuleArguments, ResumePlan
from lightning_muon.cli.resume.reading import is_url
from lightning_muon.cli.run_length import ScheduleOfRun, lift_limit
from lightning_muon.cli.saved_config import MaskingParser, NewFolders, SaveRunConfig, try_integers_first
from lightning_muon.cli.secrets import Secrets
from lightning_muon.cli.summary import print_summary
from lightning_muon.cli.terminal import add_terminal_options, hush_all_but_warnings, settle_terminal
from lightning_muon.cli.weights import StartingWeights, add_weights_options

# Otherwise `${model.dim}` would be looked up at the parser's root, which lies above the subcommand.
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)

_HELP = {"-h", "--help"}
_OUTPUT_HELP = "Write the predictions, in the order of the samples, to this file: .jsonl or .csv; it must not exist."


class MuonCLI(LightningCLI):
    """LightningCLI with what training with Muon needs; :func:`~lightning_muon.cli.main` is the usual way to start it.

    It has the subcommands ``fit``, ``validate``, ``test`` and ``predict``, and differs from its parent in this:

    - ``default_config`` lies below every ``--config``; several ``--config`` are laid over one another, and
      ``callbacks+:`` in a file appends to the list below it. ``--config optimizer/moonlight`` names a preset. After the
      first of several ``default_config``, each is a preset, and a ``--config`` from its folder takes its place.
    - ``--model my.Module --data my.Data``, or ``class_path`` in a config, take other classes than the program's own
      (:mod:`~lightning_muon.cli.choice`). A module that makes no optimizer gets one
      (:mod:`~lightning_muon.cli.added_optimizer`).
    - ``${model.dim}`` and ``${trainer.max_steps}`` follow whatever overrides these keys, in a later file or on the
      command line. The ``config.yaml`` that is saved with a run holds plain values: it repeats that run, and changing
      ``trainer.max_steps`` on top of it changes ``trainer.max_steps`` only.
    - Of ``trainer.max_steps`` and ``trainer.max_epochs`` the one that was given last ends the run, unless both were
      given in one place. Schedules with an argument ``total_steps`` that is not given have the length of the run.
    - The module's own ``optimizer`` argument makes the optimizer (``auto_configure_optimizers`` is off), so
      ``--model.optimizer AdamW`` and ``--model.optimizer.lr 0.01`` do what they say.
    - With ``--ckpt_path``, what was asked for, on the command line or in a ``--config``, wins over the checkpoint;
      the rest of the module's arguments comes from the checkpoint; each difference is printed.
    - Checkpoints are saved whole or not at all, checked when they are loaded, and run no code
      (:class:`~lightning_muon.strategies.AtomicCheckpointIO`), unless ``trainer.plugins`` has a way of its own.
    - ``--weights`` begins with the weights of an earlier run, an exported file or a model of Hugging Face, and with a
      new optimizer. ``predict --output`` writes predictions to a file.
    - ``--ckpt_path last`` is the newest checkpoint of earlier runs. ``fit`` starts afresh if there is none.
    - SIGTERM and Ctrl-C end a fit after its step, with a checkpoint and the command to resume, within ``--grace``
      seconds, see :class:`~lightning_muon.callbacks.StopOnSignal`; anything else ends at once. The exit codes are 143
      and 130.
    - ``fit`` begins with the table of which algorithm updates which parameter, if ``route_parameters`` made the groups,
      and shows its progress by :class:`~lightning_muon.callbacks.StepProgressBar`; ``--quiet`` shows its end only.
    - An error of the user is one line on stderr and exit code 2; a run that ``RunGuard`` ends is one line, with the
      command to resume, and exit code 1. ``LIGHTNING_MUON_DEBUG=1`` shows the traceback.

    Args:
        model_class: The module to train, as a class or its import path; ``None`` to choose one by ``--model``.
        datamodule_class: Its data, likewise; ``None`` to choose it by ``--data``, or to have none.
        default_config: A YAML file with the defaults of all subcommands, or that and presets to lay over it.
        args: The command line, by default that of the program.
    """

    MODEL: type = LightningModule  # what --model takes

    def __init__(
        self,
        model_class: type[LightningModule] | Callable[..., LightningModule] | str | None = None,
        datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | str | None = None,
        *,
        default_config: str | Path | Sequence[str | Path] | None = None,
        args: Sequence[str] | None = None,
    ) -> None:
        self.default_configs = default_files(default_config)
        self.resume = ResumePlan()
        self.weights = StartingWeights()
        self.config = Namespace()  # type: ignore[no-untyped-call]
        self.given: list[Given] = []
        self.secrets = Secrets()
        self._new_folders: NewFolders | None = None
        self._args = list(sys.argv[1:] if args is None else args)
        await_gloo_threads_at_exit()
        with ending_on_signals(self), errors_in_one_line(self):
            self._layers = self._read_layers()
            self.choices = choose(self._layers, model_class, datamodule_class, self.MODEL)
            self._layers = settle(self._layers, self.choices)
            self.given = given_in(self._layers)
            self.from_data = FromData(self.choices.data.made).register()
            super().__init__(
                self.choices.model.for_parser,
                self.choices.data.for_parser,
                save_config_callback=SaveRunConfig,
                parser_class=MaskingParser,
                parser_kwargs={
                    "parser_mode": "omegaconf+",
                    "prog": program_name(),
                    # Errors are raised, to be shown in one line, and `--trainer.max_step` is not an abbreviation.
                    "exit_on_error": False,
                    "allow_abbrev": False,
                },
                args=self._args,
                auto_configure_optimizers=False,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "MuonCLI":
        """Return itself: its module refers to it, and a copy of the module, such as an average, needs no other."""
        return self

    # ---- parsing

    def parser_in_use(self) -> LightningArgumentParser:
        """Return the parser of the subcommand on the command line, or the main one if there is none."""
        head, _ = self._args_of_subcommand()
        parser: LightningArgumentParser = self._subcommand_parsers.get(head[-1] if head else "", self.parser)
        return parser

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        # For `--help` and for errors that list the subcommands; `main` runs these without this class.
        if commands := parser._subcommands_action:
            for name, summary in OTHER_COMMANDS.items():
                commands.add_subcommand(name, self.init_parser(description=summary), help=summary)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.choices.add_free_arguments(parser)
        parser.add_argument(
            "--grace",
            type=PositiveFloat,
            default=25.0,
            help="Seconds from SIGTERM or Ctrl-C to the end of a fit: for its step and a checkpoint.",
        )
        add_weights_options(parser)
        add_terminal_options(parser)
        try_integers_first(parser)

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand in self._args_of_subcommand()[0]:
            parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
            if subcommand == "predict":
                parser.add_argument("--output", type=str | None, default=None, help=_OUTPUT_HELP)
            return parser
        # The arguments of the other subcommands are not needed: this saves half a second.
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        head, tail = self._args_of_subcommand()
        self._layers += [Layer((option,)) for option in lift_limit(self.given, quiet=head[-1:] != ["fit"])]
        if _HELP & set(tail) or any(entry.key.startswith("trainer.strategy") for entry in self.given):
            # Imported for its effect, as above, and because it registers "fsdp2"; late, because it takes 0.1 s.
            import lightning_muon.strategies  # noqa: F401, PLC0415
        ckpt_path = value_of(self.given, "ckpt_path")
        if ckpt_path == LAST:
            ckpt_path = self._newest_checkpoint(parser)
            self._layers.append(Layer((f"--ckpt_path={'null' if ckpt_path is None else ckpt_path}",)))
        trusted = str(value_of(self.given, "weights_only")).lower() == "false"
        self.resume = ResumePlan.of(
            None if ckpt_path is None else str(ckpt_path), fitting=head[-1:] == ["fit"], trusted=trusted
        )
        self.weights = StartingWeights.of(self.given, resuming=ckpt_path is not None)
        saved = self.resume.saved_module
        self.secrets = Secrets(self.given, {} if saved is None else saved.arguments)
        for each in self._subcommand_parsers.values():
            cast("MaskingParser", each).secrets = self.secrets
            cast("MaskingParser", each).choices = self.choices
        without = None
        if saved is None:
            self._parse(parser, self._layers)
            alone = self._module_arguments()
            if layer := self.weights.layer(alone, self.given):
                self._parse(parser, self._above_defaults(layer))
                self.weights.print_taken(alone, self._module_arguments())
        else:
            without = self._without_checkpoint(parser)
            model = self.choices.model
            # Without it, the class may lack what it needs.
            current = without or ModuleArguments(model.path, dict.fromkeys(model.arguments))
            self._parse(parser, self._above_defaults(self.resume.layer(current, self.given)))
        self.resume.used = self._module_arguments()
        self._check_values()
        self._say_what_is_left_out()
        self.resume.print_differences(without)
        if is_url(str(ckpt_path)) and not trusted:
            # Lightning would run the code in a checkpoint from the network.
            self.config[self.config["subcommand"]]["weights_only"] = True

    def _read_layers(self) -> list[Layer]:
        head, tail = self._args_of_subcommand()
        if len(head) > 1 and head[-1] in self.subcommands() and head[0].startswith("--"):
            raise ValueError(f"'{head[0]}' stands before the subcommand; write '{head[-1]} {head[0]} …'")
        return read_layers(self.default_configs, tail)

    def _above_defaults(self, layer: Layer | None) -> list[Layer]:
        """Return the layers with one between the default config and what was asked for."""
        below = [each for each in self._layers if not each.asked]
        return [*below, *([layer] if layer else []), *self._layers[len(below) :]]

    def _newest_checkpoint(self, parser: LightningArgumentParser) -> Path | None:
        """Return the checkpoint that ``--ckpt_path last`` means, and say which."""
        self._parse(parser, self._layers)
        subcommand = self.config["subcommand"]
        newest = newest_checkpoint(self.config[subcommand]["trainer"])
        if newest is None and subcommand != "fit":
            raise ValueError("--ckpt_path last: there is no checkpoint yet")
        say(f"--ckpt_path last: {newest or 'there is no checkpoint yet, the run starts afresh'}")
        return newest

    def _without_checkpoint(self, parser: LightningArgumentParser) -> ModuleArguments | None:
        """Return the module's arguments without the checkpoint; ``None`` if only with it they are complete."""
        for layers in (self._layers, [layer for layer in self._layers if not layer.asked]):
            # An option may suit only a class that the checkpoint brings, such as the momentum of its optimizer.
            with suppress(ArgumentError):
                self._parse(parser, layers)
                return self._module_arguments()
        return None

    def _args_of_subcommand(self) -> tuple[list[str], list[str]]:
        """Return the arguments up to the subcommand, and those after it."""
        position = next((at for at, arg in enumerate(self._args) if arg in self.subcommands()), len(self._args))
        return self._args[: position + 1], self._args[position + 1 :]

    def _parse(self, parser: LightningArgumentParser, layers: Sequence[Layer]) -> None:
        """Parse layers of the subcommand; the default config is the first ``--config``.

        jsonargparse's ``default_config_files`` lose the ``class_path`` of an argument whose default is itself a class,
        as an optimizer's is.
        """
        head, tail = self._args_of_subcommand()
        if not head or head[-1] not in self.subcommands():
            self.config = parser.parse_args([*head, *tail])
            return
        args = list(head)
        for layer in layers:
            # --help prints the same without the default config, and faster.
            if layer.content is not None and (layer.asked or not _HELP & set(tail)):
                args += layer.args
            elif layer.content is None:
                # On the command line a key starts at the subcommand; the parser's root lies above it.
                args += [INTERPOLATION.sub(rf"${{{head[0]}.\1}}", arg) for arg in layer.args]
        self.config = parser.parse_args(args)

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing: the checkpoint's hyperparameters are already laid below what was asked for."""

    def _module_arguments(self) -> ModuleArguments:
        """Return the module's arguments as plain values, those that are not set as ``None``."""
        subcommand = self.config["subcommand"]
        module = self.config[subcommand].get("model")
        alone = Namespace(model=module)  # type: ignore[no-untyped-call]
        parser = self._subcommand_parsers[subcommand]
        dumped = parser.dump(alone, skip_link_targets=False, skip_validation=True, format="json")
        values = json.loads(dumped).get("model", {})
        # A module without arguments has no keys either.
        arguments = {name: values.get(name) for name in (vars(module) if module else ())}
        return ModuleArguments(self.choices.model.path, self.secrets.masked(arguments, "model", only_texts=True))

    def _say_what_is_left_out(self) -> None:
        """Say which defaults do not concern the chosen classes."""
        if keys := self.choices.left_out:
            default = Path(self.default_configs[0]).name
            say(f"left out of {default}, for {' and '.join(self.choices.paths.values())}: {', '.join(keys)}")

    def _check_values(self) -> None:
        """Refuse values out of range, before anything is made of them."""
        config = {**self.config[self.config["subcommand"]].as_dict(), "model": dict(self.resume.used.arguments)}
        check_lengths(config, self.given)
        check_settings(config, self.given)
        sections = self.choices.nested(self.config[self.config["subcommand"]].as_dict())
        for section in SECTIONS:
            check_complete(section, sections.get(section), self.given)

    # ---- running

    @override
    def _set_seed(self) -> None:
        hush_all_but_warnings(self._get(self.config, "quiet"))
        super()._set_seed()

    @override
    def before_instantiate_classes(self) -> None:
        leave_the_store_of_earlier_attempts()
        self.parser.add_instantiator(ScheduleOfRun(lambda: self.trainer), LRScheduler, subclasses=True)
        self.resume.seed = self.config[self.config["subcommand"]].get("seed_everything")
        callbacks: list[Callback] = [KeepCommandLineOnResume(self.resume, self.secrets)]
        if self.subcommand == "fit":
            callbacks.append(StopOnSignal(self.config["fit"]["grace"], partial(resume_command, self._args)))
        if self.subcommand == "predict" and (output := self.config["predict"]["output"]):
            callbacks.append(PredictionWriter(output))
            self.config["predict"]["return_predictions"] = False
        self.trainer_defaults = {"callbacks": callbacks}

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        settle_terminal(config, fitting=self.subcommand == "fit", quiet=self._get(self.config, "quiet"))
        if self.subcommand == "predict":
            # It logs nothing: no empty run beside the real ones.
            config["logger"] = False
            self.save_config_callback = None
        if config["logger"] is False:
            # Lightning's LearningRateMonitor raises an error without a logger.
            callbacks_given = config["callbacks"] or []
            config["callbacks"] = [entry for entry in callbacks_given if not isinstance(entry, LearningRateMonitor)]
        if any(isinstance(callback, StopOnSignal) for callback in config["callbacks"] or []):
            # The user's own, with its own grace, takes the place of the one that is always there.
            own = self.trainer_defaults["callbacks"]
            own[:] = [callback for callback in own if not isinstance(callback, StopOnSignal)]
        check_strategy(config["strategy"], self.given)
        trainer = super()._instantiate_trainer(config, callbacks)
        # It comes first, to see the groups of this run before another callback puts those of the checkpoint there.
        trainer.callbacks.sort(key=lambda one: not isinstance(one, KeepCommandLineOnResume))  # type: ignore[attr-defined]
        # Late, because it takes 0.1 s, which --help does not need.
        from lightning_muon.strategies import clip_by_norm, protect_checkpoints, use_atomic_checkpoints  # noqa: PLC0415

        use_atomic_checkpoints(trainer.strategy)
        if isinstance(trainer.strategy, FSDPStrategy):
            clip_by_norm(trainer.strategy)
            protect_checkpoints(trainer.strategy)
        check_checkpoint(self.resume, trainer, fitting=self.subcommand == "fit")
        if self.subcommand != "predict":
            check_folders(trainer)
            self._new_folders = NewFolders(trainer)
        return trainer

    @override
    def _dump_config(self) -> None:
        super()._dump_config()
        self.config_dump = self.choices.nested(self.config_dump)  # for the hyperparameters in checkpoints

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.from_data.hand_over(self.datamodule, self._get(self.config, "data"))
        self.weights.load(self.model, self.trainer, self._get(self.config, "fresh"))
        # What loggers write as the hyperparameters of the run.
        for prefix, part in (("model", self.model), ("data", self.datamodule)):
            if self.secrets.written and getattr(part, "_hparams_initial", None):
                part._hparams_initial = type(part._hparams_initial)(self.secrets.masked(part.hparams_initial, prefix))

    def before_predict(self) -> None:
        """Warn of predictions that mean nothing."""
        if self.config["predict"].get("ckpt_path") is None and self.weights.path is None:
            say("no --ckpt_path: the model predicts untrained")

    def after_fit(self) -> None:
        """Print how good and how healthy the run is, and what to do with it."""
        print_summary(self.trainer, self.model)

    def undo(self) -> None:
        """Remove the folder of a run that is refused before its first batch."""
        if self._new_folders is not None and not self._has_begun():
            self._new_folders.remove()

    def has_seen_a_batch(self) -> bool:
        """Return whether data have reached the module, be it in the sanity check."""
        if not hasattr(self, "trainer"):
            return False
        sanity_check = self.trainer.fit_loop.epoch_loop.val_loop
        return self._has_begun() or bool(sanity_check.batch_progress.total.ready)

    def _has_begun(self) -> bool:
        loops = (self.trainer.fit_loop.epoch_loop, self.trainer.validate_loop, self.trainer.test_loop)
        return any(loop.batch_progress.total.ready for loop in loops)
