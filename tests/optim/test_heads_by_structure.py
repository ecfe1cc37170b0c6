"""Which layers are output heads where the structure of the model says so, and where it only suggests it."""

import itertools
import warnings

import pytest
import torch
from torch import nn

from lightning_muon.optim import Route, find_routes


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(len(widths) - 1):
        layers += [nn.Linear(widths[index], widths[index + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Net(nn.Module):
    """A module with these parts; a class of its own for each use keeps parts from being twins of each other."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Block(Net):
    def __init__(self, width: int = 16) -> None:
        super().__init__(norm=nn.LayerNorm(width), up=nn.Linear(width, 4 * width), down=nn.Linear(4 * width, width))


class BoxMLP(Net):
    """The predictor of boxes in DETR."""

    def __init__(self) -> None:
        super().__init__(layers=nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)]))


class Generator(Net):
    def __init__(self) -> None:
        up = nn.ConvTranspose2d(16, 8, 3)
        super().__init__(model=nn.Sequential(nn.Conv2d(3, 8, 7), nn.Conv2d(8, 16, 3), up, nn.Conv2d(8, 3, 7)))


class GraphConv(Net):
    """As PyG's GCNConv: the layer, and a bias of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(lin=nn.Linear(inputs, outputs, bias=False))
        self.bias = nn.Parameter(torch.zeros(outputs))


class SageConv(Net):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(lin_l=nn.Linear(inputs, outputs), lin_r=nn.Linear(inputs, outputs, bias=False))


class NeRF(Net):
    def __init__(self) -> None:
        points = nn.ModuleList([nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(38, 32)])
        views = nn.ModuleList([nn.Linear(36, 16)])
        heads = {"alpha_linear": nn.Linear(32, 1), "rgb_linear": nn.Linear(16, 3)}
        super().__init__(pts_linears=points, views_linears=views, feature_linear=nn.Linear(32, 32), **heads)


def blocks(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


def heads(model: nn.Module) -> set[str]:
    """The heads, of which none may be a guess."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return set(guessed(model))


def guessed(model: nn.Module) -> dict[str, Route]:
    routes = find_routes(model)
    return {route.name.removesuffix(".weight"): route for route in routes if route.role == "head"}


def test_what_no_layer_takes_is_a_head_beside_another() -> None:
    """One head that is found by its name leaves the others to be found."""
    detector = Net(stem=nn.Conv2d(3, 16, 3), blocks=blocks(), cls_score=nn.Linear(16, 9), bbox_pred=nn.Linear(16, 36))
    assert heads(detector) == {"cls_score", "bbox_pred"}
    distilled = Net(blocks=blocks(), norm=nn.LayerNorm(16), head=nn.Linear(16, 10), head_dist=nn.Linear(16, 10))
    assert heads(distilled) == {"head", "head_dist"}
    named_last = Net(blocks=blocks(), norm=nn.LayerNorm(16), aux=nn.Linear(16, 7), head=nn.Linear(16, 10))
    assert heads(named_last) == {"aux", "head"}


def test_predictors_of_detr() -> None:
    last = "layers.2"
    assert heads(Net(blocks=blocks(), class_embed=nn.Linear(16, 9), bbox_embed=BoxMLP())) == {
        "class_embed",
        f"bbox_embed.{last}",
    }
    lists = {"class_embed": nn.ModuleList(nn.Linear(16, 9) for _ in range(2))}
    lists["bbox_embed"] = nn.ModuleList(BoxMLP() for _ in range(2))
    found = {f"{name}.{index}" for name in ("class_embed",) for index in range(2)}
    assert heads(Net(blocks=blocks(), **lists)) == found | {f"bbox_embed.{index}.{last}" for index in range(2)}


def test_boxes_that_an_earlier_module_takes_back() -> None:
    """Iterative refinement encodes the boxes of the layer before."""
    encode = Net(fc1=nn.Linear(4, 32), fc2=nn.Linear(32, 16))
    model = Net(ref_point_encoding=encode, blocks=blocks(), class_embed=nn.Linear(16, 9), bbox_embed=BoxMLP())
    assert heads(model) == {"class_embed", "bbox_embed.layers.2"}
    scale = Net(layers=nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 2)]))
    decoder = Net(blocks=blocks(), ref_anchor_head=scale, bbox_embed=BoxMLP())
    shared = Net(ref_point_encoding=encode, decoder=decoder, class_embed=nn.Linear(16, 9))
    assert heads(shared) == {"decoder.bbox_embed.layers.2", "class_embed"}


def test_an_image_comes_out_as_it_went_in() -> None:
    """The last layer registered is one of the middle, as in AutoencoderKL."""
    encoder = Net(conv_in=nn.Conv2d(3, 16, 3), conv_out=nn.Conv2d(16, 8, 3))
    decoder = Net(conv_in=nn.Conv2d(4, 16, 3), conv_out=nn.Conv2d(16, 3, 3))
    middle = {"quant_conv": nn.Conv2d(8, 8, 1), "post_quant_conv": nn.Conv2d(4, 4, 1)}
    assert heads(Net(encoder=encoder, decoder=decoder, **middle)) == {"decoder.conv_out"}


def test_scale_and_shift_of_the_last_norm_are_hidden() -> None:
    """DiT: six vectors for each block, two for the last norm; the output is beside them."""
    final = Net(
        norm=nn.LayerNorm(16), linear=nn.Linear(16, 9), adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(16, 32))
    )
    model = Net(x_embedder=nn.Conv2d(5, 16, 2), blocks=blocks(), final_layer=final)
    assert heads(model) == {"final_layer.linear"}
    pixart = Net(
        proj=nn.Conv2d(4, 16, 2), blocks=blocks(), proj_out=nn.Linear(16, 7), adaln_single=Net(linear=nn.Linear(16, 96))
    )
    assert heads(pixart) == {"proj_out"}


def test_the_last_convolution_of_a_graph_network() -> None:
    def network(*widths: int) -> nn.Module:
        return Net(convs=nn.ModuleList(GraphConv(*pair) for pair in itertools.pairwise(widths)))

    assert heads(network(8, 32, 32, 5)) == {"convs.2.lin"}
    assert heads(network(8, 5)) == {"convs.0.lin"}
    assert heads(Net(conv1=GraphConv(8, 32), conv2=GraphConv(32, 5))) == {"conv2.lin"}
    sage = nn.ModuleList([SageConv(8, 32), SageConv(32, 32), SageConv(32, 5)])
    assert heads(Net(convs=sage)) == {"convs.2.lin_l", "convs.2.lin_r"}
    with pytest.warns(UserWarning, match=r"convs.2.lin.weight \(32, 32\): hidden matrix, .* no output head was found"):
        assert not guessed(network(8, 32, 32, 32))


def test_two_generators_and_their_judges() -> None:
    judge = {f"netD_{name}": nn.Sequential(nn.Conv2d(3, 8, 4), nn.Conv2d(8, 1, 4)) for name in "AB"}
    ends = {"netG_A.model.3", "netG_B.model.3"}
    assert heads(Net(netG_A=Generator(), netG_B=Generator(), **judge)) == ends | {"netD_A.1", "netD_B.1"}
    assert heads(Net(ab=Generator(), ba=Generator())) == {"ab.model.3", "ba.model.3"}


def test_what_another_network_judges_is_an_output() -> None:
    assert heads(Net(generator=mlp(10, 32, 64), discriminator=mlp(64, 32, 1))) == {"generator.2", "discriminator.2"}
    with pytest.warns(UserWarning, match=r"adamw updates first.2.weight .* a later one could take its 16 outputs"):
        guessed(Net(first=mlp(10, 32, 16), second=mlp(20, 32, 1)))


@pytest.mark.parametrize("member", [lambda: mlp(8, 32, 32, 3), lambda: Net(body=mlp(8, 32, 16), fc=nn.Linear(16, 3))])
def test_each_member_of_an_ensemble_has_a_head(member: type[nn.Module]) -> None:
    members = [member() for _ in range(3)]
    end = "4" if isinstance(members[0], nn.Sequential) else "fc"
    assert heads(nn.ModuleList(members)) == {f"{index}.{end}" for index in range(3)}
    assert heads(Net(members=nn.ModuleList(members))) == {f"members.{index}.{end}" for index in range(3)}


def test_colour_and_density() -> None:
    assert heads(NeRF()) == {"alpha_linear", "rgb_linear"}
    assert heads(Net(coarse=NeRF(), fine=NeRF())) == {
        f"{network}.{head}_linear" for network in ("coarse", "fine") for head in ("alpha", "rgb")
    }


@pytest.mark.parametrize("shape", [(99, 16), (16, 99)])
def test_the_vocabulary_on_one_side(shape: tuple[int, int]) -> None:
    """Also where the weight is used the other way round, as in MobileBERT."""
    model = Net(embed=nn.Embedding(99, 16), positions=nn.Embedding(16, 16), blocks=blocks())
    model.dense = nn.Linear(shape[1], shape[0], bias=False)
    model.after = nn.Linear(16, 16)
    assert heads(model) == {"dense"}


def test_a_head_that_was_registered_before_the_rest() -> None:
    assert heads(Net(out=nn.Linear(16, 10), first=nn.Linear(40, 16), second=nn.Linear(16, 16))) == {"out"}
    assert heads(Net(fc=nn.Linear(16, 10), patch=nn.Conv2d(3, 16, 4), blocks=blocks())) == {"fc"}
    unet = Net(final=nn.Conv2d(16, 2, 1), down=nn.Conv2d(3, 16, 3), middle=nn.Conv2d(16, 16, 3))
    assert heads(unet) == {"final"}


def test_the_classes_of_a_loss_are_a_head() -> None:
    backbone = Net(stem=nn.Conv2d(3, 16, 3), blocks=blocks(), embed=nn.Linear(16, 8))
    assert heads(Net(backbone=backbone, loss=Net(fc=nn.Linear(8, 50, bias=False)))) == {"loss.fc"}


def test_layers_that_the_named_head_leads_to() -> None:
    """MobileNet's convolution before the classifier, and the box head of a detector, are hidden."""
    mobile = Net(stem=nn.Conv2d(3, 16, 3), blocks=blocks(), conv_head=nn.Conv2d(16, 24, 1), classifier=nn.Linear(24, 9))
    assert heads(mobile) == {"classifier"}
    predictor = Net(cls_score=nn.Linear(24, 9), bbox_pred=nn.Linear(24, 36))
    regions = Net(box_head=Net(fc6=nn.Linear(32, 24), fc7=nn.Linear(24, 24)), box_predictor=predictor)
    detector = Net(backbone=nn.Sequential(nn.Conv2d(3, 32, 3)), roi_heads=regions)
    assert heads(detector) == {"roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"}
    siglip = Net(patch=nn.Conv2d(3, 16, 4), blocks=blocks(), head=Net(fc1=nn.Linear(16, 64), fc2=nn.Linear(64, 16)))
    assert heads(Net(vision_model=siglip, classifier=nn.Linear(16, 9))) == {"classifier"}


def test_densely_connected_blocks_are_no_heads() -> None:
    class Dense(Net):
        def __init__(self, inputs: int) -> None:
            super().__init__(conv1=nn.Conv2d(inputs, 32, 1), conv2=nn.Conv2d(32, 8, 3))

    dense = nn.ModuleDict({f"layer{index}": Dense(16 + 8 * index) for index in range(3)})
    features = nn.Sequential(nn.Conv2d(3, 16, 3), dense, nn.BatchNorm2d(40))
    assert heads(Net(features=features, fc=nn.Linear(40, 10))) == {"fc"}


def test_gates_are_no_heads() -> None:
    experts = nn.ModuleList(mlp(6, 32, 16) for _ in range(3))
    towers = nn.ModuleList(mlp(16, 8, 1) for _ in range(2))
    gates = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))
    assert heads(Net(experts=experts, gates=gates, towers=towers)) == {"towers.0.2", "towers.1.2"}


def test_the_width_of_the_stream_at_the_end_is_a_guess() -> None:
    """The pooler of a base model."""
    bert = Net(patch=nn.Conv2d(3, 16, 4), blocks=blocks(), norm=nn.LayerNorm(16), pooler=nn.Linear(16, 16))
    with pytest.warns(UserWarning, match=r"adamw updates pooler.weight \(16, 16\): output head, perhaps"):
        assert guessed(bert)["pooler"].confidence == "guess"


def test_a_network_inside_that_ends_in_its_own_width_is_a_guess() -> None:
    """The T-Net of PointNet gives a matrix that is multiplied with the points."""
    transform = Net(conv=nn.Conv1d(3, 8, 1), fc=nn.Linear(8, 9))
    model = Net(transform=transform, conv=nn.Conv1d(3, 16, 1), fc1=nn.Linear(16, 16), fc2=nn.Linear(16, 5))
    with pytest.warns(UserWarning, match=r"transform.fc.weight \(9, 8\): output head, perhaps: .* not at the end"):
        assert set(guessed(model)) == {"transform.fc", "fc2"}


def test_without_a_head_the_model_says_so() -> None:
    backbone = Net(stem=nn.Conv2d(3, 16, 3), blocks=blocks(), norm=nn.LayerNorm(16))
    with pytest.warns(UserWarning, match=r"muon updates blocks.1.down.weight .*: no output head was found"):
        assert not guessed(backbone)
    assert heads(Net(embed=nn.Embedding(99, 16), blocks=blocks(), norm=nn.LayerNorm(16))) == set()
    frozen = Net(body=backbone.requires_grad_(False), fc=nn.Linear(16, 3))
    assert heads(frozen) == {"fc"}
    frozen.fc.requires_grad_(False)
    backbone.blocks[1].requires_grad_(True)
    assert not [route for route in find_routes(frozen) if route.confidence == "guess"]


def test_a_projector_before_frozen_layers_is_hidden() -> None:
    model = Net(vision=Net(stem=nn.Conv2d(3, 16, 3)), projector=mlp(16, 24, 32), language=blocks())
    model.language = Net(embed=nn.Embedding(99, 32), blocks=nn.ModuleList([Block(32)]), lm_head=nn.Linear(32, 99))
    model.vision.requires_grad_(False)
    model.language.requires_grad_(False)
    assert heads(model) == {"language.lm_head"}
    assert {route.name for route in find_routes(model) if route.algorithm == "muon"} == {
        "projector.0.weight",
        "projector.2.weight",
    }


def test_what_is_frozen_is_judged_as_if_it_were_trained() -> None:
    model = Net(generator=mlp(10, 32, 64).requires_grad_(False), discriminator=mlp(64, 32, 1))
    later = {route.name: route.trained for route in find_routes(model)}
    assert later["generator.2.weight"] is not None
    assert later["generator.2.weight"].role == "head"
    assert later["generator.0.weight"] is not None
    assert later["generator.0.weight"].role == "matrix"
    assert later["discriminator.2.weight"] is None
