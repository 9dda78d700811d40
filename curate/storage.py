"""The only module that touches file systems: list a pool, read, and the one primitive that publishes.

A root is a local folder or `s3://bucket/prefix`; a pool may be any URL that fsspec opens. Credentials, region
and endpoint come from the environment alone, as botocore reads it (AWS_PROFILE, AWS_ENDPOINT_URL, ...).
"""

import contextlib
import errno
import functools
import glob
import hashlib
import os
import random
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)
from fsspec.utils import glob_translate
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS
from s3fs.utils import FileExpired

from curate.errors import CommitConflictError, CommitUnknownError, InputChangedError, StoreError, UserError
from curate.messages import one_line

T = TypeVar("T")

_DEADLINE_S = 120.0  # of a call of S3 and all its tries; requests under way when it passes may take 40 s longer
_PAUSES_S = 0.2, 10.0  # between two tries: the first, doubled each time with jitter, and the longest
_ERRORS = (OSError, BotoCoreError, *S3_RETRYABLE_ERRORS)
_ANSWERS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError)  # that no later try changes
_LATER = {404, 408, 409, 412, 429}  # 4xx that a read or a later try may settle; 409 does not mean "exists"
_ACCESS = "check AWS_ACCESS_KEY_ID or AWS_PROFILE, and that they may list, get and put there"
_HINTS = {
    "NoSuchBucket": "create the bucket, or correct its name or AWS_ENDPOINT_URL",
    "RequestTimeTooSkewed": "set this machine's clock",
}


