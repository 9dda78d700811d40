"""`curate show`: rounds, one round, one pair's story, two rounds compared, what nothing needs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curate.errors import InputChangedError, UserError
from curate.jobs.page import read_pairs
from curate.jobs.tables import Shown, round_tables, rounds_table, story_of, table_of
from curate.messages import counted
from curate.rounds import explain
from curate.rounds.compare import compare_rounds
from curate.rounds.gc import GRACE_S, find_garbage
from curate.rounds.trace import explain_uid, find_uid
from curate.storage import Store

WHAT = "rounds, round N, uid U, diff A B or orphans"


def show(store: Store, what: Sequence[str]) -> tuple[Any, Shown]:
    """What there is to show, as plain values and for people.

    Raises:
        UserError: it is none of these, or there is no such thing.
    """
    match what:
        case ["rounds"]:
            rounds = explain.summarize_rounds(store)
            return rounds, [rounds_table(rounds)]
        case ["round", number] if number.isdecimal():
            described = explain.describe_round(store, int(number))
            return described, round_tables(described)
        case ["uid", uid]:
            rows = explain_uid(store, uid)
            return rows, [line for row in rows for line in story_of(row)]
        case ["diff", a, b] if a.isdecimal() and b.isdecimal():
            compared = compare_rounds(store, int(a), int(b))
            return compared, _compared(compared)
        case ["orphans"]:
            return _orphans(store)
    raise UserError(f"show {' '.join(what)}: expected {WHAT}")


def save_picture(store: Store, uid: str, path: Path) -> None:
    """Write the picture of a pair of the newest round's pool, as it lies there.

    Raises:
        UserError: no row has this uid, the pool changed since, or the row holds no picture.
    """
    shard, row, _ = find_uid(store, uid)
    try:
        image, _ = read_pairs([shard], [(0, row)])[0, row]
    except (InputChangedError, FileNotFoundError) as error:
        raise UserError(f"uid {uid}: its shard was changed or removed since the round; {error}") from error
    if not image:
        raise UserError(f"uid {uid}: expected a picture, found none in {shard.name}, row {row}")
    path.write_bytes(image)


def _compared(compared: dict[str, Any]) -> Shown:
    a, b = compared["rounds"]
    rows, both = compared["rows"], compared["in_both"]
    known = "unknown" if both is None else f"{both:,}, {both / max(1, rows[1]):.1%} of round {b}"
    fields = [
        # As JSON has them: rounded, two numbers that differ might look alike.
        {"what": name} | dict(zip((f"round {a}", f"round {b}"), map(json.dumps, values), strict=True))
        for name, values in compared["fields"].items()
    ]
    return [
        f"round {a}: {counted(rows[0], 'pair')}; round {b}: {counted(rows[1], 'pair')}; chosen by both: {known}",
        table_of("what differs", fields) if fields else "nothing else differs",
    ]


def _orphans(store: Store) -> tuple[Any, Shown]:
    """What a garbage collection would remove, with its period of grace: what is younger may be in use."""
    garbage = list(find_garbage(store))
    found = [{"kind": one.kind, "name": one.name, "bytes": one.size} for one in garbage]
    if not found:
        return found, [f"{store.url}: everything in it is needed, or younger than {GRACE_S / 3600:g} hours"]
    kinds: dict[str, dict[str, Any]] = {}
    for one in garbage:
        row = kinds.setdefault(one.kind, {"what": one.kind, "files": 0, "MiB": 0.0, "one of them": one.name})
        row["files"] += 1
        row["MiB"] += one.size / 2**20
    return found, [table_of("needed by nothing; curate gc removes them", list(kinds.values()))]
