"""The root and the pool as files: list a pool, read, and the one primitive that publishes.

A root is a local folder or `s3://bucket/prefix`; a pool may be any URL that fsspec opens.
"""

import contextlib
import errno
import glob
import hashlib
import os
import random
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from fsspec.utils import glob_translate

from curate import access
from curate.access import (
    ERRORS,
    explained,
    filesystem,
    is_local,
    open_for_arrow,
    open_input,
    persist,
    refusal,
    s3_session,
)
from curate.errors import CommitConflictError, CommitUnknownError, UserError

COPIED_BYTES = 2**24
"""At a time."""


@dataclass(frozen=True)
class FileInfo:
    """One input file as it was when it was listed."""

    path: str  # what open_input takes: a local path without symlinks, or a URL
    size: int  # bytes
    version: str  # etag on S3, mtime in ns on a local disk, the best the server offers elsewhere


def file_info(path: str) -> FileInfo:
    """Look at one file as it is now; FileNotFoundError if it is gone."""
    if is_local(path):
        with explained(path):
            stat = os.stat(path)
            return FileInfo(os.path.realpath(path), stat.st_size, str(stat.st_mtime_ns))
    fs, name = filesystem(path)
    return persist(path, lambda: _remote_file(fs, fs.info(name)))


def list_files(
    url: str, *, taken: Callable[[str], bool], expected: str, way_out: Callable[[str], str | None]
) -> tuple[list[FileInfo], list[str]]:
    """List files: one, those of a folder (recursively) or of a glob; and the paths passed over.

    Passed over are names that begin with "." or "_", names that are not `taken`, and what symlinks lead to
    again: every real file is listed once, loops end. A file that is itself named is taken whatever its name.

    Args:
        url: of the file or folder, or a glob.
        taken: says of a path whether it is wanted.
        expected: what is wanted, for messages.
        way_out: says what to do with a file that is passed over, if anything can be.

    Raises:
        UserError: nothing there, nothing of it wanted, a link to nothing, no permission.
    """
    _refuse_empty_names(url)
    fs, path = filesystem(url)
    files, ignored = [], []
    try:
        is_file, pattern = persist(url, lambda: fs.info(path))["type"] == "file", re.compile("")
    except (FileNotFoundError, NotADirectoryError):
        if not glob.has_magic(path):
            # A relative path is of the working directory: which that is may be the mistake.
            here = "" if "://" in url or os.path.isabs(url) else f" in {os.getcwd()}"
            raise UserError(f"{url}: expected a file, folder or glob; found nothing{here}; correct it") from None
        is_file, pattern = False, re.compile(glob_translate(path))
        path = re.split(r"[*?[]", path, maxsplit=1)[0].rpartition("/")[0]  # the folder above the wildcards
    if is_file:
        return [file_info(url)], []
    # A listing is taken whole or anew: what came of one that failed half-way would be a smaller pool.
    walked = partial(_walk_local, path, {os.path.realpath(path)}) if is_local(url) else partial(_walk, fs, path)
    for name, file in persist(url, lambda: list(walked())):
        if file is None or (pattern.match(name) and not taken(name)):
            ignored.append(name)
        elif pattern.match(name):
            files.append(file)
    if missing := [f"{file.path}: expected a file; found a link to nothing" for file in files if file.size < 0]:
        raise UserError(*missing)
    if not files:
        found = f"{len(ignored)} other or hidden names, such as {ignored[0]}" if ignored else "nothing"
        hint = next(filter(None, map(way_out, ignored)), "name a single file to take it as it is")
        raise UserError(f"{url}: expected {expected}; found {found}; {hint}")
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
        if not self.url or not (is_local(self.url) or re.match("s3://[^/]", self.url)):
            raise UserError(f"root: expected a local folder or s3://bucket/prefix; found {self.url!r}")
        _refuse_empty_names(self.url)
        if is_local(self.url) and os.path.isfile(self.url):
            raise UserError(f"root: expected a folder; found a file, {self.url}; choose another root")
        # Absolute, because a Ray worker runs in another folder.
        url = os.path.abspath(self.url) if is_local(self.url) else self.url.rstrip("/")
        object.__setattr__(self, "url", url)

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a name; FileNotFoundError if it is absent."""
        fs, path = self._locate(name)
        return bytes(persist(self.url, lambda: fs.cat_file(path)))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` on, before `stop` or the end; FileNotFoundError if the name is absent."""
        fs, path = self._locate(name)

        def act() -> bytes:
            data = bytes(fs.cat_file(path, start=start, end=stop)) if stop > start else b""
            if len(data) < stop - start and int(fs.info(path)["size"]) >= stop:
                raise OSError(f"{len(data)} of {stop - start} bytes came")  # an answer that was cut off
            return data

        return persist(self.url, act)

    def size(self, name: str) -> int | None:
        """Return the size in bytes, or None if there is no such file."""
        fs, path = self._locate(name)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            info = persist(self.url, lambda: fs.info(path))
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
            found = persist(self.url, lambda: fs.ls(path, detail=False))
            below = {entry.rstrip("/")[len(path) :].lstrip("/") for entry in found}
            return [f"{folder}/{name}".lstrip("/") for name in sorted(below) if name and name[0] != "."]
        return []

    def open_input(self, name: str) -> BufferedIOBase:
        """Open a name for reads at random offsets; FileNotFoundError if it is absent."""
        self._locate(name)
        return open_input(f"{self.url}/{name}")

    def open_for_arrow(self, name: str) -> Any:
        """The same for Arrow, which reads a file of a local root itself."""
        self._locate(name)
        return open_for_arrow(f"{self.url}/{name}")

    def local_path(self, name: str) -> Path | None:
        """Return where a name lies on a local root, for libraries that want a path; None on S3."""
        path = self._locate(name)[1]
        return Path(path) if is_local(self.url) else None

    def fetch(self, name: str, path: Path) -> None:
        """Copy a name into a local file; FileNotFoundError if it is absent."""
        with self.open_input(name) as theirs, path.open("wb") as ours:
            shutil.copyfileobj(theirs, ours, COPIED_BYTES)

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
        with explained(self.url):
            found = _create_local(path, data) if is_local(self.url) else _create_s3(path, data)
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
            if is_local(self.url):
                with explained(self.url):
                    return float(os.stat(path).st_mtime)
            return float(persist(self.url, lambda: fs.modified(path)).timestamp())
        return None

    def delete(self, name: str) -> None:
        """Remove a name that is neither published nor wanted any more; nothing to do if it is absent."""
        fs, path = self._locate(name)
        with contextlib.suppress(FileNotFoundError):
            persist(self.url, lambda: fs.rm_file(path))

    def put_bytes(self, name: str, data: bytes) -> None:
        """Write or overwrite atomically: for caches and hints, never for what is published once."""
        fs, path = self._locate(name)
        if not is_local(self.url):
            persist(self.url, lambda: fs.pipe_file(path, data))
            return
        with explained(self.url):
            with _temporary(path, data) as temporary:
                os.replace(temporary, path)
            _sync(os.path.dirname(path))

    def put_file(self, local_path: str | Path, name: str) -> None:
        """Move a finished file from `local_scratch` to a name, atomically, overwriting.

        For caches and files named by their content. A rename on a local root, an upload on S3.
        """
        fs, path = self._locate(name)
        if not is_local(self.url):
            persist(self.url, lambda: fs.put_file(str(local_path), path))
            os.unlink(local_path)
            return
        with explained(self.url):
            _make_folder(os.path.dirname(path))
            _sync(local_path)
            os.replace(local_path, path)
            _sync(os.path.dirname(path))

    @contextlib.contextmanager
    def local_scratch(self) -> Iterator[Path]:
        """Give a temporary local folder for `put_file`: below a local root, else in TMPDIR."""
        local = is_local(self.url)
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
            with contextlib.suppress(*ERRORS, ValueError):  # no permission to delete is no reason to refuse
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
    fs, pause_s, deadline, first = s3_session(tries=1), access.PAUSES_S[0], time.monotonic() + access.DEADLINE_S, True
    while True:
        try:
            fs.pipe_file(path, data, mode="create")
            return data
        except (*ERRORS, ValueError) as error:
            failure: Exception = error
        try:
            return bytes(fs.cat_file(path))
        except (*ERRORS, ValueError):
            if first and refusal(failure, path):
                raise failure from failure.__cause__
        first = False  # an earlier try may have been stored, so that a refusal now settles nothing
        if time.monotonic() + pause_s > deadline:
            raise CommitUnknownError(
                f"s3://{path}: no usable answer for {access.DEADLINE_S:g} s, at last {failure!r}; the write may "
                "or may not stand; delete nothing, run the same command again"
            ) from failure
        time.sleep(pause_s * random.uniform(0.5, 1))
        pause_s = min(2 * pause_s, access.PAUSES_S[1])


def _refuse_empty_names(url: str) -> None:
    if url.startswith("s3://") and "//" in url.removeprefix("s3://").rstrip("/"):
        raise UserError(f"{url}: expected no empty folder name; found // after the bucket; write one slash")


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
