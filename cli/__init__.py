"""The command line: LightningCLI, set up for training with Muon, and commands for finished runs.

A project's ``__main__`` calls :func:`main` with its module and its data; ``python -m lightning_muon.cli`` trains
importable modules from anywhere.

- :mod:`~lightning_muon.cli.program`: ``main``, which chooses the command; ``report`` and ``consolidate``.
- :mod:`~lightning_muon.cli.muon_cli`: ``MuonCLI``, the command line of ``fit``, ``validate``, ``test`` and ``predict``.
- :mod:`~lightning_muon.cli.routes`: the command ``routes``; :mod:`~lightning_muon.cli.routing_table`: its table at the
  start of ``fit``.
- :mod:`~lightning_muon.cli.models`: models of ``transformers`` and ``timm`` by config.
- :mod:`~lightning_muon.cli.choice`: the classes of module and data, chosen before there is a parser.
- :mod:`~lightning_muon.cli.added_optimizer`: an optimizer for modules that make none.
- :mod:`~lightning_muon.cli.config_files`: config files, read as YAML, and presets by their names.
- :mod:`~lightning_muon.cli.layers`: what lies over what: the default config, config files, options;
  :mod:`~lightning_muon.cli.class_changes`: what stays of a class when another takes its place.
- :mod:`~lightning_muon.cli.given`: what the user wrote, key by key and with its place.
- :mod:`~lightning_muon.cli.secrets`: values from the environment, which no file of a run holds.
- :mod:`~lightning_muon.cli.saved_config`: the configuration that is saved with a run, and the folders that it makes.
- :mod:`~lightning_muon.cli.resume`: what a run takes from a checkpoint, and what from the command line.
- :mod:`~lightning_muon.cli.weights`: what a run begins with by ``--weights``; :mod:`~lightning_muon.cli.export`: the
  command ``export``.
- :mod:`~lightning_muon.cli.sweep` and :mod:`~lightning_muon.cli.compare`: the commands with many runs;
  :mod:`~lightning_muon.cli.studies`: what they share; :mod:`~lightning_muon.cli.optimizer_settings`: what a comparison
  has to know of a run.
- :mod:`~lightning_muon.cli.from_data`: values in configs that the data know.
- :mod:`~lightning_muon.cli.run_length`: epochs or steps, and schedules of the run's length.
- :mod:`~lightning_muon.cli.errors`: mistakes of the user, each told in one line; :mod:`~lightning_muon.cli.ending`: how
  the program ends after one, or on a signal.
- :mod:`~lightning_muon.cli.process_group`: a new one after torchrun has restarted its processes, and its end.
- :mod:`~lightning_muon.cli.signals`: what SIGTERM and Ctrl-C do outside of training.
- :mod:`~lightning_muon.cli.terminal`: what a run shows while it goes on; :mod:`~lightning_muon.cli.summary`: what it
  shows at its end; :mod:`~lightning_muon.cli.output`: messages, and how the program is called.
"""

from typing import TYPE_CHECKING, Any

from lightning_muon.cli.program import main

if TYPE_CHECKING:
    from lightning_muon.cli.muon_cli import MuonCLI

__all__ = ["MuonCLI", "main"]


def __getattr__(name: str) -> Any:
    """Import ``MuonCLI`` on first use: torch and Lightning take seconds, and ``report`` does not need them."""
    if name == "MuonCLI":
        from lightning_muon.cli.muon_cli import MuonCLI  # noqa: PLC0415

        return MuonCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
