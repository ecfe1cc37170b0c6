"""The dashboard: what it writes is what TensorBoard shows, and nobody is disturbed who has no TensorBoard."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes

from lightning_muon.callbacks import (
    AutoWeightDecay,
    MuonDashboard,
    OrthogonalityMonitor,
    SpeedMonitor,
    WeightRMSMonitor,
)
from lightning_muon.callbacks.matrices import module_names
from lightning_muon.callbacks.sampling import sampled_matrices
from lightning_muon.callbacks.shards import whole
from lightning_muon.callbacks.tensorboard.pages import layout, singular_values
from lightning_muon.optim import MatrixLayout, MuonAdamW
from lightning_muon.report.charts import CHARTS
from lightning_muon.report.run_log import read_run

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def monitors() -> list[Callback]:
    return [WeightRMSMonitor(), OrthogonalityMonitor(), AutoWeightDecay(), LearningRateMonitor(), MuonDashboard()]


def read(trainer: Trainer) -> EventAccumulator:
    trainer.logger.experiment.flush()
    return EventAccumulator(trainer.log_dir, size_guidance={"tensors": 0, "histograms": 0}).Reload()


def page(trainer: Trainer) -> dict[str, list[str]]:
    """The titles of the charts by category, as TensorBoard reads them: from the last layout."""
    written = read(trainer).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    return {
        category.title: [chart.title for chart in category.chart] for category in Layout.FromString(written).category
    }


def test_charts_are_those_that_the_run_has_tags_for(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger
) -> None:
    trainer = fit(regression(MuonAdamW), callbacks=monitors(), logger=tensorboard, limit_val_batches=2, max_epochs=2)
    shown = page(trainer)
    assert list(shown) == ["Overview", "Health", "Updates"]
    titles = {section: [title.split(":")[0] for title in charts] for section, charts in shown.items()}
    assert titles["Overview"] == ["Health", "Loss", "Each quantity", "Samples per second", "Learning rate"]
    assert titles["Health"] == [  # shown in the opposite order
        "Largest weight, a small multiple of the RMS",
        *("Orthogonality error", "Layer output RMS", "Weight RMS"),
    ]
    assert titles["Updates"] == [
        *("Weight decay", "Singular values of the update"),
        *("Orthogonality error of each operator", "Steps that each operator's polar factor needs"),
    ]
    # Each tag is on at most one chart, and those of the monitors that change are all on one.
    tags = [
        tag
        for tag in read(trainer).Tags()["scalars"]
        if tag not in {"epoch", "hp_metric", "watch/weight_bits"}
        and not tag.startswith(("at_a_glance/loss", "at_a_glance/val"))
    ]
    for tag in tags:
        assert sum(chart.draws([tag]) for chart in CHARTS) == 1, tag


def test_without_monitors_there_are_no_empty_charts(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger
) -> None:
    trainer = fit(regression(MuonAdamW), callbacks=[MuonDashboard()], logger=tensorboard)
    assert page(trainer) == {"Overview": ["Loss"]}


@pytest.mark.parametrize(
    ("tag", "title"),
    [
        ("watch/weight_rms/max", "Weight RMS: healthy under 1"),
        ("prefix-watch/weight_rms/max", "Weight RMS: healthy under 1"),
        ("watch/weight_rms/net.0.weight", None),
        ("watch/optimizer_share", "Optimizer's share of the step"),
        ("train/loss_step", "Loss"),
        ("val_loss", "Loss"),
        ("val/accuracy", "Other validation metrics"),
        ("lr-AdamW", "Learning rate"),
        ("lr-AdamW/pg1-momentum", None),
        ("loss", "Loss"),
        ("training_loss", "Loss"),
        ("loss/train", "Loss"),
        ("Loss/val", "Loss"),
        ("eval_loss", "Loss"),
        ("eval_accuracy", "Other validation metrics"),
        ("prefix-training_loss", "Loss"),
        ("watch/weight_rms/loss_head.weight", None),
        ("prefix-watch/weight_rms/loss_head.weight", None),
        ("lr-loss_head", "Learning rate"),
        ("trainable/accuracy", None),
    ],
)
def test_which_chart_draws_a_tag(tag: str, title: str | None) -> None:
    drawn = [title for charts in layout([tag]).values() for title, chart in charts.items() if chart.draws([tag])]
    assert drawn == ([] if title is None else [title])


def test_cards_say_who_updates_what_and_with_which_settings(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    class Configured(regression):  # type: ignore[valid-type,misc]
        def __init__(self, dim: int = 7, shape: tuple[int, int] = (1, 2)) -> None:
            super().__init__(MuonAdamW)
            self.save_hyperparameters()

    trainer = fit(Configured(), callbacks=[MuonDashboard()], logger=tensorboard)
    (routing,) = events(trainer).texts("routing")
    assert "| `net.0.weight` | 16×8 | muon | matrix | hidden matrix |" in routing
    assert "| `net.4.weight` | 4×16 | adamw | head |" in routing
    assert len(routing.splitlines()) == 2 + len(list(trainer.lightning_module.parameters()))
    (config,) = events(trainer).texts("config")
    assert yaml.safe_load(config.removeprefix("```yaml\n").removesuffix("```")) == {"dim": 7, "shape": [1, 2]}


def test_the_config_card_is_the_file_that_was_saved_last(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    folder = Path(tensorboard.log_dir)
    folder.mkdir(parents=True)
    for name, when in (("config.yaml", 100), ("config-1.yaml", 200)):
        (folder / name).write_text(f"name: {name}\n")
        os.utime(folder / name, (when, when))
    trainer = fit(regression(MuonAdamW), callbacks=[MuonDashboard()], logger=tensorboard)
    assert events(trainer).texts("config") == ["```yaml\nname: config-1.yaml\n```"]


def test_plain_torch_optimizers_have_a_table_too(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    class Plain(regression):  # type: ignore[valid-type,misc]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.25)

    trainer = fit(Plain(None), callbacks=[MuonDashboard()], logger=tensorboard)
    assert "| `net.0.weight` | 16×8 | AdamW | group_0 |  |" in events(trainer).texts("routing")[0]
    assert read(trainer).Tags()["histograms"] == []
    assert events(trainer).texts("warnings") == []


def test_the_table_says_what_the_optimizer_does(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """One of torch updates all groups alike, whatever they say; roles and reasons stay."""
    trainer = fit(regression(torch.optim.AdamW), callbacks=[MuonDashboard()], logger=tensorboard)
    (table,) = events(trainer).texts("routing")
    assert "| `net.0.weight` | 16×8 | AdamW | matrix | hidden matrix |" in table
    assert "muon" not in table
    assert read(trainer).Tags()["histograms"]


def test_warnings_of_the_monitors_are_a_card(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    module = regression(MuonAdamW)
    torch.nn.init.constant_(module.get_parameter("net.0.weight"), float("nan"))
    with pytest.warns(UserWarning, match="net.0.weight"):
        trainer = fit(module, callbacks=monitors(), logger=tensorboard, limit_train_batches=2)
    said = events(trainer).texts("warnings")
    assert any("WeightRMSMonitor, step 0: weight_rms is not finite for net.0.weight" in text for text in said)
    # What has no singular values has no histogram, and does not stop the run; the other matrix became NaN with it.
    assert "watch/weight_spectrum/net.0.weight" not in read(trainer).Tags()["histograms"]


def test_histograms_are_of_the_singular_values(regression: Module, fit: Fit, tensorboard: TensorBoardLogger) -> None:
    trainer = fit(
        regression(MuonAdamW), callbacks=[MuonDashboard(spectrum_every_n_steps=4)], logger=tensorboard, max_steps=10
    )
    histograms = read(trainer)
    for name in ("net.0.weight", "net.2.weight"):
        written = histograms.Histograms(f"watch/weight_spectrum/{name}")
        assert [event.step for event in written] == [0, 4, 8, 10]
        last = written[-1].histogram_value
        exact = torch.linalg.svdvals(trainer.lightning_module.get_parameter(name).detach().double())
        assert last.num == len(exact)
        assert last.sum == pytest.approx(float(exact.sum()), rel=1e-5)
        assert (last.min, last.max) == pytest.approx((float(exact.min()), float(exact.max())), rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "given"),
    [
        ((6, 4), {}),
        ((6, 4), {"blocks": 3}),
        ((4, 6), {"blocks": 3, "transposed": True}),
        ((5, 3, 2, 2), {}),
        ((3, 4, 5), {"stacked": True}),
        ((2, 6, 5), {"stacked": True, "blocks": 2}),
        ((9, 5), {"split_sizes": [4, 3, 2]}),
    ],
)
def test_singular_values_are_those_of_each_matrix_that_muon_sees(shape: tuple[int, ...], given: dict[str, Any]) -> None:
    parameter = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrices = [matrix for batch in MatrixLayout(**given).matrices(parameter) for matrix in batch]
    expected = torch.cat([torch.linalg.svdvals(matrix.double()) for matrix in matrices]).sort().values
    found = singular_values(parameter, **given)
    torch.testing.assert_close(found.sort().values.double(), expected, rtol=1e-5, atol=1e-6)


def test_number_and_size_of_the_decompositions_are_bounded(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, tmp_path: Path, events: Any
) -> None:
    few = fit(regression(MuonAdamW), callbacks=[MuonDashboard(sample=1)], logger=tensorboard)
    assert read(few).Tags()["histograms"] == ["watch/weight_spectrum/net.0.weight"]
    small = TensorBoardLogger(tmp_path / "small", default_hp_metric=False)
    trainer = fit(regression(MuonAdamW), callbacks=[MuonDashboard(max_elements=8 * 16)], logger=small)
    assert read(trainer).Tags()["histograms"] == ["watch/weight_spectrum/net.0.weight"]
    none = TensorBoardLogger(tmp_path / "none", default_hp_metric=False)
    with pytest.warns(UserWarning, match="max_elements=9") as caught:
        trainer = fit(regression(MuonAdamW), callbacks=[MuonDashboard(max_elements=9)], logger=none)
    assert sum("max_elements=9" in str(one.message) for one in caught) == 1
    assert len(events(trainer).texts("warnings")) == 1


def test_it_changes_no_weights(regression: Module, fit: Fit, tensorboard: TensorBoardLogger) -> None:
    with_it, without = regression(MuonAdamW), regression(MuonAdamW)
    fit(with_it, callbacks=[MuonDashboard(spectrum_every_n_steps=1)], logger=tensorboard)
    fit(without, logger=False)
    for a, b in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_other_loggers_get_the_verdict_and_nothing_else(
    regression: Module, fit: Fit, tmp_path: Path, tensorboard: TensorBoardLogger
) -> None:
    plain, watched = CSVLogger(tmp_path / "plain"), CSVLogger(tmp_path / "watched")
    fit(regression(MuonAdamW), callbacks=monitors()[:-1], logger=plain)
    fit(regression(MuonAdamW), callbacks=monitors(), logger=watched)
    written, expected = (read_run(Path(log.log_dir), "run").scalars for log in (watched, plain))
    assert {name: values for name, values in written.items() if not name.startswith("by_quantity/")} == expected
    second = TensorBoardLogger(tmp_path / "second", default_hp_metric=False)
    trainer = fit(regression(MuonAdamW), callbacks=monitors(), logger=[watched, tensorboard, second])
    for logger in (tensorboard, second):
        logger.experiment.flush()
        tags = EventAccumulator(logger.log_dir).Reload().Tags()
        assert {"custom_scalars__config__", "watch/routing/text_summary"} <= set(tags["tensors"])
    assert trainer.global_step == 10


def test_no_logger_and_fast_dev_run(regression: Module, fit: Fit) -> None:
    dashboard = MuonDashboard()
    assert fit(regression(MuonAdamW), callbacks=[dashboard], logger=False).global_step == 10
    assert fit(regression(MuonAdamW), callbacks=[dashboard], fast_dev_run=True, logger=True).global_step == 1


def test_a_resumed_run_goes_on_with_its_page(regression: Module, fit: Fit, tmp_path: Path) -> None:
    logger = partial(TensorBoardLogger, tmp_path, "logs", 0, default_hp_metric=False)
    saved = str(tmp_path / "six.ckpt")
    first = fit(regression(MuonAdamW), callbacks=monitors(), logger=logger(), max_steps=6)
    first.save_checkpoint(saved)
    resumed = fit(
        regression(MuonAdamW), callbacks=monitors(), logger=logger(), max_steps=10, max_epochs=2, ckpt_path=saved
    )
    assert page(resumed) == page(first)
    steps = [event.step for event in read(resumed).Histograms("watch/weight_spectrum/net.0.weight")]
    assert steps == [0, 6, 10]


def test_every_rank_takes_part(regression: Module, fit: Fit, tmp_path: Path) -> None:
    """One that asked for something that the others do not, would wait for them for ever."""
    logger = TensorBoardLogger(tmp_path, "logs", version=0, default_hp_metric=False)
    fit(
        regression(MuonAdamW),
        callbacks=monitors(),
        logger=logger,
        strategy="ddp_fork",
        devices=2,
        max_epochs=2,
        limit_val_batches=2,
    )
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert {"custom_scalars__config__", "watch/routing/text_summary"} <= set(tags["tensors"])
    assert "watch/weight_spectrum/net.0.weight" in tags["histograms"]


def look_at_shards(rank: int, folder: str) -> None:
    """On one of two ranks, each with a half of the rows: look at the singular values of the whole."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = LightningModule()
    module.net = torch.nn.Linear(6, 5)
    exact = torch.linalg.svdvals(module.net.weight.detach())
    fully_shard(module.net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD([{"params": [module.net.weight], "algorithm": "muon"}], lr=0.1)
    names = module_names(module)
    chosen = sampled_matrices([optimizer], names, sample=4, max_elements=30)
    assert list(chosen) == ["net.weight"]
    assert sampled_matrices([optimizer], names, sample=4, max_elements=29) == {}  # by the whole, not the shard
    (sampled,) = chosen.values()
    torch.testing.assert_close(singular_values(whole(sampled.parameter), **sampled.layout), exact)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_shards_are_made_whole(tmp_path: Path) -> None:
    start_processes(look_at_shards, (str(tmp_path),), nprocs=2, start_method="fork")


def test_two_are_refused(regression: Module, fit: Fit) -> None:
    with pytest.raises(MisconfigurationException, match="MuonDashboard is in the trainer's callbacks more than once"):
        fit(regression(MuonAdamW), callbacks=[MuonDashboard(), MuonDashboard(7)])


@pytest.mark.parametrize(
    ("argument", "value", "least"), [("spectrum_every_n_steps", -1, 0), ("sample", 0, 1), ("max_elements", 0, 1)]
)
def test_bad_arguments_are_named(argument: str, value: int, least: int) -> None:
    with pytest.raises(
        MisconfigurationException, match=f"MuonDashboard: {argument} must be at least {least}, got {value}"
    ):
        MuonDashboard(**{argument: value})


@pytest.fixture
def served(regression: Module, fit: Fit, tensorboard: TensorBoardLogger) -> Iterator[str]:
    """The address of a TensorBoard that shows a run with all monitors."""
    watching = [SpeedMonitor(every_n_steps=5), *monitors()]
    fit(regression(MuonAdamW), callbacks=watching, logger=tensorboard, limit_val_batches=2, max_epochs=8)
    tensorboard.experiment.flush()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "tensorboard.main", "--logdir", str(tensorboard.save_dir), "--port", str(port)]
    server = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/data/plugin/custom_scalars/layout")
        yield address
    finally:
        server.kill()
        server.wait()


def _wait_for(url: str) -> None:
    for _ in range(300):
        try:
            with urlopen(url, timeout=10) as answer:  # noqa: S310 - our own server
                if len(answer.read()) > 10:  # an empty layout is "{}"
                    return
        except OSError:
            pass
        time.sleep(0.1)
    pytest.fail(f"{url} shows no layout")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_shows_the_charts(served: str, tmp_path: Path) -> None:
    from PIL import Image

    screenshot = tmp_path / "page.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1400,1400",
        f"--user-data-dir={tmp_path}/c",
    ]
    look = [f"--screenshot={screenshot}", "--virtual-time-budget=20000", f"{served}/#custom_scalars"]
    subprocess.run([str(CHROMIUM), *options, *look], check=True, capture_output=True, timeout=100)
    image = Image.open(screenshot).convert("RGB")
    line = (255, 112, 67)  # the colour that TensorBoard gives the first run
    # Two rows of charts, two in a row, right of the settings and below the head of the page.
    for left, top in ((385, 150), (735, 150), (385, 470), (735, 470)):
        colours = image.crop((left, top, left + 330, top + 190)).getcolors(1 << 20)
        assert any(colour == line and count > 100 for count, colour in colours), (left, top)