@dataclass(frozen=True)
class FileInfo:
    """One input file as it was when it was listed."""

    path: str  # what open_input takes: a local path without symlinks, or a URL
    size: int  # bytes
    version: str  # etag on S3, mtime in ns on a local disk, the best the server offers elsewhere


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a local path or URL, without listing cache, and the path in it."""
    if _is_local(url):
        return fsspec.filesystem("file"), os.path.abspath(url)
    if url.startswith("s3://"):
        return _s3(), url.removeprefix("s3://").rstrip("/")
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
        self._file: Any = _persist(url, lambda: fs.open(path, "rb", block_size=2**22))
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
            return _persist(self._url, act)
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


def file_info(path: str) -> FileInfo:
    """Look at one file as it is now; FileNotFoundError if it is gone."""
    if _is_local(path):
        with _explained(path):
            stat = os.stat(path)
            return FileInfo(os.path.realpath(path), stat.st_size, str(stat.st_mtime_ns))
    fs, name = filesystem(path)
    return _persist(path, lambda: _remote_file(fs, fs.info(name)))


def list_parquet(url: str) -> tuple[list[FileInfo], list[str]]:
    """List the Parquet files of one file, a folder (recursively) or a glob, and the paths passed over.

    Passed over are names that begin with "." or "_", names without `.parquet`, and what symlinks lead to
    again: every real file is listed once, loops end. A file that is itself named is taken whatever its name.

    Raises:
        UserError: nothing there, nothing of it Parquet, a link to nothing, no permission.
    """
    _refuse_empty_names(url)
    fs, path = filesystem(url)
    files, ignored = [], []
    try:
        is_file, pattern = _persist(url, lambda: fs.info(path))["type"] == "file", re.compile("")
    except (FileNotFoundError, NotADirectoryError):
        if not glob.has_magic(path):
            raise UserError(f"{url}: expected a file, folder or glob; found nothing; correct it") from None
        is_file, pattern = False, re.compile(glob_translate(path))
        path = re.split(r"[*?[]", path, maxsplit=1)[0].rpartition("/")[0]  # the folder above the wildcards
    if is_file:
        return [file_info(url)], []
    # A listing is taken whole or anew: what came of one that failed half-way would be a smaller pool.
    walked = partial(_walk_local, path, {os.path.realpath(path)}) if _is_local(url) else partial(_walk, fs, path)
    for name, file in _persist(url, lambda: list(walked())):
        if file is None or (pattern.match(name) and not name.endswith(".parquet")):
            ignored.append(name)
        elif pattern.match(name):
            files.append(file)
    if missing := [f"{file.path}: expected a file; found a link to nothing" for file in files if file.size < 0]:
        raise UserError(*missing)
    if not files:
        found = f"{len(ignored)} other or hidden names, such as {ignored[0]}" if ignored else "nothing"
        raise UserError(f"{url}: expected *.parquet; found {found}; name a single file to take it as it is")
    return sorted(files, key=lambda file: file.path), sorted(ignored)


@dataclass(frozen=True)
class Store:
    """A root: a local folder or `s3://bucket/prefix`. Picklable; safe to use from threads and after a fork.

    Names are relative to the root. Where the store refuses (credentials, permission, bucket, clock) every
    method raises UserError with the way out; where it gives no usable answer for two minutes, StoreError; where a local
    disk fails, OSError.
    """

    url: str

    def __post_init__(self) -> None:
        if not self.url or not (_is_local(self.url) or re.match("s3://[^/]", self.url)):
            raise UserError(f"root: expected a local folder or s3://bucket/prefix; found {self.url!r}")
        _refuse_empty_names(self.url)
        if _is_local(self.url) and os.path.isfile(self.url):
            raise UserError(f"root: expected a folder; found a file, {self.url}; choose another root")
        # Absolute, because a Ray worker runs in another folder.
        url = os.path.abspath(self.url) if _is_local(self.url) else self.url.rstrip("/")
        object.__setattr__(self, "url", url)

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a name; FileNotFoundError if it is absent."""
        fs, path = self._locate(name)
        return bytes(_persist(self.url, lambda: fs.cat_file(path)))

    def size(self, name: str) -> int | None:
        """Return the size in bytes, or None if there is no such file."""
        fs, path = self._locate(name)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            info = _persist(self.url, lambda: fs.info(path))
            return int(info["size"]) if info["type"] == "file" else None
        return None

    def exists(self, name: str) -> bool:
        """Say whether there is such a file; a folder is not a file."""
        return self.size(name) is not None

    def list(self, folder: str = "") -> list[str]:
        """Return the names directly below a folder, files and folders, sorted; [] if there is none.

        Names that begin with "." are temporary and left out.
        """
        fs, path = self._locate(folder) if folder else filesystem(self.url)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = _persist(self.url, lambda: fs.ls(path, detail=False))
            below = {entry.rstrip("/")[len(path) :].lstrip("/") for entry in found}
            return [f"{folder}/{name}".lstrip("/") for name in sorted(below) if name and name[0] != "."]
        return []

    def open_input(self, name: str) -> BufferedIOBase:
        """Open a name for reads at random offsets; FileNotFoundError if it is absent."""
        self._locate(name)
        return open_input(f"{self.url}/{name}")

    def local_path(self, name: str) -> Path | None:
        """Return where a name lies on a local root, for libraries that want a path; None on S3."""
        path = self._locate(name)[1]
        return Path(path) if _is_local(self.url) else None

    def put_if_absent(self, name: str, data: bytes) -> None:
        """Publish `data` under a name that nobody has published yet: the one act of publication.

        Of any number of writers exactly one wins, and no reader ever sees a part. A name that holds these
        very bytes already counts as published: what we publish is deterministic, so that is an identical
        rerun, or our own write whose answer got lost. After a crash anywhere the same call may be made again.

        Raises:
            CommitConflictError: the name holds other bytes; nothing was overwritten.
            CommitUnknownError: S3 gave no usable answer before the deadline; the write may stand.
            UserError: the store refused, or the folder's file system has no hard links.
            OSError: the local disk failed, for instance is full; nothing was published.
        """
        path = self._locate(name)[1]
        with _explained(self.url):
            found = _create_local(path, data) if _is_local(self.url) else _create_s3(path, data)
        if found != data:
            ours, other = (f"{hashlib.sha256(x).hexdigest()[:12]} ({len(x)} bytes)" for x in (data, found))
            raise CommitConflictError(
                f"{self.url}/{name}: expected sha256 {ours}, found {other}; "
                "another writer published this name first, nothing was overwritten"
            )

    def modified(self, name: str) -> float | None:
        """Return when a name was last written, seconds since 1970 by the store's clock; None if it is absent."""
        fs, path = self._locate(name)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if _is_local(self.url):
                with _explained(self.url):
                    return float(os.stat(path).st_mtime)
            return float(_persist(self.url, lambda: fs.modified(path)).timestamp())
        return None

    def delete(self, name: str) -> None:
        """Remove a name that is neither published nor wanted any more; nothing to do if it is absent."""
        fs, path = self._locate(name)
        with contextlib.suppress(FileNotFoundError):
            _persist(self.url, lambda: fs.rm_file(path))

    def put_bytes(self, name: str, data: bytes) -> None:
        """Write or overwrite atomically: for caches and hints, never for what is published once."""
        fs, path = self._locate(name)
        if not _is_local(self.url):
            _persist(self.url, lambda: fs.pipe_file(path, data))
            return
        with _explained(self.url):
            with _temporary(path, data) as temporary:
                os.replace(temporary, path)
            _sync(os.path.dirname(path))

    def put_file(self, local_path: str | Path, name: str) -> None:
        """Move a finished file from `local_scratch` to a name, atomically, overwriting.

        For caches and files named by their content. A rename on a local root, an upload on S3.
        """
        fs, path = self._locate(name)
        if not _is_local(self.url):
            _persist(self.url, lambda: fs.put_file(str(local_path), path))
            os.unlink(local_path)
            return
        with _explained(self.url):
            _make_folder(os.path.dirname(path))
            _sync(local_path)
            os.replace(local_path, path)
            _sync(os.path.dirname(path))

    @contextlib.contextmanager
    def local_scratch(self) -> Iterator[Path]:
        """Give a temporary local folder for `put_file`: below a local root, else in TMPDIR."""
        local = _is_local(self.url)
        if local:
            _make_folder(self.url)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=self.url if local else None) as folder:
            yield Path(folder)

    def probe(self) -> None:
        """Check, by publishing a hidden name twice, that the second writer is told.

        Raises:
            UserError: the store ignores conditional writes, has no hard links, or refuses us.
        """
        name = f".probe-{uuid.uuid4().hex}"
        try:
            self.put_if_absent(name, b"first")
            with contextlib.suppress(CommitConflictError):
                self.put_if_absent(name, b"second")
                raise UserError(
                    f"{self.url}: expected a store that honours conditional writes (If-None-Match: *); "
                    "found one that overwrites, so that two writers of one round both win; choose another store"
                )
        finally:
            fs, path = self._locate(name)
            with contextlib.suppress(*_ERRORS):  # no permission to delete is no reason to refuse
                fs.rm_file(path)

    def _locate(self, name: str) -> tuple[Any, str]:
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"expected a name relative to the root, without empty, . or .. parts; found {name!r}")
        return filesystem(f"{self.url}/{name}")


