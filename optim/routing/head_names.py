"""Names that tell of output heads: where they are, and where they are not."""

import re

_TOWERS = "(text|visual|vision|image|audio)_projection"  # the two outputs of CLIP and similar models
_HEAD = re.compile(
    r"(^|_)(heads?|(?<!pre_)classifiers?|(?<!pre_)logits|score|unembed|unembedding|embed_out"
    rf"|{_TOWERS})$",
    re.IGNORECASE,
)
_TOWER = re.compile(rf"{_TOWERS}$", re.IGNORECASE)
_POSITION = re.compile(r"(^|_)(pos|position|query|ref|reference)(_|$)", re.IGNORECASE)
_INNER = re.compile(r"(^|_)(gates?|gating|routers?|pos|position|ref)(_|$)", re.IGNORECASE)
_MODULATION = re.compile(r"ada|modulat|norm|scale|shift|cond|time|temb", re.IGNORECASE)
_LAST = re.compile(
    r"(^|_)((out|output)(_layer)?|conv_out|conv_post|proj_out|final(_\w+)?|preds?|predictions?|predictors?|generator"
    r"|(b?box|class|cls|mask)_embed"  # predictors of detectors
    r"|mean|mu|log_?std|log_?var|sigma)$",
    re.IGNORECASE,
)
_OUTPUT = re.compile(r"(^|[_.])((feat|feature|mel|spec|wave?|proj)_out|conv_post)$", re.IGNORECASE)
_ENCODER = re.compile(r"(^|_)encoder$", re.IGNORECASE)
_CRITIC = re.compile(
    r"(^|_)(disc|discriminators?|critics?|adversary|net_?d|d|q|qf|q_?nets?|vf?)(\d|_|$)", re.IGNORECASE
)


def is_head_name(name: str) -> bool:
    """Return whether a module of this name is a head."""
    return bool(_HEAD.search(name) and not _POSITION.search(name))


def is_tower_name(name: str) -> bool:
    """Return whether a head is one of several that give vectors of one space, such as those of texts and of images."""
    return bool(_TOWER.search(name))


def is_critic_name(name: str) -> bool:
    """Return whether a module of this name judges the outputs of the networks beside it."""
    return bool(_CRITIC.search(name))


def is_encoder_name(name: str) -> bool:
    """Return whether a module of this name gives what others go on with."""
    return bool(_ENCODER.search(name))


def in_encoder(path: str) -> bool:
    """Return whether a layer is in an encoder."""
    return any(is_encoder_name(name) for name in path.split("."))


def is_called_inner(path: str) -> bool:
    """Return whether a layer is called a gate, a router or a part of positions."""
    return any(_INNER.search(name) for name in path.split("."))


def is_called_modulation(path: str) -> bool:
    """Return whether a layer is called after what scales and shifts others, as in adaptive norms."""
    return bool(_MODULATION.search(path))


def is_called_output(path: str) -> bool:
    """Return whether a layer is called after what a model gives, such as the features of sound or the projection."""
    return bool(_OUTPUT.search(path))


def is_called_last(path: str) -> bool:
    """Return whether a layer, or the module around it, has a usual name of a last one."""
    names = [name for name in path.split(".") if name != "layers" and not name.isdecimal()]
    return any(_LAST.search(name) for name in names[-2:])
