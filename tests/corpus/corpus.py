"""The corpus of answers: how to build each architecture, what updates its parameters, and what routing says to it.

The files beside this one are the data; README.md says how to read them.
"""

import importlib
import importlib.util
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from lightning_muon.optim import find_routes
from lightning_muon.optim.routing.routing import Route
from lightning_muon.optim.update.matrix_layout import MatrixLayout
from tests.corpus.timm_alone import import_timm

FOLDER = Path(__file__).parent
Verdict = Literal["right", "guessed", "wrong with a warning", "wrong"]
"""``guessed`` is right, by a guess that the warning names."""

_MUON = ("matrix", "router")
_ADAMW = ("embedding", "head", "adapter", "vector", "other", "table", "adamw")


@dataclass(frozen=True)
class Answer:
    """What is to update a parameter, as the data say it: ``matrix blocks=3 transposed``."""

    role: str
    layout: MatrixLayout = field(default_factory=MatrixLayout)

    @classmethod
    def read(cls, text: str) -> "Answer":
        """Read an answer.

        Raises:
            ValueError: If a word is not known.
        """
        role, *words = text.split() or [""]
        layout: dict[str, Any] = {}
        for word in words:
            key, _, value = word.partition("=")
            if key in {"stacked", "transposed", "along_inputs"} and not value:
                layout[key] = True
            elif key in {"blocks", "interleaved"}:
                layout[key] = int(value)
            elif key == "split":
                layout["split_sizes"] = tuple(map(int, value.split(",")))
            else:
                raise ValueError(f"{text!r}: {word!r} is not known")
        if role not in _MUON + _ADAMW:
            raise ValueError(f"{text!r}: choose one of {', '.join(_MUON + _ADAMW)}")
        return cls(role, MatrixLayout(**layout))

    def fits(self, route: Route) -> bool:
        """Return whether a route is this answer."""
        if self.role in _MUON:
            meant, found = (_plain(layout, route.shape) for layout in (self.layout, route.layout))
            return (route.algorithm, route.role, found) == ("muon", self.role, meant)
        if route.algorithm != "adamw":
            return False
        if self.role == "vector":  # its essence is that it does not decay
            return route.role == "vector" or route.options.get("weight_decay") == 0.0
        if self.role == "table":
            return route.role in {"embedding", "vector", "other"}
        return self.role in {"adamw", route.role}


