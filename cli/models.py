"""Models of other libraries, by config: functions whose path stands where a config names the class of a network.

::

    model:
      net:
        class_path: lightning_muon.cli.models.hugging_face
        init_args: {model_type: gpt2, overrides: {n_layer: 4, vocab_size: 256}}

The libraries are imported when a function is called; none is a requirement of this package. Nothing is downloaded, and
no code of a folder is executed.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_muon.cli.errors.suggestions import nearest, nearest_path

# What is trained is looked for in this order, then among the other tasks.
_TASKS = ("Seq2SeqLM", "SpeechSeq2Seq", "MaskedLM", "CausalLM", "ImageTextToText", "ImageClassification")
_WEIGHTS = ContextVar("weights", default=True)


@contextmanager
def without_weights() -> Iterator[None]:
    """Let :func:`hugging_face` make models of any size on the meta device, where weights take no memory."""
    token = _WEIGHTS.set(False)
    try:
        yield
    finally:
        _WEIGHTS.reset(token)


def hugging_face(
    model_type: str | None = None,
    config: str | None = None,
    pretrained: str | None = None,
    model_class: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a model of Hugging Face's ``transformers``, in float32 and in training mode.

    Give one of the first three arguments.

    Args:
        model_type: An architecture by its name, such as ``gpt2``, of its default size and with random weights.
        config: A ``config.json``, or a folder with one: this architecture with random weights.
        pretrained: A folder that ``save_pretrained`` wrote or ``hf download`` fetched: this architecture and its
            weights.
        model_class: The class in ``transformers``, such as ``AutoModelForCausalLM`` or ``ViTForImageClassification``.
            Default: what the config names as its architecture; or else a class with an output head, if there is one.
        overrides: Values of the config that differ, by name, such as ``{"n_layer": 4}``; also below another, as in
            ``{"text_config": {"num_hidden_layers": 2}}``.

    Returns:
        The model as ``transformers`` makes it: its outputs have ``logits``. It keeps no cache of keys and values unless
        ``overrides`` say ``use_cache``.

    Raises:
        ModuleNotFoundError: If ``transformers`` is not installed.
        ValueError: If an argument is unknown to ``transformers``, or does not fit to the others.
        FileNotFoundError: If there is no such file or folder.
    """
    transformers = _imported("transformers")
    if sum(given is not None for given in (model_type, config, pretrained)) != 1:
        raise ValueError("hugging_face: give one of model_type, config and pretrained")
    overrides = overrides or {}
    folder = config or pretrained
    values: dict[str, Any] = _config_file(folder) if folder else {"model_type": model_type}
    settings = _settings(transformers, values, overrides)
    built = _class(transformers, model_class, settings, values.get("architectures"))
    if hasattr(settings, "use_cache") and "use_cache" not in overrides:
        settings.use_cache = False  # of use for generating only, and it takes memory in training
    weights = _WEIGHTS.get()
    try:
        model: nn.Module
        with nullcontext() if weights else torch.device("meta"):
            if pretrained and weights:
                model = built.from_pretrained(pretrained, config=settings, local_files_only=True, dtype=torch.float32)
            elif hasattr(built, "from_config"):
                model = built.from_config(settings, dtype=torch.float32)
            else:
                model = built(settings)
    except Exception as error:  # libraries raise what they like on values that do not fit to one another
        raise ValueError(f"hugging_face: {built.__name__} of {model_type or folder}: {_line(error)}") from error
    return model.train()  # Lightning leaves what is in evaluation mode there, as from_pretrained does


def timm_model(name: str, checkpoint: str | None = None, options: dict[str, Any] | None = None) -> nn.Module:
    """Build a model of ``timm`` by its name.

    Args:
        name: As ``timm.list_models()`` has it, such as ``vit_small_patch16_224``.
        checkpoint: A file with its weights. Default: random weights.
        options: Further arguments of ``timm.create_model``, such as ``{"num_classes": 10}``.

    Raises:
        ModuleNotFoundError: If ``timm``, or a package that it needs, is not installed.
        ValueError: If ``timm`` cannot be imported, or has no such model or option.
        FileNotFoundError: If there is no such checkpoint.
    """
    timm = _imported("timm")
    if not timm.is_model(name):
        raise ValueError(f"timm_model: timm has no model {name!r}{nearest(name, timm.list_models())}")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"timm_model: '{checkpoint}' does not exist{nearest_path(checkpoint)}")
    try:
        model: nn.Module = timm.create_model(name, checkpoint_path=checkpoint or "", **(options or {}))
    except Exception as error:
        raise ValueError(f"timm_model: {name} with {options}: {_line(error)}") from error
    return model


def _imported(library: str) -> Any:
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        missing = (error.name or library).partition(".")[0]
        what = f"{library} is needed" if missing == library else f"{library} needs {missing}"
        raise ModuleNotFoundError(f"{what}: pip install {missing}") from error
    except (ImportError, RuntimeError) as error:  # such as a torchvision that is not of the build of torch
        raise ValueError(f"{library} cannot be imported: {_line(error)}") from error


def _config_file(path: str) -> dict[str, Any]:
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"hugging_face: '{file}' does not exist{nearest_path(file)}; nothing is downloaded")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"hugging_face: '{file}' is not JSON: {_line(error)}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ValueError(f"hugging_face: '{file}' has no model_type: it is not the config of a model of transformers")
    return values


def _settings(transformers: Any, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Return the config object of a model."""
    model_type = values["model_type"]
    if model_type not in transformers.CONFIG_MAPPING:
        suggestion = nearest(model_type, transformers.CONFIG_MAPPING.keys())
        raise ValueError(f"hugging_face: transformers has no model_type {model_type!r}{suggestion}")
    kind = transformers.CONFIG_MAPPING[model_type]
    usual = kind()
    for key in overrides:
        if not hasattr(usual, key):  # transformers would take it, and do nothing with it
            raise ValueError(f"hugging_face: {kind.__name__} has no {key!r}{nearest(key, usual.to_dict())}")
    merged = {key: value for key, value in _merged(values, overrides).items() if key != "model_type"}
    try:
        return kind.from_dict(merged)
    except Exception as error:
        raise ValueError(f"hugging_face: {kind.__name__} with {dict(overrides)}: {_line(error)}") from error


def _merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**values, **overrides}
    for key in values.keys() & overrides.keys():
        if isinstance(values[key], Mapping) and isinstance(overrides[key], Mapping):
            merged[key] = _merged(values[key], overrides[key])
    return merged


def _class(transformers: Any, name: str | None, settings: Any, architectures: list[str] | None) -> Any:
    """Return the class of a model: one that was asked for, the config's, or one with an output head."""
    if name is not None:
        if not hasattr(getattr(transformers, name, None), "from_pretrained"):
            raise ValueError(f"hugging_face: transformers has no model {name!r}{nearest(name, dir(transformers))}")
        return getattr(transformers, name)
    for architecture in architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    others = sorted(other for other in dir(transformers) if other.startswith("AutoModelFor"))
    for auto in [*(f"AutoModelFor{task}" for task in _TASKS), *others]:
        if type(settings) in getattr(transformers, auto)._model_mapping:
            return getattr(transformers, auto)
    return transformers.AutoModel


def _line(error: BaseException) -> str:
    """Return the first line of a message; of a long list of what is valid, the beginning."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"
