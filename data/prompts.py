"""The prompts that a language model continues, from a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_muon.data.tokenizers import Tokenizer


class Prompts(Dataset[dict[str, Any]]):
    """Prompts as tokens.

    A sample is a dictionary with ``tokens``, shape (time,), dtype int64; ``given``, what came with the prompt, and
    itself as ``prompt``; and ``index``, its place among the prompts.

    Args:
        given: Dictionaries with a ``prompt``.
        tokenizer: Text to tokens.

    Raises:
        ValueError: If a prompt has no tokens.
    """

    def __init__(self, given: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> None:
        self.given = given
        self.tokens = [torch.from_numpy(found.astype(np.int64)) for found in tokenizer.encode(texts_of(given))]
        empty = next((number for number, found in enumerate(self.tokens, start=1) if not len(found)), None)
        if empty is not None:
            raise ValueError(f"prompt {empty} is {given[empty - 1]['prompt']!r}, which has no tokens")

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"given": self.given[index], "tokens": self.tokens[index], "index": index}


def texts_of(given: Sequence[dict[str, Any]]) -> list[str]:
    """Return the prompts alone."""
    return [entry["prompt"] for entry in given]


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Read prompts from a file: one a line, or of ``.jsonl`` the key ``prompt`` of each line. Blank lines are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not text in UTF-8, has no prompts, or a line of JSON has none; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--data.prompts: there is no file '{path}'")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"--data.prompts: '{path}' is not a text file in UTF-8") from None
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"--data.prompts: '{path}' has no prompts")
    if path.suffix != ".jsonl":
        return [{"prompt": line} for _, line in numbered]
    return [_from_json(line, f"--data.prompts: '{path}', line {number}") for number, line in numbered]


def _from_json(line: str, place: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: it is not JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
        raise ValueError(f"{place}: expected an object with a text as its 'prompt'")
    return entry
