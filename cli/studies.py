"""What the commands ``sweep`` and ``compare`` share: their options, what is imported once, and how they end."""

import os
import shlex
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_muon.cli.option_parser import OptionParser, positive
from lightning_muon.cli.output import OTHER_COMMANDS, debugging, exit_with, program_name, python, quoted
from lightning_muon.experiments import StudyError, StudyStopped
from lightning_muon.experiments.runs import RUNS

_WORKERS = """

Several workers, on other GPUs, machines or tasks of a SLURM array: start the same command with the same --study.
After a kill, the same command goes on"""


def study_parser(command: str, own_options: str, words: str, after_a_kill: str = "") -> OptionParser:
    """Return the parser of a command that has many runs; what it does not know are options of ``fit``.

    Args:
        command: Its name.
        own_options: The first of its options, as the usage shows them.
        words: The first paragraph below the options.
        after_a_kill: What to add to the last sentence.
    """
    parser = OptionParser(
        prog=f"{program_name()} {command}",
        usage=f"{program_name()} {command} {own_options} [options of {command}] [options of fit]",
        description=OTHER_COMMANDS[command],
        epilog=f"{words}{_WORKERS}{after_a_kill}.",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    study_help = "the folder of the study: its journal, its runs, its results"
    jobs_help = "runs at a time, which share the cores and the GPUs (default: %(default)s)"
    metric_help = "what judges a run, as it logs it (default: %(default)s)"
    study = parser.add_argument_group("the study")
    study.add_argument("--study", type=Path, metavar="folder", help=study_help)
    study.add_argument("--jobs", type=positive, default=1, metavar="n", help=jobs_help)
    study.add_argument("--metric", default="val/loss", metavar="name", help=metric_help)
    return parser


def preload() -> None:
    """Import what each run needs, once: they are forked from this process."""
    if sys.platform != "linux":
        return
    # Otherwise the question whether there is a GPU would start CUDA here, which a fork cannot use.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch.utils.tensorboard  # noqa: F401, PLC0415

    import lightning_muon.cli.muon_cli  # noqa: PLC0415
    import lightning_muon.strategies  # noqa: F401, PLC0415


@contextmanager
def study_errors(command: str, arguments: Sequence[str]) -> Iterator[None]:
    """Show a mistake of the user as one line, and after a signal how to go on.

    Args:
        command: Its name.
        arguments: After the name, as they were given.
    """
    try:
        yield
    except (OSError, StudyError) as error:
        if debugging():
            raise
        exit_with(str(error))
    except StudyStopped:
        sys.stderr.write(f"go on:      {program_name()} {shlex.join([command, *arguments])}\n")
        raise


def tensorboard_of(folder: Path) -> str:
    """Return the line that says how to look at the runs of a study."""
    return f"look:       {python()} -m tensorboard.main --logdir {quoted(str(folder / RUNS))}"
