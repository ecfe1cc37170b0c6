"""The events of a TensorBoard file, up to where it is damaged."""

from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New


def events(file: Path) -> Iterator[Event | None]:
    """Yield the events, and ``None`` at the end if there is damage behind them.

    TensorBoard's own loader stops at damage without a word. A record that is not yet written to its end, as in the file
    of a run in progress, is no damage.
    """
    reader = PyRecordReader_New(str(file))
    while True:
        try:
            reader.GetNext()
            yield Event.FromString(reader.record())
        except OutOfRangeError:
            return
        except (DataLossError, DecodeError) as error:
            if "truncated" not in str(error):
                yield None
            return
