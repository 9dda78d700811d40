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
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

import fsspec
from botocore.exceptions import BotoCoreError, NoCredentialsError, ParamValidationError  # type: ignore[import-untyped]
from fsspec.utils import glob_translate
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

from curate.errors import CommitConflictError, CommitUnknownError, UserError

_DEADLINE_S = 120.0  # of put_if_absent on S3; requests under way when it passes may take 40 s longer
_PAUSES_S = 0.2, 10.0  # between two tries: the first, doubled each time with jitter, and the longest
_ERRORS = (OSError, BotoCoreError, *S3_RETRYABLE_ERRORS)
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
    """Open a local path or a URL for reads at random offsets, as `pyarrow.parquet.ParquetFile` makes them."""
    fs, path = filesystem(path)
    # Read 4 MiB ahead, where s3fs would read 50 MB past the column asked for, and none would make hashing crawl.
    return cast("BufferedIOBase", fs.open(path, "rb", block_size=2**22))


def file_info(path: str) -> FileInfo:
    """Look at one file as it is now; FileNotFoundError if it is gone."""
    with _explained(path):
        if _is_local(path):
            stat = os.stat(path)
            return FileInfo(os.path.realpath(path), stat.st_size, str(stat.st_mtime_ns))
        fs, path = filesystem(path)
        return _remote_file(fs, fs.info(path))


def list_parquet(url: str) -> tuple[list[FileInfo], list[str]]:
    """List the Parquet files of one file, a folder (recursively) or a glob, and the paths passed over.

    Passed over are names that begin with "." or "_", names without `.parquet`, and what symlinks lead to
    again: every real file is listed once, loops end. A file that is itself named is taken whatever its name.

    Raises:
        UserError: nothing there, nothing of it Parquet, a link to nothing, no permission.
    """
    fs, path = filesystem(url)
    files, ignored = [], []
    with _explained(url):
        try:
            is_file, pattern = fs.info(path)["type"] == "file", re.compile("")
        except (FileNotFoundError, NotADirectoryError):
            if not glob.has_magic(path):
                raise UserError(f"{url}: expected a file, folder or glob; found nothing; correct it") from None
            is_file, pattern = False, re.compile(glob_translate(path))
            path = re.split(r"[*?[]", path, maxsplit=1)[0].rpartition("/")[0]  # the folder above the wildcards
        if is_file:
            return [file_info(url)], []
        for name, file in _walk_local(path, {os.path.realpath(path)}) if _is_local(url) else _walk(fs, path):
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
    method raises UserError with the way out; where it fails, OSError.
    """

    url: str

    def __post_init__(self) -> None:
        if not self.url or not (_is_local(self.url) or re.match("s3://[^/]", self.url)):
            raise UserError(f"root: expected a local folder or s3://bucket/prefix; found {self.url!r}")
        if _is_local(self.url) and os.path.isfile(self.url):
            raise UserError(f"root: expected a folder; found a file, {self.url}; choose another root")
        # Absolute, because a Ray worker runs in another folder.
        url = os.path.abspath(self.url) if _is_local(self.url) else self.url.rstrip("/")
        object.__setattr__(self, "url", url)

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a name; FileNotFoundError if it is absent."""
        fs, path = self._locate(name)
        with _explained(self.url):
            return bytes(fs.cat_file(path))

    def size(self, name: str) -> int | None:
        """Return the size in bytes, or None if there is no such file."""
        fs, path = self._locate(name)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), _explained(self.url):
            info = fs.info(path)
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
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), _explained(self.url):
            below = {entry.rstrip("/")[len(path) :].lstrip("/") for entry in fs.ls(path, detail=False)}
            return [f"{folder}/{name}".lstrip("/") for name in sorted(below) if name and name[0] != "."]
        return []

    def open_input(self, name: str) -> BufferedIOBase:
        """Open a name for reads at random offsets; FileNotFoundError if it is absent."""
        self._locate(name)
        with _explained(self.url):
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
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), _explained(self.url):
            return float(os.stat(path).st_mtime if _is_local(self.url) else fs.modified(path).timestamp())
        return None

    def delete(self, name: str) -> None:
        """Remove a name that is neither published nor wanted any more; nothing to do if it is absent."""
        fs, path = self._locate(name)
        with contextlib.suppress(FileNotFoundError), _explained(self.url):
            fs.rm_file(path)

    def put_bytes(self, name: str, data: bytes) -> None:
        """Write or overwrite atomically: for caches and hints, never for what is published once."""
        fs, path = self._locate(name)
        with _explained(self.url):
            if not _is_local(self.url):
                fs.pipe_file(path, data)
                return
            with _temporary(path, data) as temporary:
                os.replace(temporary, path)
            _sync(os.path.dirname(path))

    def put_file(self, local_path: str | Path, name: str) -> None:
        """Move a finished file from `local_scratch` to a name, atomically, overwriting.

        For caches and files named by their content. A rename on a local root, an upload on S3.
        """
        fs, path = self._locate(name)
        with _explained(self.url):
            if not _is_local(self.url):
                fs.put_file(str(local_path), path)
                os.unlink(local_path)
                return
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


def _is_local(url: str) -> bool:
    return "://" not in url


def _s3(tries: int = 5) -> Any:
    keys = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_ACCESS_KEY_ID")
    return _s3_of(os.getpid(), tuple(os.environ.get(key) for key in keys), tries)


@functools.cache
def _s3_of(pid: int, environment: tuple[str | None, ...], tries: int) -> Any:
    """Make one session per process, because none survives a fork, and per environment."""
    config = {"retries": {"mode": "standard", "total_max_attempts": tries}}
    # With a listing cache a poller that once missed a name never sees it.
    fs = S3FileSystem(use_listings_cache=False, skip_instance_cache=True, config_kwargs=config)
    fs.retries = tries
    return fs


def _refusal(error: BaseException, where: str) -> UserError | None:
    """Return the mistake behind an error if no later try could do better, else None."""
    if isinstance(error, NoCredentialsError):
        return UserError(f"{where}: expected S3 credentials in the environment; found none; {_ACCESS}")
    if isinstance(error, ParamValidationError):
        return UserError(f"{where}: {' '.join(str(error).split())}")
    answer = getattr(error.__cause__, "response", None)
    if answer is None:  # not from S3
        return UserError(f"{where}: {error}; grant this user access") if isinstance(error, PermissionError) else None
    code, status = str(answer["Error"].get("Code")), int(answer["ResponseMetadata"]["HTTPStatusCode"])
    later = status in _LATER or status == 500 or status > 501 or code == "RequestTimeout"  # 501: not implemented
    if later and code != "NoSuchBucket":
        return None
    hint = _HINTS.get(code, _ACCESS if status == 403 else "check the root and AWS_ENDPOINT_URL")
    return UserError(f"{where}: the store answered {status} {code}, {error}; {hint}")


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
