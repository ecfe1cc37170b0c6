"""Prompts from a file: one a line, or in JSON lines."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context

from lightning_muon.data import Prompts, TextDataModule, load_tokenizer, read_prompts


def test_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffdef \r\n\n  \n  é\u2028\n".encode())
    prompts = Prompts(read_prompts(file), load_tokenizer("bytes"))
    assert [sample["given"] for sample in prompts] == [{"prompt": "def "}, {"prompt": "  é\u2028"}]
    assert torch.equal(prompts[0]["tokens"], torch.tensor([100, 101, 102, 32]))
    assert [sample["index"] for sample in prompts] == [0, 1]


def test_what_comes_with_a_prompt_stays_with_it(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\\nb", "id": 7}\n\n{"prompt": "c"}')
    assert read_prompts(file) == [{"prompt": "a\nb", "id": 7}, {"prompt": "c"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "'a.txt' has no prompts"),
        ("a.txt", b"\xff\xfe", "'a.txt' is not a text file in UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": }', "'a.jsonl', line 2: it is not JSON: Expecting value"),
        ("a.jsonl", b'\n{"text": "a"}', "'a.jsonl', line 2: expected an object with a text as its 'prompt'"),
        ("a.jsonl", b'{"prompt": ""}', "'a.jsonl', line 1: expected an object with a text as its 'prompt'"),
    ],
)
def test_a_file_without_prompts_is_told(
    name: str, content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^--data.prompts: {message}"):
        read_prompts(name)
    with pytest.raises(FileNotFoundError, match=r"there is no file 'absent\.txt'"):
        read_prompts("absent.txt")


class Own(TextDataModule):
    def __init__(self, folder: str) -> None:
        super().__init__(files=f"{folder}/*.txt")


def test_a_subclass_may_have_other_arguments() -> None:
    """As Lightning's command line makes it, whose hyperparameters are the arguments of the subclass."""
    with _given_hyperparameters_context({"folder": "a"}, "maker"):
        data = Own("a")
    assert {key: data.hparams[key] for key in ("tokenizer", "end")} == {"tokenizer": "bytes", "end": None}


def test_a_checkpoint_brings_its_tokenizer_to_predict(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path = str(tmp_path / "tokenizer.json")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 300, "?": 1}, "?")).save(path)
    state = TextDataModule(tokenizer=path).state_dict()
    data = TextDataModule()
    assert data.tokenizer.vocabulary == 256
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=f"the tokenizer '{path}': give --data.tokenizer {path}$"):
        data.load_state_dict(state)
    data.trainer.predicting = True
    data.load_state_dict(state)
    assert data.tokenizer.vocabulary == 301
    data.load_state_dict({})  # of a version that did not say
