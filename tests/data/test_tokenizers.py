"""Each kind of tokenizer gives tokens that are its text again, and says what is wrong with a file."""

import base64
import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_muon.data import TextDataModule, load_tokenizer

TEXTS = ["def test(): return 'ä'", "naïve ☃", ""]


def hugging_face(folder: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["def test(): return 1"] * 9, 300, special_tokens=["<|endoftext|>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiktoken(folder: Path) -> Path:
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    merges = [b"te", b"st", b"test", b" te", b"re", b"tu"]
    words = [bytes([byte]) for byte in range(256)] + merges
    lines = [f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(words)]
    (folder / "words.tiktoken").write_text("\n".join(lines))
    return folder / "words.tiktoken"


@pytest.mark.parametrize(
    ("make", "vocabulary", "end", "dtype"),
    [(lambda _: "bytes", 256, None, "uint8"), (hugging_face, None, 0, "uint16"), (tiktoken, 263, 262, "uint16")],
    ids=["bytes", "hugging face", "tiktoken"],
)
def test_tokens_are_the_text_again(
    make: Callable[[Path], Any], vocabulary: int | None, end: int | None, dtype: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(make(tmp_path))
    tokens = tokenizer.encode(TEXTS)
    assert [tokenizer.decode(row.tolist()) for row in tokens] == TEXTS
    assert {row.dtype.name for row in tokens} == {tokenizer.dtype} == {dtype}
    assert tokenizer.end == end
    assert vocabulary in {None, tokenizer.vocabulary}
    assert max(map(max, filter(len, tokens))) < tokenizer.vocabulary
    if dtype != "uint8":
        assert len(tokens[0]) < len(TEXTS[0])  # it has merged something


def test_bytes_are_those_of_the_file_in_any_encoding() -> None:
    tokenizer = load_tokenizer("bytes")
    content = bytes(range(256))
    (tokens,) = tokenizer.encode([tokenizer.text(content)])
    assert tokens.tobytes() == content


def test_another_end_is_another_identity(tmp_path: Path) -> None:
    path = hugging_face(tmp_path)
    usual, other = load_tokenizer(path), load_tokenizer(path, end="<pad>")
    assert (usual.end, other.end) == (0, 1)
    assert usual.identity != other.identity
    with pytest.raises(ValueError, match=r"tokenizer.json has no token '<stop>'"):
        load_tokenizer(path, end="<stop>")


def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gpt2; give 'bytes', a tokenizer.json or"):
        load_tokenizer(tmp_path / "gpt2")
    (tmp_path / "words.txt").touch()
    with pytest.raises(ValueError, match=r"words.txt is neither a tokenizer.json nor a .tiktoken file"):
        load_tokenizer(tmp_path / "words.txt")

    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name in {"tokenizers", "tiktoken"}:
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for name, package in (("tokenizer.json", "tokenizers"), ("a.tiktoken", "tiktoken")):
        monkeypatch.delitem(sys.modules, package, raising=False)
        (tmp_path / name).write_text("{}")
        with pytest.raises(ModuleNotFoundError, match=f"needs the package {package}: pip install {package}"):
            load_tokenizer(tmp_path / name)


def test_data_know_how_many_tokens_there_are(tmp_path: Path) -> None:
    assert TextDataModule().vocabulary == 256
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 300, "?": 1}, "?")).save(str(path))
    assert TextDataModule(tokenizer=str(path)).vocabulary == 301
    (tmp_path / "train.bin").write_bytes(b"\0\0\1\0")
    tokens = str(tmp_path / "*.bin")
    assert TextDataModule(tokens, str(path)).vocabulary == 301
    with pytest.raises(ValueError, match=r"--data.files: files of tokens do not say .* --model.net.vocabulary"):
        _ = TextDataModule(tokens).vocabulary
