"""Which layer is the output head, for common models."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from lightning_muon.optim import find_routes


def heads(model: nn.Module) -> set[str]:
    """Names of the heads, without the ``.weight``."""
    return {route.name.removesuffix(".weight") for route in find_routes(model) if "output head" in route.reason}


def mlp(*widths: int) -> nn.Sequential:
    layers = [nn.Linear(fan_in, fan_out) for fan_in, fan_out in itertools.pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


def modules(**parts: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(parts)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))
        self.score = nn.Linear(8, 1)
        self.proj = nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.head = nn.Linear(16, 16)
        self.down = nn.Linear(16, 8)


class Residual(nn.Module):
    """The anatomy of a block of torchvision's ResNet, of which the first of a stage has a layer more."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.downsample = nn.Conv2d(inputs, 8, 1) if inputs != 8 else None


def tied(embedding: nn.Embedding, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(8, embedding.num_embeddings, bias=bias)
    layer.weight = embedding.weight
    return layer


@pytest.mark.parametrize("name", ["net", "classifier", "critic"])
def test_one_network_in_a_module(name: str) -> None:
    assert heads(modules(**{name: mlp(8, 16, 16, 3)})) == {f"{name}.4"}


def test_frozen_layers_are_neither_heads_nor_twins() -> None:
    network = mlp(8, 16, 3)
    frozen = copy.deepcopy(network).requires_grad_(False)
    assert heads(modules(q=network, target=frozen)) == {"q.2"}
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).requires_grad_(False)
    assert heads(modules(net=network, vgg=convolution)) == {"net.2"}
    assert heads(modules(net=network, vgg=modules(features=convolution, classifier=frozen))) == {"net.2"}


def test_networks_side_by_side_have_a_head_each() -> None:
    assert heads(modules(actor=mlp(8, 16, 4), critic=mlp(8, 16, 1))) == {"actor.2", "critic.2"}
    twins = modules(actor=mlp(8, 16, 4), q1=mlp(12, 16, 1), q2=mlp(12, 16, 1))
    assert heads(twins) == {"actor.2", "q1.2", "q2.2"}
    dueling = modules(trunk=mlp(8, 16, 16), value=mlp(16, 16, 1), advantage=mlp(16, 16, 4))
    assert heads(dueling) == {"value.2", "advantage.2"}


def test_a_named_head_speaks_for_its_own_network_only() -> None:
    actor = modules(trunk=mlp(8, 16, 16), head=nn.Linear(16, 4), extra=nn.Linear(8, 8))
    assert heads(modules(actor=actor, critic=mlp(8, 16, 1))) == {"actor.head", "critic.2"}


def test_a_tied_head_speaks_for_its_own_network_only() -> None:
    embedding = nn.Embedding(32, 8)
    language = modules(embedding=embedding, trunk=mlp(8, 16, 8), output=tied(embedding))
    assert heads(modules(language=language, value=mlp(8, 16, 1))) == {"language.embedding", "value.2"}
    assert heads(language) == {"embedding"}
    assert heads(modules(**dict(language.items()), auxiliary=nn.Linear(8, 8))) == {"embedding"}


def test_a_frozen_tied_head_is_a_head_still() -> None:
    embedding = nn.Embedding(32, 8)
    embedding.weight.requires_grad_(False)
    assert heads(modules(embedding=embedding, trunk=mlp(8, 16, 8), output=tied(embedding))) == set()


def test_layers_beside_the_last_with_the_same_input_are_heads_too() -> None:
    policy = modules(trunk=mlp(8, 16, 16), mean=nn.Linear(16, 4), deviation=nn.Linear(16, 4))
    assert heads(policy) == {"mean", "deviation"}
    assert heads(modules(actor=policy, q=mlp(12, 16, 1))) == {"actor.mean", "actor.deviation", "q.2"}
    assert heads(modules(fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 8), fc3=nn.Linear(8, 3))) == {"fc3"}
    joined = modules(state=nn.Linear(8, 16), action=nn.Linear(4, 16), value=nn.Linear(32, 1))
    assert heads(joined) == {"value"}


def test_stages_of_one_network_have_one_head() -> None:
    assert heads(modules(encoder=mlp(8, 16, 4), decoder=mlp(4, 16, 8))) == {"decoder.2"}
    assert heads(modules(project=nn.Linear(8, 16), network=mlp(32, 16, 3))) == {"network.2"}  # joined with more
    convolutions = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3))
    assert heads(modules(features=convolutions, fc1=nn.Linear(8 * 9, 16), fc2=nn.Linear(16, 3))) == {"fc2"}
    assert heads(modules(features=convolutions, mlp=mlp(8 * 9, 16, 3))) == {"mlp.2"}
    up = nn.Sequential(nn.ConvTranspose2d(8, 4, 2), nn.Conv2d(4, 4, 3))
    assert heads(modules(down=convolutions, up=up, out=nn.Conv2d(4, 1, 1))) == {"out"}