def _create_local(path: str, data: bytes) -> bytes:
    """Create a file in one step; return what the name holds then, ours or what was there before."""
    with _temporary(path, data) as temporary, contextlib.suppress(FileExistsError):
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise UserError(f"{path}: expected hard links; this file system has none; move the root") from error
            raise
    _sync(os.path.dirname(path))  # also when it was there: the earlier writer may have died before this
    with open(path, "rb") as file:
        return file.read()


def _create_s3(path: str, data: bytes) -> bytes:
    """Create an object with If-None-Match: *; return what the name holds then, ours or what was there before.

    s3fs and botocore are told not to retry, so that the deadline is ours (aiohttp resends once after a lost
    connection). Whatever the error, a read settles it first: "exists" or a refusal may be about our own write.
    """
    fs, pause_s, deadline, first = _s3(tries=1), _PAUSES_S[0], time.monotonic() + _DEADLINE_S, True
    while True:
        try:
            fs.pipe_file(path, data, mode="create")
            return data
        except _ERRORS as error:
            failure: Exception = error
        try:
            return bytes(fs.cat_file(path))
        except _ERRORS:
            if first and _refusal(failure, path):
                raise failure from failure.__cause__
        first = False  # an earlier try may have been stored, so that a refusal now settles nothing
        if time.monotonic() + pause_s > deadline:
            raise CommitUnknownError(
                f"s3://{path}: no usable answer for {_DEADLINE_S:g} s, at last {failure!r}; the write may "
                "or may not stand; delete nothing, run the same command again"
            ) from failure
        time.sleep(pause_s * random.uniform(0.5, 1))
        pause_s = min(2 * pause_s, _PAUSES_S[1])


def _refuse_empty_names(url: str) -> None:
    if url.startswith("s3://") and "//" in url.removeprefix("s3://").rstrip("/"):
        raise UserError(f"{url}: expected no empty folder name; found // after the bucket; write one slash")


