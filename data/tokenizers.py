"""Tokenizers: bytes, a ``tokenizer.json`` of Hugging Face, or a vocabulary of tiktoken."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_muon.data.extras import package

# What may end a document, in the vocabularies of GPT-2, Llama, Qwen, T5, BERT and others.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")

# How GPT-2 cuts text into words before it merges bytes; a file of tiktoken holds the vocabulary only.
# https://github.com/openai/tiktoken/blob/main/tiktoken_ext/openai_public.py
_GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer(ABC):
    """Text to tokens, and back.

    Attributes:
        vocabulary: The number of tokens.
        end: The token between documents; ``None`` if there is none.
        identity: What changes with the tokens that a text gives.
    """

    vocabulary: int
    end: int | None
    identity: str

    @property
    def dtype(self) -> str:
        """The smallest dtype of numpy that holds a token."""
        bits = next(bits for bits in (8, 16, 32) if self.vocabulary <= 2**bits)
        return f"uint{bits}"

    def text(self, content: bytes) -> str:
        """Return the text in a file's bytes; what is no UTF-8 becomes the replacement character."""
        return content.decode(errors="replace")

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of texts."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; what is no text is shown as the replacement character."""


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8; documents follow one another without a mark."""

    vocabulary = 256
    end = None
    identity = "bytes"

    def text(self, content: bytes) -> str:
        """Return bytes as a text that :meth:`encode` turns into the same bytes, whatever the encoding of a file."""
        return content.decode(errors="surrogateescape")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the bytes of texts."""
        return [np.frombuffer(text.encode(errors="surrogateescape"), dtype=np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of bytes."""
        return bytes(tokens).decode(errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``, read by the package ``tokenizers``."""

    def __init__(self, path: Path, end: str | None = None) -> None:
        with package("tokenizers", path):
            from tokenizers import Tokenizer as Loaded  # noqa: PLC0415
        self._tokenizer = Loaded.from_file(str(path))
        self.vocabulary = self._tokenizer.get_vocab_size()
        self.end = _end_of(path, self._tokenizer.get_vocab(), end)
        self.identity = _digest(path, end)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of texts, without those that a model would add around them."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text


class TiktokenTokenizer(Tokenizer):
    """A ``.tiktoken`` file, read by the package ``tiktoken``; words are cut as GPT-2 cuts them."""

    def __init__(self, path: Path, end: str | None = None) -> None:
        with package("tiktoken", path):
            import tiktoken  # noqa: PLC0415
            from tiktoken.load import load_tiktoken_bpe  # noqa: PLC0415
        ranks = load_tiktoken_bpe(str(path))
        special = {end or _ENDS[0]: max(ranks.values()) + 1}
        self._encoding = tiktoken.Encoding(
            path.stem, pat_str=_GPT2_WORDS, mergeable_ranks=ranks, special_tokens=special
        )
        self.vocabulary = self._encoding.n_vocab
        self.end = next(iter(special.values()))
        self.identity = _digest(path, end)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of texts; the name of the end in a text is text."""
        return [np.array(self._encoding.encode_ordinary(text), dtype=self.dtype) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        text: str = self._encoding.decode(list(tokens))
        return text


def load_tokenizer(name: str | Path, end: str | None = None) -> Tokenizer:
    """Return a tokenizer.

    Args:
        name: ``"bytes"``; a ``tokenizer.json``, or a folder that holds one, such as a model of Hugging Face; or a
            ``.tiktoken`` file.
        end: The token between documents, by its text. Default: the usual one that the vocabulary has.

    Raises:
        FileNotFoundError: If the file is not there.
        ModuleNotFoundError: If the package that reads it is not installed.
        ValueError: If the file is of another kind, or the vocabulary has no such token.
    """
    if str(name) == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer: there is no file {path}; give 'bytes', a tokenizer.json or a .tiktoken file"
        )
    if path.suffix == ".tiktoken":
        return TiktokenTokenizer(path, end)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, end)
    raise ValueError(f"tokenizer: {path} is neither a tokenizer.json nor a .tiktoken file")


def _end_of(path: Path, vocabulary: dict[str, int], end: str | None) -> int | None:
    if end is not None and end not in vocabulary:
        raise ValueError(f"{path} has no token {end!r}")
    names = _ENDS if end is None else (end,)
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def _digest(path: Path, end: str | None) -> str:
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()} {end}"
