"""``--weights``: a run that begins with the weights of an earlier one, of an exported file, or of Hugging Face."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_muon.cli.errors.suggestions import nearest_path
from lightning_muon.cli.given import INTERPOLATION, Given, value_of
from lightning_muon.cli.layers import Layer
from lightning_muon.cli.output import say
from lightning_muon.cli.resume.plan import ModuleArguments, ResumePlan, SavedRun, differences

if TYPE_CHECKING:
    from lightning_muon.strategies import SavedWeights

_OPTION = "--weights"
_HUGGING_FACE = "lightning_muon.cli.models.hugging_face"


def add_weights_options(parser: LightningArgumentParser) -> None:
    """Add ``--weights`` and ``--fresh`` to the parser of a subcommand."""
    parser.add_argument(
        _OPTION,
        type=str | None,
        default=None,
        help="Begin with the weights in this file or folder, with a new optimizer: a checkpoint, an exported"
        " .safetensors or .pt file, or a model that save_pretrained wrote. Its network is used where nothing else is"
        " asked for.",
    )
    parser.add_argument(
        "--fresh",
        type=list[str],
        default=[],
        help="Weights that --weights leaves as they are, by patterns of names such as ['head.*'].",
    )


@dataclass(frozen=True)
class StartingWeights:
    """The weights that a run begins with.

    Attributes:
        path: What ``--weights`` names; ``None`` without it, and in a run that goes on from a checkpoint.
        saved: What is there.
    """

    path: Path | None = None
    saved: "SavedWeights | None" = None

    @classmethod
    def of(cls, given: Sequence[Given], *, resuming: bool) -> "StartingWeights":
        """Read what ``--weights`` names.

        Args:
            given: What the user gave.
            resuming: Whether the run has a checkpoint, whose weights it takes instead.

        Raises:
            FileNotFoundError: If there is nothing at the path.
            ValueError: If there are no weights.
        """
        value = value_of(given, "weights")
        if value in (None, "null"):
            if value_of(given, "fresh") not in (None, "null", "[]", []):
                raise ValueError("--fresh goes with --weights, which is missing")
            return cls()
        if resuming:
            say(f"{_OPTION}: not read, because the run goes on from --ckpt_path")
            return cls()
        from lightning_muon.strategies import read_weights  # noqa: PLC0415 - runs without them start faster

        path = Path(str(value))
        if not value or not path.exists():
            suggestion = nearest_path(path, f"*{path.suffix}") if value else ""
            raise FileNotFoundError(f"{_OPTION}: '{value}' does not exist{suggestion}")
        try:
            return cls(path, read_weights(path))
        except ValueError as error:
            raise ValueError(f"{_OPTION}: {error}") from None

    def layer(self, current: ModuleArguments, given: Sequence[Given]) -> Layer | None:
        """Return the network of the weights as a config, to lie above the defaults and below what was asked for.

        With it come the module's arguments that the network follows by interpolation, such as ``model.context``. The
        network of a folder of Hugging Face becomes ``model.net``, if there is this argument.
        """
        saved = self.saved
        if saved is None:
            return None
        argument, network = saved.argument, saved.network
        if self.path is not None and (self.path / "config.json").is_file():
            if any(entry.asked and f"{entry.key}.".startswith("model.net.") for entry in given):
                return None
            argument, network = "net", {"class_path": _HUGGING_FACE, "init_args": {"config": str(self.path)}}
        if argument is None or argument not in current.arguments or "class_path" not in network:
            return None
        here, key = current.arguments[argument], f"model.{argument}"
        chosen = any(entry.asked and entry.key in {key, f"{key}.class_path"} for entry in given)
        if chosen and not (isinstance(here, Mapping) and here.get("class_path") == network["class_path"]):
            return None  # what was asked for is another network
        inside = f"model.{argument}."
        follows = [INTERPOLATION.findall(str(entry.value)) for entry in given if entry.key.startswith(inside)]
        keys = {target.removeprefix("model.") for targets in follows for target in targets}
        arguments = {argument: network, **{key: saved.module[key] for key in keys & saved.module.keys()}}
        plan = ResumePlan(saved=SavedRun(ModuleArguments(current.class_path, arguments), 0, 0))
        return plan.layer(current, given)

    def print_taken(self, before: ModuleArguments, after: ModuleArguments) -> None:
        """Print which arguments of the module come with the weights."""
        changed = differences(before.arguments, after.arguments)
        if taken := [f"model.{key}={new}" for key, (_, new) in changed]:
            say(f"{_OPTION}: with them come {', '.join(taken)}")

    def load(self, module: LightningModule, trainer: Trainer, fresh: Sequence[str]) -> None:
        """Copy the weights into the module, now, or when ``configure_model`` has made its network.

        Raises:
            ValueError: If they are of another network.
        """
        if self.saved is None:
            return
        if is_overridden("configure_model", module):
            trainer.callbacks.insert(0, _LoadLater(self, fresh))  # type: ignore[attr-defined]
        else:
            self.copy_into(module, fresh)

    def copy_into(self, module: LightningModule, fresh: Sequence[str]) -> None:
        """Copy the weights into the module, and say so."""
        from lightning_muon.strategies import start_from  # noqa: PLC0415 - as above

        if self.saved is None:
            return
        try:
            copied = start_from(module, self.saved, fresh)
        except ValueError as error:
            remedy = "" if fresh else "; --fresh names what may differ"
            raise ValueError(f"{_OPTION}: '{self.path}': {error}{remedy}") from None
        averaged = " (averages)" if self.saved.averaged else ""
        say(f"{_OPTION}: {copied} from '{self.path}'{averaged}")


class _LoadLater(Callback):
    """Copy weights into a network that ``configure_model`` makes, once it is there."""

    def __init__(self, weights: StartingWeights, fresh: Sequence[str]) -> None:
        self._weights, self._fresh = weights, fresh

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._weights.copy_into(pl_module, self._fresh)
