"""The records of a TensorBoard event file, read on where some of them are damaged."""

import struct
from collections.abc import Iterator

from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

# A record is its length (uint64), the checksum of that (uint32), the data, and their checksum (uint32), little-endian:
# https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
_HEAD = struct.Struct("<QI")
_TAIL = struct.Struct("<I")


def records(data: bytes) -> Iterator[bytes | None]:
    """Yield the records of a file, and ``None`` in the place of each stretch that is damaged.

    TensorBoard's own reader stops in silence at the first damage. A record that is not yet written to its end, as in
    the file of a run in progress, is no damage.

    Args:
        data: The file.
    """
    place = 0
    while place < len(data):
        length = _length(data, place)
        if length is not None and _is_sound(data, place, length):
            yield data[place + _HEAD.size : place + _HEAD.size + length]
            place += _HEAD.size + length + _TAIL.size
        elif _is_unfinished(data, place, length):
            return
        else:
            yield None
            place = _next_sound(data, place + 1)


def _length(data: bytes, place: int) -> int | None:
    """Return how many bytes of data the record at a place has; ``None`` if none can begin there."""
    if place + _HEAD.size > len(data):
        return None
    length, checksum = _HEAD.unpack_from(data, place)
    return int(length) if masked_crc32c(data[place : place + 8]) == checksum else None


def _is_sound(data: bytes, place: int, length: int) -> bool:
    start, end = place + _HEAD.size, place + _HEAD.size + length
    if end + _TAIL.size > len(data):
        return False
    (checksum,) = _TAIL.unpack_from(data, end)
    return bool(masked_crc32c(data[start:end]) == checksum)


def _is_unfinished(data: bytes, place: int, length: int | None) -> bool:
    """Whether the file ends inside the record, and nothing that is there is wrong."""
    if length is None:
        return place + _HEAD.size > len(data)
    return place + _HEAD.size + length + _TAIL.size > len(data)


def _next_sound(data: bytes, start: int) -> int:
    """Return where the next sound record begins, or the end of the file.

    The upper half of a length is zero; only where four zeros stand is a checksum worth its time.
    """
    zeros = data.find(bytes(4), start + 4)
    while zeros >= 0:
        place = zeros - 4
        if any(data[place:zeros]):
            length = _length(data, place)
            if length is not None and _is_sound(data, place, length):
                return place
        zeros = data.find(bytes(4), zeros + 1)
    return len(data)
