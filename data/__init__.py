"""What a run reads, exactly resumable: samples, their order, and text turned into tokens.

- :mod:`~lightning_muon.data.epoch_batches`: the order of samples, each once an epoch over all ranks
- :mod:`~lightning_muon.data.loader`: torch's ``DataLoader`` in that order, with a position that checkpoints hold
- :mod:`~lightning_muon.data.data_module`: a ``LightningDataModule`` with such loaders
- :mod:`~lightning_muon.data.tokens`: memory-mapped files of tokens, and samples cut from them
- :mod:`~lightning_muon.data.documents`: the documents in text, JSON lines and Parquet files
- :mod:`~lightning_muon.data.tokenizers`: bytes, ``tokenizer.json``, tiktoken
- :mod:`~lightning_muon.data.prepare`: text to files of tokens, on all cores
- :mod:`~lightning_muon.data.prompts`: the prompts that a language model continues
- :mod:`~lightning_muon.data.text`: the data module of a language model
- :mod:`~lightning_muon.data.streamed_text`: the same, streamed from object storage by litdata
- :mod:`~lightning_muon.data.image_files`: images in folders of classes, and their splits
- :mod:`~lightning_muon.data.image_samples`: images as tensors, augmented in training
- :mod:`~lightning_muon.data.images`: the data module of an image classifier
- :mod:`~lightning_muon.data.table_files`: tables in CSV and Parquet files
- :mod:`~lightning_muon.data.table_encoding`: a table as tensors, by what its training part says
- :mod:`~lightning_muon.data.table`: the data module of tables
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_muon.data.data_module import EpochDataModule
    from lightning_muon.data.epoch_batches import EpochBatches, Position
    from lightning_muon.data.image_files import LabelledImages
    from lightning_muon.data.image_samples import ImageForm
    from lightning_muon.data.images import ImageDataModule
    from lightning_muon.data.loader import EpochLoader, RandomSamples, UnreadableSampleError
    from lightning_muon.data.prepare import PreparedTokens, prepare_tokens
    from lightning_muon.data.prompts import Prompts, read_prompts
    from lightning_muon.data.streamed_text import StreamedTextDataModule
    from lightning_muon.data.table import TableDataModule
    from lightning_muon.data.table_encoding import TableBatch, TableEncoding
    from lightning_muon.data.table_files import read_table
    from lightning_muon.data.text import TextDataModule
    from lightning_muon.data.tokenizers import Tokenizer, load_tokenizer
    from lightning_muon.data.tokens import PackedTokens, TokenShards

__all__ = [
    "EpochBatches",
    "EpochDataModule",
    "EpochLoader",
    "ImageDataModule",
    "ImageForm",
    "LabelledImages",
    "PackedTokens",
    "Position",
    "PreparedTokens",
    "Prompts",
    "RandomSamples",
    "StreamedTextDataModule",
    "TableBatch",
    "TableDataModule",
    "TableEncoding",
    "TextDataModule",
    "TokenShards",
    "Tokenizer",
    "UnreadableSampleError",
    "load_tokenizer",
    "prepare_tokens",
    "read_prompts",
    "read_table",
]

_PLACES = {
    "EpochBatches": "epoch_batches",
    "EpochDataModule": "data_module",
    "EpochLoader": "loader",
    "ImageDataModule": "images",
    "ImageForm": "image_samples",
    "LabelledImages": "image_files",
    "PackedTokens": "tokens",
    "Position": "epoch_batches",
    "PreparedTokens": "prepare",
    "Prompts": "prompts",
    "RandomSamples": "loader",
    "StreamedTextDataModule": "streamed_text",
    "TableBatch": "table_encoding",
    "TableDataModule": "table",
    "TableEncoding": "table_encoding",
    "TextDataModule": "text",
    "TokenShards": "tokens",
    "Tokenizer": "tokenizers",
    "UnreadableSampleError": "loader",
    "load_tokenizer": "tokenizers",
    "prepare_tokens": "prepare",
    "read_prompts": "prompts",
    "read_table": "table_files",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the processes that make tokens need neither torch nor Lightning."""
    if name in _PLACES:
        return getattr(import_module(f"lightning_muon.data.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