def test_a_stage_is_recognised_by_channels_as_they_are_stored() -> None:
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 3, 1))
    assert heads(modules(a=nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)), b=grouped)) == {"b.1"}
    transposed = nn.Sequential(nn.ConvTranspose2d(8, 4, 2), nn.Conv2d(4, 3, 1))
    assert heads(modules(a=nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)), b=transposed)) == {"b.1"}


@pytest.mark.parametrize(
    "name",
    ["head", "lm_head", "cls_classifier", "visual_projection", "text_projection", "logits", "score", "action_head"],
)
def test_names(name: str) -> None:
    model = modules(trunk=mlp(8, 16, 8), **{name: nn.Linear(8, 8)}, auxiliary=nn.Linear(8, 8))
    assert heads(model) == {name}


@pytest.mark.parametrize("name", ["header", "overhead", "pre_logits", "headless"])
def test_what_only_resembles_a_name(name: str) -> None:
    assert heads(modules(trunk=mlp(8, 16, 8), **{name: nn.Linear(8, 8)}, output=nn.Linear(8, 3))) == {"output"}


def test_a_module_that_is_called_a_head_ends_with_it() -> None:
    assert heads(modules(trunk=mlp(8, 8), head=mlp(8, 16, 3), after=nn.Linear(8, 8))) == {"head.2"}
    double = modules(trunk=mlp(8, 8), lm_head=nn.Linear(8, 32), choice_head=modules(summary=nn.Linear(8, 1)))
    assert heads(double) == {"lm_head", "choice_head.summary"}
    tasks = nn.ModuleDict({"a": mlp(8, 16, 3), "b": nn.Linear(8, 2)})
    assert heads(modules(trunk=mlp(8, 8), heads=tasks)) == {"heads.a.2", "heads.b"}
    assert heads(modules(trunk=mlp(8, 8).requires_grad_(False), heads=tasks)) == {"heads.a.2", "heads.b"}


def test_a_module_that_is_called_a_head_but_leads_to_the_output_layer() -> None:
    """The transform of ModernBERT is called so; its decoder may be tied or not."""
    embedding = nn.Embedding(32, 8)
    transform = modules(dense=nn.Linear(8, 8), norm=nn.LayerNorm(8))
    assert heads(modules(embedding=embedding, trunk=mlp(8, 8), head=transform, decoder=tied(embedding))) == {
        "embedding"
    }
    assert heads(modules(trunk=mlp(8, 8), head=transform, decoder=nn.Linear(8, 32))) == {"decoder"}


def test_beside_a_tied_head_stands_another() -> None:
    """BertForPreTraining: the prediction of words is tied, that of the next sentence is not."""
    embedding = nn.Embedding(32, 8)
    bert = modules(embeddings=embedding, encoder=nn.ModuleList([Block()]), pooler=nn.Linear(8, 8))
    predictions = modules(transform=nn.Linear(8, 8), decoder=tied(embedding))
    model = modules(bert=bert, cls=modules(predictions=predictions, seq_relationship=nn.Linear(8, 2)))
    assert heads(model) == {"bert.embeddings", "cls.seq_relationship"}


def test_a_name_inside_an_attention_or_a_block_does_not_count() -> None:
    assert heads(modules(encoder=nn.Linear(8, 8), att=Attention(), fc=nn.Linear(8, 3))) == {"fc"}
    assert heads(nn.Sequential(Attention(), Attention(), nn.Linear(8, 3))) == {"2"}
    assert heads(nn.Sequential(Block(), Block(), nn.Linear(8, 3))) == {"2"}
    assert heads(nn.Sequential(nn.ModuleList([Block()]), nn.Linear(8, 3))) == {"1"}
    named = modules(proj=nn.Linear(8, 8), score=nn.Linear(8, 1))
    assert heads(modules(encoder=nn.Linear(8, 8), attn_pool=named, fc=nn.Linear(8, 3))) == {"fc"}


def test_a_model_that_is_called_after_its_attention_has_a_head() -> None:
    class HierarchicalAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.Linear(8, 8)
            self.fc = nn.Linear(8, 3)

    assert heads(HierarchicalAttention()) == {"fc"}


@pytest.mark.parametrize(
    "trunk",
    [
        nn.ModuleList([Block()]),
        nn.Sequential(Block(), Block()),
        modules(a=Block(), b=Block()),
        nn.Sequential(Residual(4), Residual(8)),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        modules(layer=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        nn.MultiheadAttention(8, 2),
    ],
)
def test_without_a_head_no_block_is_taken_for_one(trunk: nn.Module) -> None:
    assert heads(modules(embedding=nn.Embedding(8, 8), trunk=trunk)) == set()


def test_a_list_of_layers_is_a_network() -> None:
    assert heads(modules(layers=nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 3)]))) == {"layers.1"}


