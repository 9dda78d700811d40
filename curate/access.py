"""How a file system is reached: sessions, what a store refuses, what a moment mends, and reads that tell the two apart.

Credentials, region and endpoint come from the environment alone, as botocore reads it: AWS_PROFILE, AWS_ENDPOINT_URL, …
"""

import contextlib
import functools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase
from typing import Any, TypeVar, cast

import fsspec

from curate.errors import InputChangedError, StoreError, UserError
from curate.messages import one_line

try:
    from botocore.exceptions import (  # type: ignore[import-untyped]
        BotoCoreError,
        EndpointConnectionError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
        ProfileNotFound,
    )
    from s3fs import S3FileSystem
    from s3fs.core import S3_RETRYABLE_ERRORS
    from s3fs.utils import FileExpired
except ModuleNotFoundError:  # a root on a local disk needs no S3, and a trainer's image may lack it

    class BotoCoreError(Exception):  # type: ignore[no-redef]
        """Never raised, as are the others."""

    EndpointConnectionError = NoCredentialsError = ParamValidationError = BotoCoreError
    PartialCredentialsError = ProfileNotFound = FileExpired = BotoCoreError
    S3FileSystem, S3_RETRYABLE_ERRORS = None, ()

T = TypeVar("T")
DEADLINE_S = 120.0  # of a call of S3 and all its tries; requests under way when it passes may take 40 s longer
PAUSES_S = 0.2, 10.0  # between two tries: the first, doubled each time with jitter, and the longest
ERRORS = (OSError, BotoCoreError, *S3_RETRYABLE_ERRORS)
_ANSWERS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError)  # that no later try changes
_LATER = {404, 408, 409, 412, 429}  # 4xx that a read or a later try may settle; 409 does not mean "exists"
_ACCESS = "check AWS_ACCESS_KEY_ID or AWS_PROFILE, and that they may list, get and put there"
_HINTS = {
    "NoSuchBucket": "create the bucket, or correct its name or AWS_ENDPOINT_URL",
    "RequestTimeTooSkewed": "set this machine's clock",
}


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a local path or URL, without listing cache, and the path in it."""
    if is_local(url):
        return fsspec.filesystem("file"), os.path.abspath(url)
    if url.startswith("s3://"):
        return s3_session(), url.removeprefix("s3://").rstrip("/")
    try:
        return cast("tuple[Any, str]", fsspec.url_to_fs(url, use_listings_cache=False))
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: expected a local path or a URL that fsspec opens; {error}") from error


def open_input(path: str) -> BufferedIOBase:
    """Open a local path or a URL for reads at random offsets, as `pyarrow.parquet.ParquetFile` makes them.

    Leave it by `with`: what the store did wrong is raised there, whatever the reading library made of it.

    Raises:
        UserError: the store refuses.
        StoreError: the store fails, now or while the file is read.
        InputChangedError: while the file is read, another one has its name.
    """
    return _Input(path)


def open_for_arrow(path: str) -> Any:
    """The same for Arrow, which reads a local file itself, in a quarter less time; raises as `open_input`.

    What Arrow reads through Python is memory of Python's, of which a thread of Arrow's lets go when it will. If the
    interpreter is being taken down by then, the process aborts: one `curate show` in seven on a busy machine did, its
    answer given.
    """
    return persist(path, lambda: _native(path)) if is_local(path) else open_input(path)


def _native(path: str) -> Any:
    import pyarrow  # noqa: PLC0415 which a command that reads no table need not wait for

    with open(path, "rb"):  # whose errors say what is wrong with which file
        return pyarrow.OSFile(path)


class _Input(BufferedIOBase):
    """A file that is being read: failures of the store are waited out, and told apart from damage of the file.

    A Parquet reader turns what a read raises into whatever error it likes, such as those of a broken page; so what the
    store did is kept, and raised in the end.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._failure: BaseException | None = None
        fs, path = filesystem(url)
        # Read 4 MiB ahead, where s3fs would read 50 MB past the column asked for, and none would make hashing crawl.
        self._file: Any = persist(url, lambda: fs.open(path, "rb", block_size=2**22))
        self._size = int(self._file.seek(0, os.SEEK_END))
        self._file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def read(self, size: int | None = -1) -> bytes:
        start = self.tell()
        wanted = max(0, self._size - start)
        wanted = wanted if size is None or size < 0 else min(size, wanted)

        def act() -> bytes:
            self._file.seek(start)
            data: bytes = self._file.read(wanted)
            if len(data) != wanted:  # an answer that was cut off, which not every client notices
                raise OSError(f"{len(data)} of {wanted} bytes came from offset {start} on")
            return data

        try:
            return persist(self._url, act)
        except BaseException as error:
            self._failure = error
            raise

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._failure is not None:
            raise self._failure


