"""What becomes of the arguments of a class when another class takes its place.

Where ``--model.optimizer AdamW`` follows ``MuonAdamW``, jsonargparse keeps each argument that ``AdamW`` takes as well,
defaults included: ``AdamW`` would have the weight decay of ``MuonAdamW``. Here only interpolations pass on, such as
``classes: ${from_data:classes}``: they say where a value comes from, whatever the class.
"""

from typing import Any

from jsonargparse import Namespace, _typehints
from lightning.pytorch.cli import LightningArgumentParser


class ClassesKeepArguments(LightningArgumentParser):
    """A parser in which the arguments of a class, and of a class among them, are for that class only."""


_keep_what_is_valid = _typehints.discard_init_args_on_class_path_change


def _keep_interpolations(parser_or_action: Any, before: Any, new: Any) -> None:
    """Take away the arguments of a class that another one follows.

    Args:
        parser_or_action: The parser of the new class, or the action of the argument that the class is.
        before: The class before, as ``class_path`` and ``init_args``; changed in place.
        new: The new class.
    """
    parser = parser_or_action
    if isinstance(parser, _typehints.ActionTypeHint):
        options = getattr(parser, "sub_add_kwargs", {})
        parser = parser.get_class_parser(new["class_path"], options)  # type: ignore[no-untyped-call]
    named = isinstance(before, Namespace) and before.get("class_path") is not None
    if not (named and isinstance(parser, ClassesKeepArguments)):
        _keep_what_is_valid(parser_or_action, before, new)  # type: ignore[no-untyped-call]
        return
    if before["class_path"] == new["class_path"]:
        return
    takes = {action.dest for action in parser._actions}
    arguments = before.get("init_args") or Namespace()  # type: ignore[no-untyped-call]
    for name, value in list(vars(arguments).items()):
        if not (name in takes and isinstance(value, str) and "${" in value):
            del arguments[name]
    before.pop("dict_kwargs")


# There is no setting for it. Parsers of other programs in this process are left as they are.
_typehints.discard_init_args_on_class_path_change = _keep_interpolations
