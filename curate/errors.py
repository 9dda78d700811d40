"""Every error that the library raises on purpose.

    CurateError
    ├── UserError            the user's mistake: one line each, exit status 2
    ├── InputChangedError    a shard is no longer the file that was inventoried, exit status 2
    ├── RowsLostError        a tally does not close; a round that loses rows is never committed
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


class InputChangedError(CurateError):
    """A file of the pool differs from what the inventory recorded."""

    exit_status = 2


class RowsLostError(CurateError):
    """Rows in differ from rows kept plus rows dropped."""


class StreamStalledError(CurateError):
    """A follower waited as long as it was told to, and neither a round nor the end of the stream came."""


class CommitConflictError(CurateError):
    """A name that is published once already holds other bytes."""

    exit_status = 3


class CommitUnknownError(CurateError):
    """A conditional write was sent and neither success nor failure can be established: delete nothing."""
