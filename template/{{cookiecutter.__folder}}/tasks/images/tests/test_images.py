"""Test the networks, that they learn, what TensorBoard shows of them, and the classes that they predict."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_muon.cli import MuonCLI
from {{ cookiecutter.package_name }}.data import ImageData
from {{ cookiecutter.package_name }}.figures import WorstMistakes, draw_confusion, draw_mistakes
from {{ cookiecutter.package_name }}.resnet import ResNet
from {{ cookiecutter.package_name }}.vit import ViT

Run = Callable[..., MuonCLI]

NETWORKS: list[Callable[..., nn.Module]] = [ViT, ResNet]
SIZES: dict[Any, dict[str, Any]] = {
    ViT: {"dim": 16, "depth": 1, "heads": 2},
    ResNet: {"widths": (8, 16), "depth": 1},
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (33, 3), (96, 3)])
def test_networks_fit_any_images(network: Callable[..., nn.Module], size: int, channels: int) -> None:
    net = network(classes=5, size=size, channels=channels, **SIZES[network])
    logits = net(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 5)
    assert logits.count_nonzero() == 0  # all classes are equally likely at first
    logits.softmax(-1)[:, 0].sum().backward()
    assert net.get_parameter("head.weight").grad is not None


def test_a_patch_has_a_place() -> None:
    torch.manual_seed(0)
    net = ViT(classes=3, **SIZES[ViT])
    nn.init.normal_(net.head.weight)
    image = torch.randn(1, 1, 8, 8)
    assert (net(image) - net(image.flip(-1))).abs().max() > 1e-4
    with torch.no_grad():
        net.positions.zero_()  # then patches may change places
    left, right = image.chunk(2, dim=-1)
    torch.testing.assert_close(net(image), net(torch.cat([right, left], dim=-1)))


def test_a_residual_network_knows_no_other_images_of_its_batch() -> None:
    torch.manual_seed(0)
    net = ResNet(classes=3, **SIZES[ResNet])
    nn.init.normal_(net.head.weight)
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(net(images)[:1], net(images[:1]), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in ResNet(3, norm="batch", depth=2).modules()) == 9


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ViT(classes=0), "classes must be at least 1, got 0"),
        (lambda: ViT(3, size=8, patch=3), r"size \(8\) must be a multiple of patch \(3\)"),
        (lambda: ViT(3, dim=10, heads=4), r"dim \(10\) must be a multiple of heads \(4\)"),
        (lambda: ViT(3)(torch.zeros(1, 3, 8, 8)), r"images of shape \(3, 8, 8\): the model is for \(1, 8, 8\)"),
        (lambda: ResNet(3, depth=0), "depth must be at least 1, got 0"),
        (lambda: ResNet(3, widths=()), r"widths must be at least one number over 0, got \[\]"),
        (lambda: ResNet(3, norm="layer"), "norm must be 'group' or 'batch', got 'layer'"),
    ],
)
def test_what_does_not_fit_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_surest_mistakes_come_first() -> None:
    metric = WorstMistakes(count=2)
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(-1, 1, 2, 2)
    logits = torch.tensor([[9.0, 0], [1, 0], [3, 0], [0, 2], [0, 1], [4, 0]])
    labels = torch.tensor([0, 1, 1, 0, 1, 1])  # the mistakes: 1, 2, 3 and 5
    for part in (slice(0, 3), slice(3, 6)):
        metric.update(images[part], logits[part], labels[part])
    worst = metric.compute()
    assert worst.images[:, 0, 0, 0].tolist() == [5, 2]
    assert worst.probabilities.tolist() == pytest.approx(logits[[5, 2], 0].sigmoid().tolist())
    assert (worst.predicted.tolist(), worst.labels.tolist()) == ([0, 0], [1, 1])


@pytest.mark.parametrize("mistaken", [0, 1, 20])
def test_mistakes_are_drawn_however_many_there_are(mistaken: int) -> None:
    metric = WorstMistakes()
    metric.update(torch.rand(20, 3, 4, 4), torch.eye(20), (torch.arange(20) + (torch.arange(20) < mistaken)) % 20)
    figure = draw_mistakes(metric.compute(), [f"class {number}" for number in range(20)])
    shown = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(shown) == min(mistaken, 16)
    assert all(" (" in title and "\nis class " in title for title in shown)


@pytest.mark.parametrize("classes", [3, 100])
def test_a_confusion_matrix_is_drawn_for_few_and_many_classes(classes: int) -> None:
    confusion = torch.eye(classes, dtype=torch.int64) * 4
    (axes,) = draw_confusion(confusion, [f"class {number}" for number in range(classes)]).axes
    assert [text.get_text() for text in axes.texts] == (["4"] * 3 if classes == 3 else [])


def test_it_learns_shows_and_predicts(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = run("fit", "--trainer.max_epochs=8", "--model.top_k=2")
    metrics = fitted.trainer.callback_metrics
    assert metrics["val/accuracy"] > 0.8
    assert metrics["val/top2_accuracy"] >= metrics["val/accuracy"]
    images = EventAccumulator(str(fitted.trainer.log_dir)).Reload()
    assert {"confusion", "worst_mistakes"} <= set(images.Tags()["images"])
    assert images.Images("confusion")[-1].step == fitted.trainer.global_step
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    capsys.readouterr()
    predicted = run("predict", f"--ckpt_path={checkpoint}", "--data.predict=pictures/red")
    lines = capsys.readouterr().out
    found = [row for batch in predicted.trainer.predict_loop.predictions for row in batch]
    assert sorted(row["file"] for row in found) == sorted(map(str, Path("pictures/red").iterdir()))
    assert sum(row["class"] == "red" for row in found) >= 16
    assert all(1 / 3 <= row["probability"] <= 1 for row in found)
    assert "pictures/red/0.png  red  " in lines
    assert json.loads(json.dumps(found)) == found


def test_the_data_decide_the_number_of_classes(run: Run) -> None:
    for options in ([], ["--model.net=ViT", "--model.net.dim=16"]):
        fitted = run("fit", *options, "--trainer.max_steps=1", "--trainer.limit_val_batches=1")
        assert fitted.model.net.head.out_features == 3
        assert fitted.model.classes == 3


def test_other_outputs_than_classes_are_refused_in_a_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", "--model.net.classes=5", "--trainer.max_steps=1")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the network gives outputs of shape (4, 5) for 4 images of 3 classes: set")


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--data.folder=nothing", "--data.folder: there is no folder nothing"),
        ("--model.smoothing=1", "smoothing must be at least 0 and under 1, got 1.0"),
        ("--model.top_k=0", "top_k must be at least 1, got 0"),
        ("--data.channels=2", "channels must be 1 or 3, got 2"),
    ],
)
def test_values_that_cannot_work_are_refused_in_a_line(
    run: Run, capsys: pytest.CaptureFixture[str], option: str, line: str
) -> None:
    with pytest.raises(SystemExit):
        run("fit", option)
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_without_a_folder_the_images_are_digits() -> None:
    data = ImageData()
    assert (data.classes, data.size, data.channels) == (10, 8, 1)
    assert sum(len(part.images) for part in data.splits.values()) == 1797
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (64, 1, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)
    assert set(labels.tolist()) == set(range(10))
