"""Every error that the library raises on purpose.

    CurateError
    ├── UserError            the user's mistake: one line each, exit status 2
    │   └── DamagedError     a file of the root is not what was written there
    ├── InputChangedError    a shard is no longer the file that was inventoried, exit status 2
    │   └── ShardDamagedError  it is, and its rows cannot be read all the same
    ├── RowsLostError        a tally does not close; a round that loses rows is never committed
    ├── StoreError           the store failed or did not answer; nothing is known to be wrong with what it holds
    ├── ClusterError         Ray lost a worker or a node, or had no room left; likewise
    ├── StreamStalledError   neither the next round nor the end of the stream came in time
    ├── CommitConflictError  somebody else committed other bytes under this name, exit status 3
    └── CommitUnknownError   the store did not answer; the commit may or may not stand

Anything else that escapes is a defect of ours and keeps its traceback.
"""


class CurateError(Exception):
    """Base of the errors that the command line prints as one line and turns into an exit status."""

    exit_status = 1


class UserError(CurateError):
    """One or more mistakes in what the user gave; each line says where, expected, found and the way out."""

    exit_status = 2

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)  # as they are, so that the error survives pickling on its way from a worker
        self.lines = lines

    def __str__(self) -> str:
        return "\n".join(self.lines)


class DamagedError(UserError):
    """A file of the root is not what was written there.

    Args:
        name: of the file within the root.
        reason: what gives it away.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name}: expected what was written there, found damage ({reason}); restore it from a copy of the root"
        )
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type["DamagedError"], tuple[str, str]]:
        return DamagedError, (self.name, self.reason)


class InputChangedError(CurateError):
    """A file of the pool differs from what the inventory recorded."""

    exit_status = 2


class ShardDamagedError(InputChangedError):
    """A shard whose footer is sound and whose rows cannot be read.

    Args:
        path: of the file.
        rows: that its footer promises.
        found: what is there instead.
    """

    def __init__(self, path: str, rows: int, found: str) -> None:
        super().__init__(
            f"{path}: expected {rows} readable rows, found {found}; replace the file, or move it out of the pool, and "
            "delete the folder of a round that was begun with it"
        )
        self.path = path
        self.rows = rows
        self.found = found

    def __reduce__(self) -> tuple[type["ShardDamagedError"], tuple[str, int, str]]:
        return ShardDamagedError, (self.path, self.rows, self.found)


class StoreError(CurateError):
    """A store gave no usable answer for so long that we gave up; says nothing of the data in it."""


class ClusterError(CurateError):
    """Ray could not do what it was asked; says nothing of what was asked."""


class RowsLostError(CurateError):
    """Rows in differ from rows kept plus rows dropped."""


class StreamStalledError(CurateError):
    """A follower waited as long as it was told to, and neither a round nor the end of the stream came."""


class CommitConflictError(CurateError):
    """A name that is published once already holds other bytes."""

    exit_status = 3


class CommitUnknownError(CurateError):
    """A conditional write was sent and neither success nor failure can be established: delete nothing."""
