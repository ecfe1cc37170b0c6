"""``${from_data:classes}`` in a config: a value that the data knows, such as the number of classes in a folder.

The data module is made of its part of the config, before the run's own, and asked for the attribute. So the network has
the size that the data needs, and the config that is saved with the run holds the number. The run's data module gets the
cached properties of the first one, so that files are read once.
"""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from inspect import getattr_static
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from omegaconf import Container, DictConfig, OmegaConf

from lightning_muon.cli.errors.suggestions import nearest


class DataValueError(ValueError):
    """The data cannot give a value; the message is that of the data module, or says what it has."""


class FromData:
    """The resolver of ``from_data`` for the configs of one program.

    Args:
        datamodule_class: The chosen class of the data; the section has its arguments.
    """

    def __init__(self, datamodule_class: Callable[..., LightningDataModule] | None) -> None:
        self.datamodule_class = datamodule_class
        self._made: tuple[str, LightningDataModule] | None = None

    def register(self) -> None:
        """Let configs have ``${from_data:…}`` from now on."""
        register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver  # before 2.4
        register("from_data", self, replace=True)

    def __call__(self, name: str, *, _parent_: Container) -> Any:
        """Return an attribute of the data.

        Args:
            name: Of the attribute.
            _parent_: The place of the interpolation in the config.

        Raises:
            DataValueError: If there is no data or no such attribute, or the data module refuses.
        """
        section = _data_section(_parent_)
        try:
            data = self._data(section)
            return getattr(data, name)
        except AttributeError:
            others = [other for other in dir(type(data)) if not other.startswith("_")]
            what = f"${{from_data:{name}}}: {type(data).__name__} has no {name!r}"
            raise DataValueError(f"{what}{nearest(name, others)}") from None
        except (OSError, TypeError, ValueError, ModuleNotFoundError) as error:
            raise DataValueError(str(error)) from error

    def hand_over(self, data: LightningDataModule | None, section: Namespace | None) -> None:
        """Give the run's own data module what was read for the config.

        That is what is in the cached properties: they follow from the arguments. The module is not used as it is,
        because the parser makes the arguments of the run's own, and Lightning records its hyperparameters.

        Args:
            data: The data module of the run.
            section: The arguments that it was made of; ``None`` if it takes none.
        """
        written = _written(section.as_dict() if section else {})
        if self._made is None or self._made[0] != written or type(self._made[1]) is not type(data):
            return
        for name, value in vars(self._made[1]).items():
            if isinstance(getattr_static(type(data), name, None), cached_property):
                vars(data).setdefault(name, value)
        self._made = None

    def _data(self, section: dict[str, Any]) -> LightningDataModule:
        """Return the data module of a section of the config, the one before if nothing has changed."""
        written = _written(section)
        if self._made is None or self._made[0] != written:
            if self.datamodule_class is None:
                raise DataValueError("there is no data: choose some by --data")
            self._made = written, self.datamodule_class(**section)
        return self._made[1]


def _written(section: Mapping[str, Any]) -> str:
    return json.dumps(section, sort_keys=True, default=str)


def _data_section(node: Any) -> dict[str, Any]:
    """Return the section ``data`` of the subcommand that a node belongs to, empty if there is none."""
    while node is not None and not ("data" in node and "model" in node):
        node = node._get_parent()
    data = node["data"] if node is not None else None
    section = OmegaConf.to_container(data, resolve=True) if isinstance(data, DictConfig) else {}
    return {str(key): value for key, value in section.items()} if isinstance(section, dict) else {}
