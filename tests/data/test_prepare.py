"""Text becomes tokens once: each document in one split, complete or not at all, and again where a call was killed."""

import json
import os
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from lightning_muon.data import PreparedTokens, documents, prepare, prepare_tokens

SPLITS = ("train", "val", "test")


def text_of(prepared: PreparedTokens, split: str) -> bytes:
    if not prepared.counts.get(split):
        return b""
    tokens = prepared.split(split)
    return tokens.read(0, len(tokens)).astype("uint8").tobytes()


def write_texts(folder: Path, count: int, size: int = 2000) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:02}.txt" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(f"file {number:02}: \xe4\n".encode("latin-1") * (size // 11))
    return paths


def write_lines(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def test_every_file_is_in_one_split(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "texts", 40)
    prepared = prepare_tokens(paths, tmp_path / "data")
    of_splits = {split: text_of(prepared, split) for split in SPLITS}
    for path in paths:
        assert [path.read_bytes() in text for text in of_splits.values()].count(True) == 1
    assert {split: len(text) for split, text in of_splits.items()} == prepared.counts
    assert sum(prepared.counts.values()) == sum(path.stat().st_size for path in paths)
    assert prepared.counts["train"] > 10 * prepared.counts["val"] > 0


@pytest.mark.parametrize("count", [1, 2])
def test_few_files_are_split_by_position(count: int, tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "texts", count, 3000)
    prepared = prepare_tokens(paths, tmp_path / "data")
    content = paths[0].read_bytes()
    assert text_of(prepared, "train").startswith(content[: len(content) * 9 // 10])
    assert paths[-1].read_bytes().endswith(text_of(prepared, "test")[-100:])
    assert sum(prepared.counts.values()) == count * len(content)


def test_documents_are_split_by_their_text(tmp_path: Path) -> None:
    texts = [f"document {number % 800:03}, twice;" for number in range(1600)]
    half = len(texts) // 2
    lines = write_lines(tmp_path / "a.jsonl", texts[:half]), write_lines(tmp_path / "b.ndjson", texts[half:])
    prepared = prepare_tokens(lines, tmp_path / "data")
    of_splits = [text_of(prepared, split).decode() for split in SPLITS]
    for text in texts[:half]:
        assert sorted(found.count(text) for found in of_splits) == [0, 0, 2]
    assert 20 < of_splits[1].count(";") / 2 < 70


def test_the_splits_may_be_given(tmp_path: Path) -> None:
    a, b = write_texts(tmp_path / "texts", 2)
    lines = write_lines(tmp_path / "c.jsonl", ["one", "two"])
    prepared = prepare_tokens({"train": [a, lines], "val": [b]}, tmp_path / "data")
    assert text_of(prepared, "train") == a.read_bytes() + b"onetwo"
    assert text_of(prepared, "val") == b.read_bytes()
    with pytest.raises(ValueError, match="has no tokens of the split 'test': add text"):
        prepared.split("test")


def test_parquet_is_read_by_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    table = pyarrow.table({"body": [f"row {number};" for number in range(300)], "size": list(range(300))})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=70)
    prepared = prepare_tokens([tmp_path / "rows.parquet"], tmp_path / "data", field="body")
    together = "".join(text_of(prepared, split).decode() for split in SPLITS)
    assert sorted(together.split(";")[:-1]) == sorted(f"row {number}" for number in range(300))
    for field, message in (("text", "there is no column 'text', but 'body', 'size'"), ("size", "is no text")):
        with pytest.raises(ValueError, match=message):
            prepare_tokens([tmp_path / "rows.parquet"], tmp_path / "data", field=field)


def test_tokens_of_a_tokenizer_have_an_end_between_documents(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(["one two three"], 270, special_tokens=["</s>"])
    trained.save(str(tmp_path / "tokenizer.json"))
    lines = write_lines(tmp_path / "a.jsonl", ["one", "two three", "four"])
    text = tmp_path / "a.txt"
    text.write_text("five\nsix")
    prepared = prepare_tokens({"train": [lines, text]}, tmp_path / "data", tmp_path / "tokenizer.json")
    shards = prepared.split("train")
    ids = shards.read(0, len(shards)).tolist()
    assert trained.decode(ids, skip_special_tokens=False) == "one</s>two three</s>four</s>five\nsix</s>"
    assert (prepared.dtype, prepared.vocabulary) == ("uint16", trained.get_vocab_size())


def test_it_is_done_once_and_again_when_a_file_changes(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "texts", 4)
    first, second = prepare_tokens(paths, tmp_path / "data"), prepare_tokens(paths, tmp_path / "data")
    paths[0].write_text("something else\n" * 50)
    third = prepare_tokens(paths, tmp_path / "data")
    assert first == second != third
    assert b"something else" in b"".join(text_of(third, split) for split in SPLITS)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted({first.folder.name, third.folder.name})


def test_a_call_after_a_kill_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 3000)
    paths = write_texts(tmp_path / "texts", 12)
    written: list[int] = []
    write = prepare._Job.write

    def failing(job: prepare._Job, number: int, piece: documents.Piece) -> None:
        if len(written) == 3:
            # As a kill in the middle of a piece leaves it.
            (job.folder / f"{number:06d}.{os.getpid() + 1}.unfinished").mkdir()
            (job.folder / f"{number:06d}.{os.getpid() + 1}.unfinished" / "train.bin").write_bytes(b"half")
            written.append(-1)
            raise KeyboardInterrupt
        written.append(number)
        write(job, number, piece)

    monkeypatch.setattr(prepare._Job, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(paths, tmp_path / "data")
    assert not any(path.name.isalnum() for path in (tmp_path / "data").iterdir())
    prepared = prepare_tokens(paths, tmp_path / "data")
    assert len(written) - 1 == len({number for number in written if number >= 0})  # none twice
    monkeypatch.undo()
    straight = prepare_tokens(paths, tmp_path / "other")
    for split in SPLITS:
        assert sorted(text_of(prepared, split).split(b"\n")) == sorted(text_of(straight, split).split(b"\n"))
    assert not list(tmp_path.rglob("*.unfinished"))


def test_several_processes_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 5000)
    paths = [*write_texts(tmp_path / "texts", 9), write_lines(tmp_path / "a.jsonl", [f"text {i}" for i in range(900)])]
    alone, together = (prepare_tokens(paths, tmp_path / name, workers=count) for name, count in (("a", 0), ("b", 2)))
    for split in SPLITS:
        assert text_of(alone, split) == text_of(together, split) != b""


def _prepare(paths: list[Path], folder: Path, start: Any) -> None:
    start.wait()
    prepare_tokens(paths, folder, workers=0)


def test_processes_that_begin_together_wait_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 3000)
    paths = write_texts(tmp_path / "texts", 60)
    fork = get_context("fork")
    start = fork.Barrier(4)
    processes = [fork.Process(target=_prepare, args=(paths, tmp_path / "data", start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list((tmp_path / "data").iterdir())) == 1
    alone = prepare_tokens(paths, tmp_path / "alone", workers=0)
    assert text_of(alone, "train") == text_of(prepare_tokens(paths, tmp_path / "data"), "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a.jsonl, byte 14: the line is no JSON"),
        ('["text"]', r"a.jsonl, byte 14: the line is no JSON object"),
        ('{"body": "a", "id": 3}', r"a.jsonl, byte 14: there is no key 'text', but 'body', 'id'"),
        ('{"text": null}', r"a.jsonl, byte 14: 'text' is no text"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_left(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        prepare_tokens([tmp_path / "a.jsonl"], tmp_path / "data")
    assert not [path for path in (tmp_path / "data").iterdir() if not path.name.endswith(".unfinished")]
    with pytest.raises(FileNotFoundError, match="there is no file to make tokens of"):
        prepare_tokens([], tmp_path / "data")
