"""Tokens streamed by litdata: each sample once an epoch, resumed in mid-epoch with another number of workers."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muon.data import StreamedTextDataModule
from tests.data.streamed_training import CONTEXT
from tests.processes import launch

PROGRAM = Path(__file__).with_name("streamed_training.py")
SAMPLES = 80


def tokens(document: int) -> Iterator[Tensor]:
    yield torch.arange(document * 200, document * 200 + 200, dtype=torch.int32)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    litdata = pytest.importorskip(
        "litdata", reason="litdata needs torchvision, whose wheels fit one build of torch only"
    )
    folder = tmp_path_factory.mktemp("streamed") / "chunks"
    loader = litdata.TokensLoader()
    litdata.optimize(
        tokens, list(range(4)), str(folder), chunk_size=100, item_loader=loader, num_workers=1, verbose=False
    )
    return folder


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_number_of_workers_may_change_in_mid_epoch(ranks: int, chunks: Path, tmp_path: Path) -> None:
    steps = SAMPLES // (4 * ranks)
    first = run(ranks, str(chunks), 4, 0, str(tmp_path), None)
    second = run(ranks, str(chunks), steps, 2, None, str(tmp_path / "saved.ckpt"))
    used = chain.from_iterable(chain.from_iterable(one["used"] for one in (*first, *second)))
    assert sorted(used) == list(range(0, SAMPLES * (CONTEXT + 1), CONTEXT + 1))
    assert sum(len(one["evaluated"]) for one in second) == SAMPLES


def run(world_size: int, *arguments: Any) -> list[dict[str, Any]]:
    return launch(PROGRAM, "run", world_size, *arguments, process_group=world_size > 1)


def test_a_split_without_an_address_is_named(chunks: Path) -> None:
    with pytest.raises(ValueError, match=r"^--data.test: say where the chunks of the test split are$"):
        StreamedTextDataModule(str(chunks), str(chunks)).test_dataloader()
