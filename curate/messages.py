"""How messages quote what others say, and how mistakes are told together."""

import contextlib
from collections.abc import Iterator

from curate.errors import UserError


def one_line(error: BaseException | str, limit: int = 200) -> str:
    r"""What another library's error says, fit to stand in a line of ours: no line breaks, at most `limit` characters.

    >>> print(one_line(ValueError("page\x0f 1\nof 2")))
    page\x0f 1 of 2
    """
    text = " ".join(str(error).split())[:limit]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number of things, in the singular where it is one.

    >>> counted(1, "shard"), counted(12_000, "shard"), counted(2, "batch", "batches")
    ('1 shard', '12,000 shards', '2 batches')
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


@contextlib.contextmanager
def gathered(mistakes: list[str]) -> Iterator[None]:
    """Let a step that makes a user's mistake known end, add its lines to `mistakes`, and go on with the next step."""
    try:
        yield
    except UserError as error:
        mistakes += error.lines
