"""Small records of the root: JSON that carries the hash of all else in it, so that no flipped bit is believed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from curate.errors import DamagedError
from curate.messages import one_line

SEAL = "seal"


def seal(record: Mapping[str, Any]) -> bytes:
    """The bytes of a record of plain values; equal records have equal bytes.

    >>> unseal(seal({"rounds": 3}), "end.json")
    {'rounds': 3}
    """
    plain = json.loads(json.dumps(record))  # as it will be read: keys are text, tuples lists
    return (json.dumps(plain | {SEAL: _hash(plain)}, indent=1, sort_keys=True) + "\n").encode()


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """The inverse of `seal`; `name` is for the message.

    Raises:
        DamagedError: not a record, or not the one that was written.
    """
    try:
        record = dict(json.loads(data))
        expected = record.pop(SEAL)
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(name, f"it is no sealed record, {one_line(error) or type(error).__name__}") from error
    if (found := _hash(record)) != expected:
        raise DamagedError(name, f"sha256 {found[:12]} and not {str(expected)[:12]}")
    return record


def _hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
