"""The command line: one verb per thing that one launches.

Exit status: 0 done, 1 failed, 2 the user's mistake, 3 somebody else committed this round.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from curate.errors import CurateError, UserError
from curate.recipe import Recipe, load_recipe

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)

RecipeArgument = Annotated[Path, typer.Argument(help="TOML file", metavar="RECIPE")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="section.field=value, overrides the recipe; may be repeated")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
def check(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Say what a round would do and what is wrong, without doing it: every mistake in one pass."""
    from jobs.check import check_recipe  # noqa: PLC0415 a verb loads torch and Ray only if it needs them

    for line in check_recipe(load_recipe(recipe, overrides or ()), base=recipe.parent):
        print(line)


@app.command("round")
def round_(
    recipe: RecipeArgument,
    number: Annotated[int | None, typer.Option("--round", help="its number; the next one if not given", min=0)] = None,
    overrides: SetOption = None,
) -> None:
    """Run a round, or finish one that was interrupted."""
    loaded = load_recipe(recipe, overrides or ())
    from pipelines.round import run_round  # noqa: PLC0415

    manifest = run_round(loaded, base=recipe.parent, number=number)
    _print_round(loaded, manifest.round)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    save_to: Annotated[
        Path | None, typer.Option(help='also save the model here, for `model = "local-dir:FOLDER"`')
    ] = None,
) -> None:
    """Train the learner on committed rounds, or on uniform batches of the pool, and publish it."""
    loaded = load_recipe(recipe, overrides or ())
    from curate.encoder import fetch_model  # noqa: PLC0415
    from curate.storage import Store  # noqa: PLC0415
    from jobs.train import train as run  # noqa: PLC0415

    trained = run(loaded, base=recipe.parent)
    if save_to is not None:
        fetch_model(Store(loaded.root), trained.learner.encoder, save_to)
    losses = trained.losses
    print(f"learner {trained.learner.number}: {trained.steps} steps, loss {losses[0]:.3f} → {losses[-1]:.3f}")


@app.command()
def show(
    root: Annotated[str, typer.Argument(help="root of a curation")],
    what: Annotated[list[str] | None, typer.Argument(help="rounds | round N | uid U", metavar="[WHAT]")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what was chosen, what was dropped, and why."""
    from curate import explain  # noqa: PLC0415
    from curate.storage import Store  # noqa: PLC0415

    store = Store(root)
    match what or ["rounds"]:
        case ["rounds"]:
            found: Any = explain.summarize_rounds(store)
            shown = [_table("rounds", found)]
        case ["round", number] if number.isdecimal():
            found = explain.describe_round(store, int(number))
            shown = _round_tables(found)
        case ["uid", uid]:
            found = explain.explain_uid(store, uid)
            shown = [table for row in found for table in _uid_tables(row)]
        case other:
            raise UserError(f"show {' '.join(other)}: expected rounds, round N or uid U")
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for table in shown:
        Console().print(table)


@app.command()
def reshard(
    shard: Annotated[str, typer.Argument(help="Parquet file with row groups that are too large")],
    to: Annotated[Path, typer.Option(help="folder for the new shards")],
    rows: Annotated[int, typer.Option(help="rows per new shard", min=1)] = 10_000,
) -> None:
    """Cut a Parquet file into shards with small row groups, row by row the same."""
    from curate.reshard import reshard_file  # noqa: PLC0415

    for path in reshard_file(shard, to, rows_per_shard=rows):
        print(path)


def main() -> None:
    """Run the command line; errors that we raise on purpose are lines, not tracebacks."""
    # open_clip narrates every model it makes on the root logger.
    logging.getLogger().setLevel(logging.ERROR)
    try:
        app()
    except CurateError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)


def _print_round(recipe: Recipe, number: int) -> None:
    from curate import explain  # noqa: PLC0415
    from curate.storage import Store  # noqa: PLC0415

    for table in _round_tables(explain.describe_round(Store(recipe.root), number)):
        Console().print(table)


def _round_tables(found: dict[str, Any]) -> list[Table]:
    facts = {name: found[name] for name in ("sub_batches", "sub_batch_size", "learnability", "uniform_learnability")}
    learner = found["lineage"]["learner"]
    facts |= {
        "learner": f"{learner['number']} ({learner['model']})" if learner else "not looked at",
        "reference": f"{found['lineage']['reference']['source']} ({found['lineage']['reference']['model']})",
    }
    steps = []
    for step in found["steps"]:
        steps.append({"step": step["step"], "rows in": step["rows_in"], "kept": step["kept"], "dropped": "", "why": ""})
        steps += [{"dropped": rows, "why": reason} for reason, rows in step["dropped"].items() if rows]
    return [_table(f"round {found['round']}", [facts]), _table("every row of the pool, step by step", steps)]


def _uid_tables(row: dict[str, Any]) -> list[Table]:
    place = {name: row[name] for name in ("uid", "shard", "row", "status", "error")}
    tables = [_table("row", [place])]
    if row.get("rounds"):
        tables.append(_table("rounds", row["rounds"]))
    return tables


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    return table


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
            return str(value)


if __name__ == "__main__":
    main()
