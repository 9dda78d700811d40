"""What verbs show: tables and lines, without what a terminal would obey."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from curate.messages import counted
from jobs.surroundings import printable

if TYPE_CHECKING:
    from curate.dedup.files import Dedup
    from curate.pool.shards import Pool

Shown = Sequence[Table | str]
LOG_COLUMNS = 140
SHOWN_GROUPS = 8


def print_tables(shown: Sequence[Table | str]) -> None:
    """Print tables and lines, as wide as the terminal."""
    # A log has no width of its own; 80 columns would break every number in two.
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS, highlight=False, markup=False)
    for item in shown:
        console.print(printable(item) if isinstance(item, str) else item)


def round_tables(found: dict[str, Any]) -> list[Table | str]:
    """What `curate show ROOT round N` says."""
    steps = []
    for step in found["steps"]:
        steps.append({"step": step["step"], "rows in": step["rows_in"], "kept": step["kept"], "dropped": "", "why": ""})
        steps += [{"dropped": rows, "why": reason} for reason, rows in step["dropped"].items() if rows]
    return ["\n".join(round_facts(found)), table_of("every row of the pool, step by step", steps)]


def round_facts(found: dict[str, Any]) -> list[str]:
    """What there is to say of a round, a line each."""
    learner, reference = found["lineage"]["learner"], found["lineage"]["reference"]
    facts = [
        f"round {found['round']}: {counted(found['sub_batches'], 'sub-batch', 'sub-batches')} of "
        f"{found['sub_batch_size']:,}, {sum(file['size'] for file in found['files']) / 2**20:.1f} MiB in "
        f"{counted(len(found['files']), 'file')}",
        f"reference: {reference['source']} ({reference['model']})",
        f"learner: {learner['number']} ({learner['model']})" if learner else "learner: not looked at",
        f"chosen by: {found['chosen_by']}",
    ]
    if where := found["quality"].get("standing"):
        facts.append(
            f"of the questions that {counted(where['pairs'], 'pair')} of the pool make, the reference answers "
            f"{where['reference']:.1%} and the learner {where['learner']:.1%}, of the reference's answers it has "
            f"{where['shared']:.1%}; auto makes of that {where['decided']}"
        )
    if found["learnability"] is not None:
        facts.append(
            f"learnability per example: {found['learnability']:.3f} chosen, {found['uniform_learnability']:.3f} uniform"
        )
    quality = found["quality"]
    if (staleness := quality["staleness_batches"]) is not None:
        batches = counted(staleness, "committed batch", "committed batches")
        facts.append(f"staleness: {batches} that the learner had not been trained on")
    if correlation := quality["rank_correlation"]:
        facts.append(
            f"rank correlation of learnability with learner {correlation['learner']}: {correlation['value']} on "
            f"{counted(correlation['pairs'], 'pair')}"
        )
    facts += [
        f"round {entry['round']} in training: learnability {entry['realised']} over "
        f"{counted(entry['batches'], 'batch', 'batches')}, "
        f"{'unknown' if entry['chosen'] is None else entry['chosen']} when chosen"
        for entry in quality["trained"]
    ]
    facts.append(
        f"chosen again: {quality['chosen_again']:.1%} of this round; "
        f"{counted(quality['unique_examples'], 'unique example')} so far"
    )
    return facts + [f"skipped {line}" for line in found["skipped_shards"]]


def dedup_tables(found: "Dedup", pool: "Pool") -> list[Table | str]:
    """What `curate dedup` says."""
    compared = found.statuses.get("ok", 0) - found.unsound
    earlier = sum(generation < len(found.chain) - 1 for generation in found.generations)
    facts = [
        f"{found.folder}: {compared:,} of {pool.rows:,} rows compared; cells: {found.cells:,}, the "
        f"largest of {counted(found.largest_cell, 'row')}",
        f"{counted(found.pairs, 'pair')}, {counted(found.groups, 'group')}",
        f"{counted(found.beyond, 'row')} on so many cells' borders that a near-duplicate may have been missed"
        if found.beyond
        else "no near-duplicate can have been missed",
        f"on top of {counted(earlier, 'earlier shard')}" if len(found.chain) > 1 else "decided from the beginning",
    ]
    if unusable := sum(found.evaluation_statuses.values()) - found.evaluation_statuses.get("ok", 0):
        facts.append(
            f"{unusable:,} of {sum(found.evaluation_statuses.values()):,} evaluation rows have no embedding and keep "
            "nothing out of the pool"
        )
    if found.unsound:
        facts.append(f"compared with nothing: {counted(found.unsound, 'row')} whose vectors are not finite, or zero")
    rows = [{"rows": count, "dropped": reason} for reason, count in found.dropped.items()]
    rows.append({"rows": compared - sum(found.dropped.values()), "dropped": "no, they stay"})
    largest = [
        {
            "rows": group.size,
            "lowest cosine": group.lowest_cosine,
            "to its representative": group.lowest_to_representative,
            "measured": group.measured,
            "representative": f"{pool.shards[group.shard].name}, row {group.row}",
        }
        for group in found.largest[:SHOWN_GROUPS]
    ]
    return ["\n".join(facts), table_of("rows", rows), *([table_of("the largest groups", largest)] if largest else [])]


def uid_tables(row: dict[str, Any]) -> list[Table]:
    """What `curate show ROOT uid U` says of one row."""
    place = {name: row[name] for name in ("uid", "shard", "row", "status", "error") if row[name] is not None}
    tables = [table_of("row", [place])]
    if row.get("rounds"):
        tables.append(table_of("rounds", row["rounds"]))
    return tables


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    """Rows as a table, a column for each name."""
    table = Table(title=title, title_justify="left")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    return table


def turned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as columns, headed by their first value; what none of them has is left out."""
    first, *names = rows[0]
    known = [name for name in names if any(row[name] is not None for row in rows)]
    return [{first: name.replace("_", " ")} | {str(row[first]): row[name] for row in rows} for name in known]


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4f}"
        case int():
            return f"{value:,}"
        case dict():
            return ", ".join(f"{name} {item}" for name, item in value.items())
        case _:
            return printable(str(value).replace("\n", r"\n"))
