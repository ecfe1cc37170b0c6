"""The command ``routes``: which algorithm updates each parameter of a model, and why, without training it."""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from typing_extensions import override

from lightning_muon.cli.choice import as_class
from lightning_muon.cli.models import without_weights
from lightning_muon.cli.muon_cli import MuonCLI
from lightning_muon.cli.output import OTHER_COMMANDS, say
from lightning_muon.cli.routing_table import print_routes
from lightning_muon.optim import MatrixLayout, Route, Rule, find_routes

_HUGGING_FACE = "lightning_muon.cli.models.hugging_face"
_TIMM = "lightning_muon.cli.models.timm_model"


class RoutesCLI(MuonCLI):
    """Take the arguments of ``fit``, build only the module, and print who updates what.

    Here ``--model`` takes the path of any ``nn.Module`` or of a function that returns one;
    ``hf:`` and a model type of ``transformers``, such as ``hf:gpt2``; ``timm:`` and a name of ``timm``; or a
    ``config.json`` of ``transformers``, or a folder with one. Models of ``transformers`` are built without weights, so
    their size does not matter.

    Args:
        model_class: The module, as a class or its import path; ``None`` to choose one by ``--model``.
        datamodule_class: Its data. They are built only if the module's ``configure_model`` asks the trainer for them.
        default_config: A YAML file with the defaults, or that and presets to lay over it.
        args: The command line after ``routes``.
    """

    def __init__(
        self,
        model_class: type[LightningModule] | Callable[..., LightningModule] | str | None = None,
        datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | str | None = None,
        *,
        default_config: str | Path | Sequence[str | Path] | None = None,
        args: Sequence[str] = (),
    ) -> None:
        arguments = ["routes", *_expanded(args)]
        super().__init__(model_class, datamodule_class, default_config=default_config, args=arguments)

    MODEL = nn.Module

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {"routes": MuonCLI.subcommands()["fit"]}

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        routes = self.init_parser(description=OTHER_COMMANDS["routes"], **kwargs)
        routes.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
        one_row = "One row for each parameter, instead of one for each reason."
        routes.add_argument("--every-parameter", "--every_parameter", action="store_true", help=one_row)
        given_rules = "Exceptions: [{pattern: '*.gate.weight', algorithm: adamw}]. Default: the module's `rules`."
        routes.add_argument("--rules", type=list[Rule] | None, default=None, help=given_rules)
        per_head = "Cut attention into its heads. Default: the module's `per_head`."
        routes.add_argument("--per_head", type=bool | None, default=None, help=per_head)
        strict = "Make it an error if the role of a parameter is a guess. Default: the module's `strict_routing`."
        routes.add_argument("--strict", action="store_true", help=strict)
        self._add_arguments(routes)
        # A config that was saved with a run has these too.
        routes.add_method_arguments(Trainer, "fit", skip=set(self.subcommands()["routes"]))
        self._subcommand_method_arguments["routes"] = []
        self._subcommand_parsers = {"routes": routes}
        parser.add_subcommands().add_subcommand("routes", routes, help=OTHER_COMMANDS["routes"])

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        model = self.choices.model.for_parser
        if model is None:
            parser.add_subclass_arguments(nn.Module, "model", fail_untyped=False, required=True)
        else:
            parser.add_class_arguments(as_class(model), "model", fail_untyped=False, sub_configs=True)
        data = {"subclass_mode": self.subclass_mode_data, "required": self.datamodule_class is not None}
        parser.add_lightning_class_args(self._datamodule_class, "data", **data)
        parser.add_lightning_class_args(self.trainer_class, "trainer")

    @override
    def before_instantiate_classes(self) -> None:
        """Do nothing: no trainer is made."""

    @override
    def _set_seed(self) -> None:
        """Do nothing: routes do not depend on values."""

    @override
    def instantiate_classes(self) -> None:
        # A model without arguments has no key.
        model = self.config["routes"].get("model")
        only_model = Namespace(model=model) if model else Namespace()  # type: ignore[no-untyped-call]
        with without_weights():
            self.model = self._subcommand_parsers["routes"].instantiate_classes(only_model)["model"]
            if isinstance(self.model, LightningModule) and is_overridden("configure_model", self.model):
                self.model.trainer = _TrainerForData(self._data)  # type: ignore[assignment]
                self.model.configure_model()

    def _data(self) -> LightningDataModule | None:
        """Return the data, ready for ``fit``; ``None`` if there are none."""
        values = self.config["routes"].get("data")
        only_data = Namespace() if values is None else Namespace(data=values)  # type: ignore[no-untyped-call]
        data = self._subcommand_parsers["routes"].instantiate_classes(only_data).get("data")
        if isinstance(data, LightningDataModule):
            data.prepare_data()
            data.setup("fit")
            return data
        return None

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        options = self.config["routes"]
        rules, per_head = options["rules"], options["per_head"]
        rules = getattr(self.model, "rules", None) if rules is None else rules
        per_head = getattr(self.model, "per_head", False) if per_head is None else per_head
        strict = options["strict"] or getattr(self.model, "strict_routing", False)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            routes = find_routes(self.model, rules or (), per_head=bool(per_head), strict=bool(strict))
        messages = [str(warning.message) for warning in told]
        if options["json"]:
            print(json.dumps(as_json(self.model, routes, messages), indent=1))
            return
        print_routes(routes, every_parameter=options["every_parameter"])
        elements = Counter[str]()
        for route in routes:
            elements[route.algorithm] += route.shape.numel()
        parts = ", ".join(f"{algorithm} {count:,}" for algorithm, count in sorted(elements.items(), reverse=True))
        print(f"{type(self.model).__name__}: {len(routes)} parameters; elements: {parts}")
        for message in messages:
            for line in f"warning: {message}".splitlines():  # rules to be copied
                say(line)