def read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Some ranges of bytes of a file, each from its start on and before its end, asked for at once.

    Raises:
        UserError, StoreError: as `open_input`.
    """
    fs, path = filesystem(url)
    starts, ends = [start for start, _ in ranges], [end for _, end in ranges]

    def act() -> list[bytes]:
        found = [bytes(data) for data in fs.cat_ranges([path] * len(ranges), starts, ends, on_error="raise")]
        if [len(data) for data in found] != [end - start for start, end in ranges]:
            raise OSError("an answer was cut off")
        return found

    return persist(url, act) if ranges else []


def is_local(url: str) -> bool:
    """Say whether a URL is a path on this machine."""
    return "://" not in url


def s3_session(tries: int = 2) -> Any:
    """A session; with more than one try for what a moment mends, so that `persist` sees longer failures only."""
    if S3FileSystem is None:
        raise UserError("s3://: expected s3fs, found none installed; pip install 'curate-clip[s3]'")
    keys = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_ACCESS_KEY_ID")
    return _s3_of(os.getpid(), tuple(os.environ.get(key) for key in keys), tries)


@functools.cache
def _s3_of(pid: int, environment: tuple[str | None, ...], tries: int) -> Any:
    """Make one session per process, because none survives a fork, and per environment."""
    config = {"retries": {"mode": "standard", "total_max_attempts": tries}}
    # With a listing cache a poller that once missed a name never sees it.
    fs = S3FileSystem(use_listings_cache=False, skip_instance_cache=True, config_kwargs=config)
    fs.retries = 1
    return fs


def refusal(error: BaseException, where: str) -> UserError | None:
    """Return the mistake behind an error if no later try could do better, else None."""
    for kind, found, way_out in (
        (NoCredentialsError, "expected S3 credentials in the environment; found none", _ACCESS),
        (ParamValidationError, one_line(error), "correct it"),
        ((ProfileNotFound, PartialCredentialsError), str(error), "correct AWS_PROFILE, or what it stands for"),
        (ValueError, str(error), "AWS_ENDPOINT_URL begins with http:// or https://"),
    ):
        if isinstance(error, kind) and (kind is not ValueError or "endpoint" in str(error)):
            return UserError(f"{where}: {found}; {way_out}")
    answer = getattr(error.__cause__, "response", None)
    if answer is None:  # not from S3
        return UserError(f"{where}: {error}; grant this user access") if isinstance(error, PermissionError) else None
    code, status = str(answer["Error"].get("Code")), int(answer["ResponseMetadata"]["HTTPStatusCode"])
    later = status in _LATER or status == 500 or status > 501 or code == "RequestTimeout"  # 501: not implemented
    if later and code != "NoSuchBucket":
        return None
    hint = _HINTS.get(code, _ACCESS if status == 403 else "check the root and AWS_ENDPOINT_URL")
    return UserError(f"{where}: the store answered {status} {code}, {error}; {hint}")


def persist(where: str, act: Callable[[], T]) -> T:
    """Do something with a store, again while it fails as if for a moment: the one policy of all calls but commits.

    Raises:
        UserError: the store refuses, or nobody is there who ever answered.
        StoreError: no usable answer before the deadline.
        InputChangedError: the file that is being read was replaced.
        OSError: of a local disk; FileNotFoundError of any store.
    """
    pause_s, deadline = PAUSES_S[0], time.monotonic() + DEADLINE_S
    while True:
        try:
            found = act()
        except (*ERRORS, ValueError) as error:
            failure: Exception = error
        else:
            _answered.add(_origin(where))
            return found
        if mistake := refusal(failure, where):
            raise mistake from failure
        if isinstance(failure, FileExpired):
            raise InputChangedError(f"{where}: the file was replaced while it was read; run the same command again")
        if is_local(where) or isinstance(failure, _ANSWERS):
            raise failure
        if isinstance(failure, EndpointConnectionError) and _origin(where) not in _answered:
            raise UserError(f"{where}: {failure}; correct AWS_ENDPOINT_URL, or start what should answer there")
        if time.monotonic() + pause_s > deadline:
            raise StoreError(
                f"{where}: the store gave no usable answer for {DEADLINE_S:g} s, at last {one_line(failure)!r}; what "
                "it holds may be sound: run the same command again when the store answers"
            ) from failure
        time.sleep(pause_s * random.uniform(0.5, 1))
        pause_s = min(2 * pause_s, PAUSES_S[1])


def _origin(where: str) -> tuple[str, str | None]:
    return where.partition("://")[0], os.environ.get("AWS_ENDPOINT_URL")


_answered: set[tuple[str, str | None]] = set()
"""Stores that have answered this process: their silence is a failure, that of others an address with a slip."""


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """Raise what a local disk refuses as the user's mistake."""
    try:
        yield
    except (*ERRORS, ValueError) as error:
        if mistake := refusal(error, where):
            raise mistake from error
        raise