def _is_local(url: str) -> bool:
    return "://" not in url


def _s3(tries: int = 2) -> Any:
    """A session; with more than one try for what a moment mends, so that `_persist` sees longer failures only."""
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


def _refusal(error: BaseException, where: str) -> UserError | None:
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


def _persist(where: str, act: Callable[[], T]) -> T:
    """Do something with a store, again while it fails as if for a moment: the one policy of all calls but commits.

    Raises:
        UserError: the store refuses, or nobody is there who ever answered.
        StoreError: no usable answer before the deadline.
        InputChangedError: the file that is being read was replaced.
        OSError: of a local disk; FileNotFoundError of any store.
    """
    pause_s, deadline = _PAUSES_S[0], time.monotonic() + _DEADLINE_S
    while True:
        try:
            found = act()
        except (*_ERRORS, ValueError) as error:
            failure: Exception = error
        else:
            _answered.add(_origin(where))
            return found
        if mistake := _refusal(failure, where):
            raise mistake from failure
        if isinstance(failure, FileExpired):
            raise InputChangedError(f"{where}: the file was replaced while it was read; run the same command again")
        if _is_local(where) or isinstance(failure, _ANSWERS):
            raise failure
        if isinstance(failure, EndpointConnectionError) and _origin(where) not in _answered:
            raise UserError(f"{where}: {failure}; correct AWS_ENDPOINT_URL, or start what should answer there")
        if time.monotonic() + pause_s > deadline:
            raise StoreError(
                f"{where}: the store gave no usable answer for {_DEADLINE_S:g} s, at last {one_line(failure)!r}; what "
                "it holds may be sound: run the same command again when the store answers"
            ) from failure
        time.sleep(pause_s * random.uniform(0.5, 1))
        pause_s = min(2 * pause_s, _PAUSES_S[1])


_answered: set[tuple[str, str | None]] = set()
"""Stores that have answered this process: their silence is a failure, that of others an address with a slip."""


def _origin(where: str) -> tuple[str, str | None]:
    return where.partition("://")[0], os.environ.get("AWS_ENDPOINT_URL")


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        if mistake := _refusal(error, where):
            raise mistake from error
        raise


def _sync(path: str | Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(path: str) -> None:
    if not os.path.isdir(path):
        _make_folder(os.path.dirname(path))
        os.makedirs(path, exist_ok=True)
        _sync(os.path.dirname(path))


@contextlib.contextmanager
def _temporary(target: str, data: bytes) -> Iterator[str]:
    """Write a complete, synced, hidden file beside its target; unlike mkstemp's, others may read it."""
    _make_folder(os.path.dirname(target))
    path = f"{os.path.dirname(target)}/.tmp-{uuid.uuid4().hex}"
    try:
        with open(path, "xb") as file:
            file.write(data)
        _sync(path)
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _remote_file(fs: Any, info: dict[str, Any]) -> FileInfo:
    version = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified") if info.get(key)), "")
    return FileInfo(str(fs.unstrip_protocol(info["name"])), int(info["size"]), str(version).strip('"'))


def _walk_local(folder: str, seen: set[str]) -> Iterator[tuple[str, FileInfo | None]]:
    """Yield every path below a folder; None for what is hidden and for what was `seen` by its real path."""
    with os.scandir(folder) as entries:
        paths = sorted((entry.is_symlink(), entry.path) for entry in entries)  # real names before links to them
    for _, path in paths:
        real = os.path.realpath(path)
        if os.path.basename(path)[0] in "._" or real in seen:
            yield path, None
            continue
        seen.add(real)
        if os.path.isdir(path):
            yield from _walk_local(path, seen)
        else:
            yield path, file_info(path) if os.path.exists(path) else FileInfo(path, -1, "")  # a link to nothing


def _walk(fs: Any, folder: str) -> Iterator[tuple[str, FileInfo | None]]:
    """Yield every path below a folder; None for what is hidden, once for a whole hidden folder."""
    hidden = set()
    for path, info in fs.find(folder, detail=True).items():
        if match := re.match(r"(?:/[^._/][^/]*)*?/[._][^/]*", path[len(folder) :]):
            hidden.add(folder + match[0])
        elif not path.endswith("/"):  # "folder/" is a marker that consoles leave
            yield path, _remote_file(fs, info)
    yield from ((path, None) for path in hidden)
