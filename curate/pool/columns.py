"""Which columns of the pool hold what, and which of its rows are wanted: what decides how a shard is read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of the pool hold what."""

    image: str
    caption: str
    uid: str | None
    paths: str | None = None
    """The column of paths or URLs that `image` is fetched by; None if it is in the file."""
    images: str | None = None
    """The folder that relative paths are of; the shard's own if None."""
    captions: str | None = None
    """The column of lists that `caption` is drawn from, or the path to it in structs or JSON: `json.caption`."""
    caption_seed: int = 0
    where: str | None = None
    """An expression of SQL that wanted rows fulfil."""
    where_columns: tuple[str, ...] = ()
    """Those that it may name."""
    keep: str | None = None
    """URL of the uids of wanted rows, see `curate.pool.wanted`."""
    keep_sha: str | None = None

    @property
    def captions_column(self) -> str | None:
        """The column of the file that `captions` begins with."""
        return self.captions and self.captions.partition(".")[0]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Columns":
        """The inverse of `to_json`, and of `asdict` on its way through Arrow or JSON."""
        return cls(**{**record, "where_columns": tuple(record.get("where_columns", ()))})

    def to_json(self) -> dict[str, Any]:
        """Plain values; those that are as they are by default are left out."""
        more = {"keep": self.keep, "where_columns": list(self.where_columns)}
        return self.identity() | {name: value for name, value in more.items() if value}

    def identity(self) -> dict[str, Any]:
        """What names the files that depend on it; what was not there when a root was made is not in it."""
        said = asdict(self)
        del said["keep"]  # its contents count, wherever they lie
        del said["where_columns"]  # which follow from `where`, but for columns that no row is asked about
        return {
            field.name: said[field.name]
            for field in fields(self)
            if field.name in said and (field.name in ("image", "caption", "uid") or said[field.name] != field.default)
        }
