"""A data module for language models: text or tokens in files, in samples of equal length."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from lightning_muon.data.data_module import EpochDataModule
from lightning_muon.data.documents import SPLITS, all_files, matching_files, readable_files
from lightning_muon.data.loader import EpochLoader
from lightning_muon.data.prepare import PreparedTokens, prepare_tokens
from lightning_muon.data.prompts import Prompts, read_prompts
from lightning_muon.data.tokenizers import Tokenizer, load_tokenizer
from lightning_muon.data.tokens import PackedTokens, TokenShards

# Enough to estimate how frequent tokens are.
_BASELINE_TOKENS = 1 << 24


class TextDataModule(EpochDataModule):
    """Samples of text for training, validation and test, each token predicted once an epoch.

    Text becomes tokens once, see :func:`~lightning_muon.data.prepare_tokens`; files of tokens (``.bin``: integers, or
    shards of llm.c) are used as they are. A subclass may have a text of its own, by :meth:`default_files`.

    Args:
        files: Patterns of files, such as ``corpus/**/*.txt``; or those of each split, ``{train: …, val: …}``. Text in
            any encoding, JSON lines, Parquet, or tokens. Of tokens, files with ``val`` or ``test`` in their names are
            for these splits.
        tokenizer: ``bytes``; a ``tokenizer.json`` or a folder that holds one; or a ``.tiktoken`` file.
        end: The token between documents, by its text; default: the usual one of the vocabulary.
        field: The key of the text in JSON lines, or its column in Parquet.
        dtype: The integers of ``.bin`` files without a header: ``uint8``, ``uint16`` or ``uint32``.
        context: Input tokens per sample.
        batch_size: Samples per batch and device.
        val_samples: Samples of a validation or test, spread over the split; at most all.
        prompt: The text that ``predict`` continues.
        prompts: A file with several, in place of it: one a line, or the key ``prompt`` of JSON lines (``.jsonl``).
        data_dir: Folder of the prepared tokens.
        num_workers: Processes that load samples, for each device.
        seed: Seed of the order of samples.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        files: str | list[str] | dict[str, str | list[str]] | None = None,
        tokenizer: str = "bytes",
        end: str | None = None,
        field: str = "text",
        dtype: str = "uint16",
        context: int = 256,
        batch_size: int = 16,
        val_samples: int = 512,
        prompt: str = "def ",
        prompts: str | None = None,
        data_dir: str = "data",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        # What an export needs to know. As values: a subclass may have other arguments.
        self.save_hyperparameters({"tokenizer": tokenizer, "end": end}, logger=False)
        for name, value in (("context", context), ("val_samples", val_samples)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not prompt:
            raise ValueError("prompt must have at least one character")
        self.files = files
        self.tokenizer_path = tokenizer
        self.end = end
        self.field = field
        self.dtype = dtype
        self.context = context
        self.val_samples = val_samples
        self.prompt = prompt
        self.prompts = prompts
        self.data_dir = data_dir

    def default_files(self) -> Iterable[Path]:
        """Return the files of the text, where ``files`` does not say."""
        raise ValueError("--data.files: say which files the text is in")

    @override
    def prepare_data(self) -> None:
        if not self._are_tokens:
            _ = self._prepared

    @override
    def train_dataloader(self) -> EpochLoader:
        return self.train_loader(PackedTokens(self.tokens("train"), self.context))

    @override
    def val_dataloader(self) -> EpochLoader:
        return self._spread("val")

    @override
    def test_dataloader(self) -> EpochLoader:
        return self._spread("test")

    @override
    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the loader of the prompts; a batch is a list of samples of :class:`~lightning_muon.data.Prompts`."""
        given = [{"prompt": self.prompt}] if self.prompts is None else read_prompts(self.prompts)
        return self.predict_loader(Prompts(given, self.tokenizer), collate_fn=list)

    @property
    def tokens_per_sample(self) -> int:
        """Tokens that are predicted in a sample."""
        return self.context

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens, and back."""
        return load_tokenizer(self.tokenizer_path, self.end)

    @property
    def vocabulary(self) -> int:
        """The number of tokens, for the size of the network.

        Raises:
            ValueError: If the text is files of tokens, and no tokenizer says how many there are.
        """
        if self.tokenizer_path == "bytes" and self.files is not None and self._are_tokens:
            raise ValueError(
                "--data.files: files of tokens do not say how many different ones there are: give the number by"
                " --model.net.vocabulary, or their tokenizer by --data.tokenizer"
            )
        return self.tokenizer.vocabulary

    @cached_property
    def unigram_loss(self) -> float:
        """Validation loss, in nats per token, of a model that predicts how frequent tokens are in training."""
        tokens = [shards.read(0, min(len(shards), _BASELINE_TOKENS)) for shards in map(self.tokens, ("train", "val"))]
        size = 1 + max(int(found.max()) for found in tokens)
        train, val = (np.bincount(found, minlength=size) for found in tokens)
        log_frequency = np.log((train + 1) / (train + 1).sum())
        return -float((val * log_frequency).sum() / val.sum())

    def tokens(self, split: str) -> TokenShards:
        """Return the tokens of ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            ValueError: If there are none.
        """
        if not self._are_tokens:
            return self._prepared.split(split)
        paths = self._paths[split] if isinstance(self._paths, Mapping) else _of_split(self._paths, split)
        if not paths:
            raise ValueError(f"--data.files: no file of tokens is for the split {split!r}: none has it in its name")
        return TokenShards(paths, self.dtype)

    @cached_property
    def _paths(self) -> list[Path] | dict[str, list[Path]]:
        if isinstance(self.files, Mapping):
            if unknown := set(self.files) - set(SPLITS):
                raise ValueError(f"--data.files: {unknown.pop()!r} is no split; there are {', '.join(SPLITS)}")
            return {split: matching_files(patterns) for split, patterns in self.files.items()}
        return readable_files(self.default_files()) if self.files is None else matching_files(self.files)

    @cached_property
    def _are_tokens(self) -> bool:
        kinds = {path.suffix == ".bin" for path in all_files(self._paths)}
        if len(kinds) > 1:
            raise ValueError("--data.files: give either text or files of tokens (.bin), not both")
        return kinds == {True}

    @cached_property
    def _prepared(self) -> PreparedTokens:
        return prepare_tokens(self._paths, self.data_dir, self.tokenizer_path, end=self.end, field=self.field)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tokenizer": self.tokenizer_path, "end": self.end}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a run was; `predict` takes its tokenizer, if none is given.

        Raises:
            ValueError: If a run with a tokenizer is to go on with bytes.
        """
        state = dict(state_dict)
        path, end = state.pop("tokenizer", "bytes"), state.pop("end", None)
        if path != "bytes" and self.tokenizer_path == "bytes" and not (self.files is not None and self._are_tokens):
            if self.trainer is None or not self.trainer.predicting:
                raise ValueError(
                    f"the checkpoint is of a run with the tokenizer '{path}': give --data.tokenizer {path}"
                )
            self.tokenizer_path, self.end = path, end
            self.__dict__.pop("tokenizer", None)
        super().load_state_dict(state)

    def _spread(self, split: str) -> EpochLoader:
        samples = PackedTokens(self.tokens(split), self.context)
        count = min(len(samples), max(self.val_samples, self.trainer.world_size if self.trainer else 1))
        return self.eval_loader(Subset(samples, [index * len(samples) // count for index in range(count)]))  # type: ignore[arg-type]


def _of_split(paths: Sequence[Path], split: str) -> list[Path]:
    own = {path: next((name for name in ("val", "test") if name in path.stem.lower()), "train") for path in paths}
    return [path for path in paths if own[path] == split]
