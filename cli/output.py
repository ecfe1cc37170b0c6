"""What the program writes beside its logs: one-line messages and errors, and commands to copy.

Lightning is imported only by the functions that need it, so that light commands start fast.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning_muon.report.plain_text import printable

# The commands beside those of MuonCLI, each with its line in --help.
OTHER_COMMANDS = {
    "routes": "Show which algorithm updates each parameter of a model, and why, without training it.",
    "sweep": "Train under many settings, of any keys of the configuration, and show which is best.",
    "compare": "Compare optimizers on the same training, after the same tuning of each.",
    "report": "Show the health of one run; of several what differs, and which is best.",
    "export": "Write the weights of a checkpoint for use elsewhere: safetensors, a state dict, or Hugging Face.",
    "consolidate": "Make one file of a sharded checkpoint, which is a folder.",
}


def say(line: str) -> None:
    """Write one line to stderr, on rank 0 only."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # noqa: PLC0415

    rank_zero_only(sys.stderr.write)(f"{printable(line)}\n")


def exit_with(line: str, code: int = 2) -> NoReturn:
    """End the program with one line on stderr and an exit code; 2 is the shell's code for a wrong command line."""
    sys.stderr.write(f"error: {printable(' '.join(line.split()))}\n")
    raise SystemExit(code)


def debugging() -> bool:
    """Return whether the user wants tracebacks: ``LIGHTNING_MUON_DEBUG=1`` in the environment."""
    return os.environ.get("LIGHTNING_MUON_DEBUG", "0") not in {"", "0"}


def program_name() -> str:
    """Return the command that started this program, such as ``python -m my_project`` or ``python train.py``."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:
        return f"{python()} -m {spec.name.removesuffix('.__main__')}"
    script = sys.argv[0] if sys.argv else ""
    return f"{python()} {script}" if script.endswith(".py") else Path(script).name


def python() -> str:
    """Return the command for this Python: ``python`` if the shell finds this one by that name, else its path."""
    found = shutil.which("python")
    if found and Path(found).parent == Path(sys.executable).parent:
        return "python"
    path = Path(os.path.relpath(sys.executable))
    return quoted(str(path if len(path.parts) < len(Path(sys.executable).parts) else Path(sys.executable)))


def quoted(path: str) -> str:
    """Return the path in quotes if a shell needs them."""
    return f"'{path}'" if " " in path else path


def resume_command(args: Sequence[str], checkpoint: str) -> str:
    """Return the command that goes on from a checkpoint, with everything else as it was.

    Args:
        args: The command line of the run, without the program.
        checkpoint: The checkpoint to go on from, in place of the one that the run itself may have begun with.
    """
    if {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys():
        # What was before the program's name is not known here.
        return f"the same command, with --ckpt_path {shlex.quote(checkpoint)}"
    kept: list[str] = []
    given = iter(args)
    for arg in given:
        if arg == "--ckpt_path":
            next(given, None)
        elif not arg.startswith("--ckpt_path="):
            kept.append(arg)
    return f"{program_name()} {shlex.join([*kept, '--ckpt_path', checkpoint])}"