def test_wrappers_do_not_hide_a_name() -> None:
    model = modules(trunk=mlp(8, 16, 8), lm_head=torch.compile(nn.Linear(8, 5)), auxiliary=nn.Linear(8, 8))
    assert heads(model) == {"lm_head"}
    assert heads(modules(net=torch.compile(model))) == {"net.lm_head"}
    network = modules(trunk=mlp(8, 16, 16), heads=torch.compile(nn.ModuleList([nn.Linear(16, 2), nn.Linear(16, 3)])))
    assert heads(network) == {"heads.0", "heads.1"}
    fused = nn.ModuleDict({"qkv": torch.compile(nn.Linear(8, 48)), "proj": torch.compile(nn.Linear(16, 8))})
    route = find_routes(modules(block=torch.compile(fused), head=nn.Linear(8, 2)))[0]
    assert (route.name, route.layout.blocks) == ("block.qkv.weight", 3)


def test_a_layer_under_two_names_is_judged_by_that_of_a_head() -> None:
    shared = nn.Linear(8, 8)
    assert heads(modules(first=shared, lm_head=shared, last=nn.Linear(8, 8))) == {"first"}
    trunk = mlp(8, 16, 8)
    assert heads(modules(trunk=trunk, fc=nn.Linear(8, 3), backbone=trunk)) == {"fc"}


def confidences(model: nn.Module) -> dict[str, str]:
    """How sure each head is, and each layer that may be one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        routes = find_routes(model)
    said = [route for route in routes if route.role == "head" or route.confidence == "guess"]
    return {route.name.removesuffix(".weight"): f"{route.role}, {route.confidence}" for route in said}


def test_what_takes_the_input_of_a_named_head_is_one_too() -> None:
    policy = modules(trunk=mlp(8, 16, 16), mean=nn.Linear(16, 3), spread=nn.Linear(16, 3), q=mlp(11, 16, 1))
    assert confidences(policy) == {"mean": "head, by name", "spread": "head, by name", "q.2": "head, known"}


def test_heads_that_were_registered_before_the_body_take_its_output() -> None:
    tasks = modules(age=nn.Linear(16, 1), name=nn.Linear(16, 7))
    assert heads(modules(tasks=tasks, body=mlp(8, 32, 16))) == {"tasks.age", "tasks.name"}


def test_a_parametrized_layer_of_one_row_is_the_end() -> None:
    norm = nn.utils.parametrizations.spectral_norm
    critic = nn.Sequential(norm(nn.Conv2d(2, 8, 3)), norm(nn.Conv2d(8, 16, 3)), nn.Flatten(), norm(nn.Linear(64, 1)))
    assert heads(modules(critic=critic)) == {"critic.3.parametrizations.weight.original"}


def test_a_norm_behind_a_layer_takes_nothing_from_it() -> None:
    last = nn.Sequential(nn.Conv1d(24, 20, 3), nn.BatchNorm1d(20))
    sound = modules(stem=nn.Linear(20, 32), block=mlp(32, 24), layers=nn.ModuleList([nn.Conv1d(24, 24, 3), last]))
    assert confidences(sound) == {"layers.1.0": "head, guess"}


@pytest.mark.parametrize("name", ["feat_out", "mel_out", "conv_post"])
def test_a_layer_that_is_called_an_output_is_a_guess_where_another_could_go_on(name: str) -> None:
    model = modules(body=mlp(8, 16, 16), **{name: nn.Linear(16, 40), "layers": mlp(40, 24, 24, 40)})
    assert confidences(model)[name] == "head, guess"


def test_one_of_two_towers_alone_is_a_guess_where_another_could_go_on() -> None:
    towers = {"visual_projection": nn.Linear(16, 8), "text_projection": nn.Linear(16, 8)}
    assert set(confidences(modules(body=mlp(8, 16), **towers)).values()) == {"head, by name"}
    inner = modules(body=mlp(8, 16), text_projection=nn.Linear(16, 16), decoder=mlp(16, 16, 3))
    assert confidences(inner) == {"text_projection": "head, guess", "decoder.2": "head, known"}


def test_a_list_of_single_layers_that_keep_the_width_is_a_guess() -> None:
    sides = nn.ModuleList(nn.Conv2d(width, width, 1) for width in (8, 16))
    model = modules(sides=sides, middle=nn.Conv2d(16, 16, 1), down=nn.Conv2d(3, 8, 3), end=nn.Conv2d(16, 3, 1))
    expected = dict.fromkeys(("sides.0", "sides.1", "middle"), "matrix, guess")
    assert confidences(model) == {**expected, "end": "head, known"}