class _TrainerForData:
    """What a module has as its trainer here: it gives ``configure_model`` the data, on which sizes may depend.

    Args:
        build: Returns the data; called when they are asked for.
    """

    def __init__(self, build: Callable[[], LightningDataModule | None]) -> None:
        self._build = build

    @cached_property
    def datamodule(self) -> LightningDataModule | None:
        """The data."""
        return self._build()


def as_json(model: nn.Module, routes: Sequence[Route], messages: Sequence[str] = ()) -> dict[str, Any]:
    """Return routes as plain values.

    Args:
        model: Whose routes they are.
        routes: From :func:`~lightning_muon.optim.find_routes`.
        messages: What was warned of.

    Returns:
        ``model``, the path of its class; ``warnings``; and ``routes``, a dictionary for each parameter: ``name``,
        ``shape``, ``algorithm``, ``role``, ``confidence``, ``reason``, ``options``, and for Muon its ``layout``, of
        which it holds what differs from a plain (out, in) matrix.
    """
    kind = type(model)
    entries = [
        {
            "name": route.name,
            "shape": list(route.shape),
            "algorithm": route.algorithm,
            "role": route.role,
            "confidence": route.confidence,
            "reason": route.reason,
            "options": dict(route.options),
            **({"layout": _differences(route.layout)} if route.algorithm == "muon" else {}),
        }
        for route in routes
    ]
    return {"model": f"{kind.__module__}.{kind.__qualname__}", "warnings": list(messages), "routes": entries}


def _differences(layout: MatrixLayout) -> Mapping[str, Any]:
    plain = asdict(MatrixLayout())
    return {key: value for key, value in asdict(layout).items() if value != plain[key]}


def _expanded(args: Sequence[str]) -> list[str]:
    """Write out ``--model hf:gpt2``, ``timm:resnet50`` and ``some/config.json``, as the parser reads them."""
    written: list[str] = []
    arguments = iter(args)
    for arg in arguments:
        option, equals, value = arg.partition("=")
        if option != "--model":
            written.append(arg)
            continue
        value = value if equals else next(arguments, "")
        library, colon, name = value.partition(":")
        if colon and library in {"hf", "timm"}:
            path, key = (_HUGGING_FACE, "model_type") if library == "hf" else (_TIMM, "name")
            written += [f"--model={path}", f"--model.{key}={name}"]
        elif value.endswith(".json") or (Path(value) / "config.json").is_file():
            written += [f"--model={_HUGGING_FACE}", f"--model.config={value}"]
        else:
            written += [option, value] if value and not equals else [arg]
    return written