@dataclass(frozen=True)
class Entry:
    """One architecture of the corpus."""

    name: str
    library: str
    file: str
    build: Mapping[str, Any]
    answers: Mapping[str, str]
    shared: Mapping[str, str]

    def model(self) -> nn.Module:
        """Build the model, with random weights."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build(self.build)

    def patterns(self) -> Iterator[tuple[str, list[Answer]]]:
        """Yield patterns of names with the answers that are right, in the order in which they are tried."""
        for pattern, text in (self.answers | {k: t for k, t in self.shared.items() if k not in self.answers}).items():
            yield pattern, [Answer.read(one) for one in text.split("|")]


@dataclass(frozen=True)
class Judged:
    """The route of a parameter beside its answer."""

    route: Route
    pattern: str
    answers: list[Answer]
    verdict: Verdict

    @property
    def elements(self) -> int:
        """Number of elements of the parameter."""
        return self.route.parameter.numel()

    def __str__(self) -> str:
        trained = self.route.trained or self.route
        wanted = " or ".join(_said(answer.role, answer.layout) for answer in self.answers)
        actual = f"{trained.algorithm}, {_said(trained.role, trained.layout)} ({trained.reason}; {trained.confidence})"
        return f"{self.route.name} {tuple(self.route.shape)}: {actual}, not {wanted}"


def _said(role: str, layout: MatrixLayout) -> str:
    changed = {key: value for key, value in asdict(layout).items() if value != asdict(MatrixLayout())[key]}
    return " ".join([role, *(f"{key}={value}" for key, value in changed.items())])


def _plain(layout: MatrixLayout, shape: Sequence[int]) -> tuple[Any, ...]:
    """Return what a layout means for a shape.

    Blocks and equal ``split_sizes`` are the same; which way round a whole square matrix is stored changes nothing.
    """
    sizes = layout.split_sizes
    blocks = len(sizes) if len(set(sizes)) == 1 else layout.blocks
    sizes = sizes if len(set(sizes)) > 1 else ()
    if not sizes and blocks == 1:
        _, rows, *columns = shape if layout.stacked else (1, *shape)
        return layout.stacked, layout.transposed and rows != math.prod(columns)
    return layout.stacked, layout.transposed, blocks, sizes, layout.interleaved, layout.along_inputs


@cache
def entries() -> dict[str, Entry]:
    """Return all entries by name, in the order of the files.

    Raises:
        ValueError: If a name comes twice, or an entry has other keys.
    """
    found: dict[str, Entry] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        data = yaml.safe_load(path.read_text())
        shared = data.get("shared", {})
        for name, entry in data["models"].items():
            if name in found:
                raise ValueError(f"{path}: {name} comes twice")
            if unknown := set(entry) - {"build", "like", "answers"}:
                raise ValueError(f"{path}: {name}: what is {', '.join(map(str, unknown))}?")
            common: dict[str, str] = {}
            for key in entry.get("like", ()):
                common = common | {pattern: text for pattern, text in shared[key].items() if pattern not in common}
            library = path.stem.partition("-")[0].replace("_", " ")
            found[name] = Entry(name, library, path.name, entry["build"], entry.get("answers") or {}, common)
    return found


def missing(build: Mapping[str, Any]) -> str:
    """Return the name of the library that an entry needs and that is not installed, or nothing."""
    names = [name for name in ("transformers", "diffusers", "peft", "timm") if name in build]
    names += ["transformers"] if "peft" in build else []
    names += [build["class"].partition(".")[0]] if "class" in build else []
    names += ["torch_geometric"] if build.get("class", "").startswith("tests.corpus.graphs") else []
    return next((name for name in names if importlib.util.find_spec(name) is None), "")


def build(how: Mapping[str, Any]) -> nn.Module:
    """Build a model by the keys of an entry."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is built from configs
    how = dict(how)
    config = dict(how.pop("config", {}))
    model: nn.Module
    if "peft" in how:
        peft = importlib.import_module("peft")
        config = {key: tuple(value) if key.endswith("_tuple") else value for key, value in config.items()}
        model = peft.get_peft_model(build(how["base"]), getattr(peft, how["peft"])(**config))
    elif "transformers" in how:
        transformers = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()
        model_type = config.pop("model_type")
        settings = transformers.AutoConfig.for_model(model_type, **config)
        cls = getattr(transformers, how["transformers"])
        model = cls.from_config(settings) if how["transformers"].startswith("Auto") else cls(settings)
    elif "timm" in how:
        timm = import_timm()
        module, _, name = how["timm"].rpartition(".")
        create = getattr(importlib.import_module(module), name) if module else partial(timm.create_model, name)
        model = create(**config)
    elif "diffusers" in how:
        model = getattr(importlib.import_module("diffusers"), how["diffusers"])(**config)
    else:
        module, _, name = how["class"].rpartition(".")
        model = getattr(importlib.import_module(module), name)(**config)
    return model


def judge(entry: Entry, model: nn.Module) -> list[Judged]:
    """Route a model, and compare with the answers of its entry.

    Raises:
        ValueError: If a pattern of the entry matches no parameter, or a parameter has no answer.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        routes = find_routes(model)
    warned = "\n".join(str(warning.message) for warning in caught)
    ruled = re.findall(r"""Rule\(["']([^"']+)["']""", warned)
    patterns = list(entry.patterns())
    used: set[str] = set()
    judged, unknown = [], []
    for route in routes:
        fitting = ((pattern, answers) for pattern, answers in patterns if fnmatchcase(route.name, pattern))
        first = ("", [Answer("vector")]) if route.parameter.ndim < 2 else next(fitting, None)
        if first is None:
            unknown.append(f"{route.name} {tuple(route.shape)}")
            continue
        used.add(first[0])
        trained = route.trained or route
        said = route.name in warned or any(fnmatchcase(route.name, pattern) for pattern in ruled)
        guess = trained.confidence == "guess" and (said or not route.parameter.requires_grad)
        if any(answer.fits(trained) for answer in first[1]):
            verdict: Verdict = "guessed" if guess else "right"
        else:
            verdict = "wrong with a warning" if guess else "wrong"
        judged.append(Judged(route, *first, verdict))
    if unknown:
        raise ValueError(f"{entry.name} has no answer for {', '.join(unknown)}")
    if idle := [pattern for pattern in entry.answers if pattern not in used]:
        raise ValueError(f"{entry.name}: no parameter's first pattern is {', '.join(idle)}")
    return judged


def elements(judged: list[Judged], *verdicts: Verdict) -> int:
    """Return the number of elements of the parameters with some verdicts."""
    return sum(one.elements for one in judged if one.verdict in verdicts)
