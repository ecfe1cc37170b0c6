"""What a run reads, exactly resumable: samples, their order, and text turned into tokens.

- :mod:`~lightning_muon.data.epoch_batches`: the order of samples, each once an epoch over all ranks
- :mod:`~lightning_muon.data.loader`: torch's ``DataLoader`` in that order, with a position that checkpoints hold
- :mod:`~lightning_muon.data.data_module`: a ``LightningDataModule`` with such loaders
- :mod:`~lightning_muon.data.tokens`: memory-mapped files of tokens, and samples cut from them
- :mod:`~lightning_muon.data.documents`: the documents in text, JSON lines and Parquet files
- :mod:`~lightning_muon.data.tokenizers`: bytes, ``tokenizer.json``, tiktoken
- :mod:`~lightning_muon.data.prepare`: text to files of tokens, on all cores
- :mod:`~lightning_muon.data.text`: the data module of a language model
- :mod:`~lightning_muon.data.table_files`: tables in CSV and Parquet files
- :mod:`~lightning_muon.data.table_encoding`: a table as tensors, by what its training part says
- :mod:`~lightning_muon.data.table`: the data module of tables
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_muon.data.data_module import EpochDataModule
    from lightning_muon.data.epoch_batches import EpochBatches, Position
    from lightning_muon.data.loader import EpochLoader
    from lightning_muon.data.prepare import PreparedTokens, prepare_tokens
    from lightning_muon.data.table import TableDataModule
    from lightning_muon.data.table_encoding import TableBatch, TableEncoding
    from lightning_muon.data.text import TextDataModule
    from lightning_muon.data.tokenizers import Tokenizer, load_tokenizer
    from lightning_muon.data.tokens import PackedTokens, TokenShards

__all__ = [
    "EpochBatches",
    "EpochDataModule",
    "EpochLoader",
    "PackedTokens",
    "Position",
    "PreparedTokens",
    "TableBatch",
    "TableDataModule",
    "TableEncoding",
    "TextDataModule",
    "TokenShards",
    "Tokenizer",
    "load_tokenizer",
    "prepare_tokens",
]

_PLACES = {
    "EpochBatches": "epoch_batches",
    "EpochDataModule": "data_module",
    "EpochLoader": "loader",
    "PackedTokens": "tokens",
    "Position": "epoch_batches",
    "PreparedTokens": "prepare",
    "TableBatch": "table_encoding",
    "TableDataModule": "table",
    "TableEncoding": "table_encoding",
    "TextDataModule": "text",
    "TokenShards": "tokens",
    "Tokenizer": "tokenizers",
    "load_tokenizer": "tokenizers",
    "prepare_tokens": "prepare",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the processes that make tokens need neither torch nor Lightning."""
    if name in _PLACES:
        return getattr(import_module(f"lightning_muon.data.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
