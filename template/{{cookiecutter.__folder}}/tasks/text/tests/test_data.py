"""Test that the text is split by file, drawn reproducibly, and continued from a checkpoint."""

from pathlib import Path

import pytest
import torch

from {{ cookiecutter.package_name }}.data import SPLITS, Crops, TextData


def prepared(tmp_path: Path, files: str | list[str], context: int = 32) -> TextData:
    data = TextData(files, context=context, batch_size=4, data_dir=str(tmp_path / "data"))
    data.prepare_data()
    return data


def text_of(data: TextData, split: str) -> bytes:
    return bytes(data._text(split).tolist())


def test_every_file_is_in_one_split(tmp_path: Path, corpus: Path) -> None:
    data = prepared(tmp_path, f"{corpus}/*.txt")
    splits = {split: text_of(data, split) for split in SPLITS}
    for path in corpus.iterdir():
        assert sum(path.read_bytes() in text for text in splits.values()) == 1
    assert sum(map(len, splits.values())) == sum(path.stat().st_size for path in corpus.iterdir())
    assert len(splits["train"]) > 10 * len(splits["val"])


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / "books" / f"{number:02}").mkdir(parents=True)
        (tmp_path / "books" / f"{number:02}" / "text.txt").write_text(f"book {number:02} " * 30)
    data = prepared(tmp_path, f"{tmp_path}/books/**/*.txt")
    held_out = text_of(data, "val") + text_of(data, "test")
    assert {number for number in range(40) if f"book {number:02}".encode() in held_out} != {0, 1, 2, 3}


@pytest.mark.parametrize("number", [1, 2])
def test_too_few_files_are_split_by_position(tmp_path: Path, number: int) -> None:
    content = bytes(range(256)) * 8
    for i in range(number):
        (tmp_path / f"{i}.txt").write_bytes(content)
    data = prepared(tmp_path, f"{tmp_path}/*.txt")
    assert text_of(data, "train")[: len(content) * 9 // 10] == content[: len(content) * 9 // 10]
    assert sum(len(text_of(data, split)) for split in SPLITS) == number * len(content)
    assert content.endswith(text_of(data, "test")[-100:])


def test_without_files_it_is_the_standard_library(tmp_path: Path) -> None:
    data = TextData(data_dir=str(tmp_path))
    assert len(data._paths) > 300
    assert any(path.name == "argparse.py" for path in data._paths)
    assert not any("test" in path.parts or "site-packages" in path.parts for path in data._paths)


def test_the_text_is_joined_once_and_again_when_a_file_changes(tmp_path: Path, corpus: Path) -> None:
    first, second = prepared(tmp_path, f"{corpus}/*.txt"), prepared(tmp_path, f"{corpus}/*.txt")
    (corpus / "0.txt").write_text("something else, and more of it\n" * 50)
    third = prepared(tmp_path, f"{corpus}/*.txt")
    assert first._folder == second._folder != third._folder
    assert {path.name for path in (tmp_path / "data").iterdir()} == {first._folder.name, third._folder.name}


def test_crops_depend_on_seed_and_number_alone() -> None:
    text = torch.arange(256, dtype=torch.uint8).repeat(4)
    one, other = Crops(text, 16, 4, 10, seed=1), Crops(text, 16, 4, 10, seed=2)
    batches = list(one)
    assert len(batches) == len(one) == 10
    assert torch.equal(batches[3][1], one.crop(13))
    assert not torch.equal(one.crop(13), other.crop(13))
    assert all(batch.shape == (4, 17) and batch.dtype == torch.uint8 for batch in batches)
    assert all(row.int().diff().remainder(256).eq(1).all() for row in batches[0])  # consecutive bytes of the text


def test_the_next_epoch_brings_new_crops_but_a_validation_repeats() -> None:
    text = torch.randint(256, (1000,)).to(torch.uint8)
    endless, fixed = Crops(text, 16, 4, 3, seed=0), Crops(text, 16, 4, 3, seed=0, endless=False)
    assert not torch.equal(torch.cat(list(endless)), torch.cat(list(endless)))
    assert torch.equal(torch.cat(list(fixed)), torch.cat(list(fixed)))


def test_ranks_together_draw_what_one_would() -> None:
    text = torch.randint(256, (1000,)).to(torch.uint8)
    ranks = [list(Crops(text, 16, 4, 3, seed=0, rank=rank, world_size=2)) for rank in range(2)]
    alone = list(Crops(text, 16, 4, 6, seed=0))
    interleaved = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert torch.equal(torch.stack(interleaved), torch.stack(alone))
    large = list(Crops(text, 16, 8, 3, seed=0))
    assert torch.equal(torch.cat(interleaved), torch.cat(large))


def test_it_continues_under_another_number_of_ranks() -> None:
    text = torch.randint(256, (1000,)).to(torch.uint8)
    alone, resumed = Crops(text, 16, 4, 4, seed=0), [Crops(text, 16, 2, 4, 0, rank, world_size=2) for rank in range(2)]
    batches = iter(alone)
    next(batches)
    for crops in resumed:
        crops.load_state_dict(alone.state_dict())
    halves = [next(iter(crops)) for crops in resumed]
    assert torch.equal(next(batches), torch.cat(halves))


def test_it_continues_where_it_stopped() -> None:
    text = torch.randint(256, (1000,)).to(torch.uint8)
    first, second = Crops(text, 16, 4, 6, seed=0), Crops(text, 16, 4, 6, seed=0)
    straight = list(Crops(text, 16, 4, 6, seed=0))
    batches = iter(first)
    for _ in range(4):
        next(batches)
    second.load_state_dict(first.state_dict())
    assert torch.equal(next(iter(second)), straight[4])


def test_unigram_loss_is_the_cross_entropy_of_frequencies(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab" * 1000)
    data = prepared(tmp_path, str(tmp_path / "a.txt"))
    assert data.unigram_loss == pytest.approx(0.827, abs=0.01)  # ln 2, and a little for bytes that do not occur


def test_the_prompt_is_what_predict_gets(tmp_path: Path) -> None:
    data = TextData(prompt="é", data_dir=str(tmp_path))
    assert [batch.tolist() for batch in data.predict_dataloader()] == [[[0xC3, 0xA9]]]


def test_no_match_and_too_little_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data.files .*nothing\*.*: no file matches"):
        prepared(tmp_path, "nothing*")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"the train text has 8 bytes, and a sample needs 33"):
        prepared(tmp_path, str(tmp_path / "short.txt")).train_dataloader()
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        TextData(context=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        TextData(seed=-1)
