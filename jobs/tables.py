"""What verbs show: tables and lines, without what a terminal would obey."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from curate.jobs.surroundings import printable
from curate.messages import counted

if TYPE_CHECKING:
    from curate.dedup.files import Dedup
    from curate.pool.shards import Pool

Shown = Sequence[Table | str]
LOG_COLUMNS = 140
NAME_COLUMNS, ROUND_COLUMNS = 16, 18
"""Of a table of rounds: its first column, and each of the others."""
SHOWN_GROUPS = 8
INDENT = " " * 12
OUTCOMES = {
    "earlier_round": "its turn in this epoch was in an earlier round",
    "later_round": "its turn in this epoch comes in a later round",
    "window_end": "left over where its window is cut into super-batches; waits for the next epoch",
    "not_in_pool": "the pool did not hold it",
    "round_expired": "what this round selected was removed",
    "embedding_nonfinite": "left out: a model made no finite vector of it",
}
"""What became of a pair, for people."""


def print_tables(shown: Sequence[Table | str]) -> None:
    """Print tables and lines, as wide as the terminal."""
    console = _console()
    for item in shown:
        console.print(printable(item) if isinstance(item, str) else item)


def _console() -> Console:
    # A log has no width of its own; 80 columns would break every number in two.
    return Console(width=None if sys.stdout.isatty() else LOG_COLUMNS, highlight=False, markup=False)


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


def rounds_table(rounds: list[dict[str, Any]]) -> Table:
    """What `curate show ROOT rounds` says: as many of the newest as there is room for."""
    width = _console().width
    # Upright: a round has more to say than a line holds. --json has all of them.
    newest = rounds[-max(1, (width - NAME_COLUMNS) // ROUND_COLUMNS) :]
    return table_of("the newest rounds" if len(newest) < len(rounds) else "rounds", _turned(newest))


def story_of(row: dict[str, Any]) -> list[str]:
    """What `curate show ROOT uid U` says of one row, a line or two for each round."""
    lines = [f"{row['uid']}: row {row['row']:,} of {row['shard']}"]
    if row["status"] != "ok":
        why = f" ({row['error']})" if row["error"] else ""
        return [*lines, f"cannot be used: {row['status']}{why}"]
    return lines + [line for one in row["rounds"] for line in _of_round(one)]


def _of_round(one: dict[str, Any]) -> list[str]:
    head = f"round {one['round']:<5} "
    match one["outcome"]:
        case "selected":
            line = f"chosen: sub-batch {one['sub_batch']}, place {one['position']}, chunk {one['chunk']}, score "
            return [f"{head}{line}{one['score']:.4f}", *_losses(one)]
        case "not_selected":
            found = [f"{head}not chosen: a candidate for sub-batch {one['sub_batch']}", *_losses(one)]
            own, least = one["independent_score"], one["least_chosen"]
            if own is not None and least is not None:
                missed = least - own
                how = f"{missed:.4f} below" if missed > 0 else f"{-missed:.4f} above"
                found.append(f"{INDENT}alone it scores {own:.4f}: {how} the least chosen, {least:.4f}")
                if missed <= 0:
                    found.append(f"{INDENT}what a pair adds to its batch counts as well, and rows are drawn")
            return found
        case reason if "duplicate_of" in one:
            of = one["duplicate_of"]
            line = f"{head}left out, {reason}: of row {of['row']:,} of {of['shard']}"
            if "similarity" in one:
                line += f", cosine {one['similarity']:.4f}"
            return [line]
        case reason:
            return [f"{head}{OUTCOMES.get(reason, reason)}"]


def _losses(one: dict[str, Any]) -> list[str]:
    told = [
        f"{model}'s loss {one[name]:.4f}"
        for model, name in (("learner", "learner_loss"), ("reference", "reference_loss"))
        if one.get(name) is not None
    ]
    return [INDENT + ", ".join(told)] if told else []


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    """Rows as a table, a column for each name."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, title_style="bold")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    return table


def _turned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
