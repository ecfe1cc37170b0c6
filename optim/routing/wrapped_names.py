"""Names of modules and parameters without the prefixes of wrappers."""

# The names that torch.compile, activation checkpointing and FSDP give to the module that they wrap.
WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def plain_name(name: str) -> str:
    """Return the name that a module or parameter has without wrappers: ``"head._orig_mod"`` is ``"head"``."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)
