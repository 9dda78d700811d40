"""What lies around a command, and may be at fault: the shell, the terminal, the disk."""

import errno
import os
import re
from pathlib import Path

from curate.errors import UserError

# Of a terminal, and those that turn text around: what a caption holds is shown, and not obeyed.
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# What a disk may be, and what helps. Not "no permission" in a store: that is told where it happens.
DISK = {
    errno.ENOENT: "it was there when what names it was written: put it back from a copy",
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there",
    errno.EROFS: "make it writable or choose another place",
    errno.EACCES: "let this user write there or choose another place",
    **dict.fromkeys(
        (errno.EEXIST, errno.EISDIR, errno.ENOTDIR), "move away what is there, or choose another place or name"
    ),
}


def printable(text: str) -> str:
    """Text with what would control a terminal written out."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def expand(path: str) -> str:
    """A path or URL of the command line, where a shell left `~` as it was.

    Raises:
        UserError: it names a variable, or a home folder that is not there.
    """
    from curate.recipe_types import expanded  # noqa: PLC0415

    try:
        return expanded(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def expand_path(path: Path) -> Path:
    """As `expand`."""
    return Path(expand(str(path)))


def of_the_disk(error: BaseException | None) -> str | None:
    """The line for what a disk did, here or in a task of Ray; None if the error is about something else."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = getattr(error, "cause", None) or error.__cause__
    full = os.strerror(errno.ENOSPC)
    found = [(cause.errno, cause.filename) for cause in chain if isinstance(cause, OSError) and cause.errno in DISK]
    # As fsspec tells it; what Ray wraps it in is one as well, and says more.
    gone = [str(cause) for cause in chain if isinstance(cause, FileNotFoundError) and cause.errno is None]
    found += [(errno.ENOENT, name) for name in gone[-1:]]
    # As other libraries tell it.
    found += [(errno.ENOSPC, None) for cause in chain if full in str(cause)]
    for number, name in found[:1]:
        where = name or f"root, TMPDIR = {os.environ.get('TMPDIR', '/tmp')}, or where the output goes"
        return f"{where}: {os.strerror(number)}; {DISK[number]}, and run the same command again"
    return None


def in_a_folder(option: str, path: Path) -> Path:
    """The path of a file that is to be written.

    Raises:
        UserError: there is no folder for it, or one in its place.
    """
    path = expand_path(path)
    if path.is_dir():
        raise UserError(f"{option} {path}: expected a file to write, found a folder; add the file's name")
    if not path.absolute().parent.is_dir():
        raise UserError(
            f"{option} {path}: expected it in a folder, found no {path.absolute().parent}; make it, or correct it"
        )
    return path


def a_folder(option: str, path: Path) -> Path:
    """The path of a folder that is to be made, unless it is there.

    Raises:
        UserError: a file is in its place, or in that of a folder above.
    """
    path = expand_path(path)
    for place in (path, *path.absolute().parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(f"{option} {path}: expected a folder, found the file {place}; choose another place")
            break
    return path
