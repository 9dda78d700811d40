"""The command line: one verb per thing that one launches.

Exit status: 0 done, 1 failed, 2 the user's mistake, 3 somebody else committed this round.
"""

import contextlib
import io
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from curate.errors import CurateError, UserError
from curate.jobs.root_verbs import JsonOption, export, gc, report, search, show
from curate.jobs.surroundings import a_folder, expand, in_a_folder, of_the_disk, printable
from curate.jobs.tables import dedup_tables, print_tables, round_tables
from curate.messages import counted
from curate.pipelines import progress

if TYPE_CHECKING:
    from curate.recipe import Recipe

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

RecipeArgument = Annotated[Path, typer.Argument(help="TOML file", metavar="RECIPE")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="section.field=value, overrides the recipe; may be repeated")
]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version  # noqa: PLC0415

        print(f"curate {version('curate-clip')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
def init(
    pool: Annotated[str, typer.Argument(help="folder, glob, file or URL of shards", metavar="POOL")],
    to: Annotated[Path, typer.Option(help="the recipe's file", metavar="FILE")] = Path("recipe.toml"),
    image: Annotated[str | None, typer.Option(help="image column; found by convention if not given")] = None,
    caption: Annotated[str | None, typer.Option(help="caption column; likewise")] = None,
) -> None:
    """Write a commented recipe for a pool, from what lies there."""
    from curate.jobs.init import write_recipe  # noqa: PLC0415

    for line in write_recipe(expand(pool), in_a_folder("--to", to), image=image, caption=caption):
        print(printable(line))


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    measure: Annotated[
        bool, typer.Option(help="embed a few batches here, for seconds, and say what a round costs")
    ] = True,
) -> None:
    """Say what a round would do and what is wrong, without doing it: every mistake in one pass, and what it costs."""
    loaded = _load(recipe, overrides)
    begun = time.perf_counter()
    from curate.jobs.check import check_recipe  # noqa: PLC0415

    imports_s = time.perf_counter() - begun  # a worker of a round has the same to import
    for line in check_recipe(loaded, base=recipe.parent, measure=measure, imports_s=imports_s):
        print(printable(line))


@app.command("round")
def round_(
    recipe: RecipeArgument,
    number: Annotated[
        int | None,
        typer.Option("--round", help="its number; the first that is not committed if not given", min=0),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Run a round, or finish one that was interrupted.

    A round is done once it is committed, even if the command was killed before it could say so; without --round the
    same command then begins the next one. With --round N it never does: a round N that is committed is shown. Where
    something starts the command again by itself, give it --round N, or let curate rounds do it.
    """
    loaded = _load(recipe, overrides)
    from curate.jobs.round_log import try_to_log  # noqa: PLC0415
    from curate.pipelines.round import run_round  # noqa: PLC0415
    from curate.rounds.explain import describe_round  # noqa: PLC0415
    from curate.rounds.manifest import last_round, manifest_name, round_folder  # noqa: PLC0415
    from curate.rounds.plan import plan_name  # noqa: PLC0415
    from curate.storage import Store  # noqa: PLC0415

    store = Store(loaded.root)
    if number is None and (number := last_round(store) + 1) and not store.exists(plan_name(number)):
        # Whoever killed the command that committed it may think that it was not.
        _note(f"round {number - 1} is committed (--round {number - 1} shows it); this begins round {number}")
    there = number is not None and store.exists(manifest_name(number))
    manifest = run_round(loaded, base=recipe.parent, number=number, say=_note)
    if not there:
        try_to_log(store, loaded.train.logs, manifest.round, _note)
    print_tables(round_tables(describe_round(store, manifest.round)))
    _note(f"{store.url}/{round_folder(manifest.round)}: its files; look at them: curate report {store.url}")


@app.command()
def dedup(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    sheet: Annotated[
        Path | None, typer.Option(help="also draw groups as pictures, into this HTML file", metavar="FILE")
    ] = None,
    groups: Annotated[int, typer.Option(help="how many groups to draw, at random", min=1)] = 50,
    as_json: JsonOption = False,
) -> None:
    """Find the pool's near-duplicates as a round would, and say what leaves; the next round finds it done."""
    loaded = _load(recipe, overrides)
    sheet = sheet and in_a_folder("--sheet", sheet)
    from curate.pipelines.dedup import dedup_recipe  # noqa: PLC0415

    store, pool, found = dedup_recipe(loaded, base=recipe.parent, say=_note)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        print_tables(dedup_tables(found, pool))
    near, compared = sum(found.dropped.values()), found.statuses.get("ok", 0) - found.unsound
    if loaded.dedup is not None and near > loaded.dedup.max_dropped_share * compared:
        share = loaded.dedup.max_dropped_share
        _note(f"a round stops here: {near:,} of {compared:,} is more than dedup.max_dropped_share = {share} allows")
    if sheet is not None:
        from curate.jobs.dedup_sheet import write_sheet  # noqa: PLC0415

        drawn = write_sheet(store, pool, found, sheet, groups=groups, seed=loaded.seed)
        print(f"{sheet}: {counted(drawn, 'group')}", file=sys.stderr)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    save_to: Annotated[
        Path | None, typer.Option(help='also save the model here, for `model = "local-dir:FOLDER"`')
    ] = None,
) -> None:
    """Train the learner on committed rounds, or on uniform batches of the pool, and publish it.

    Goes on from the newest checkpoint in the root. On N GPUs:
    torchrun --nproc-per-node N -m curate.jobs.cli train RECIPE
    """
    loaded = _load(recipe, overrides)
    save_to = save_to and a_folder("--save-to", save_to)
    from curate.jobs.train import train as run  # noqa: PLC0415
    from curate.models.encoder import fetch_model  # noqa: PLC0415
    from curate.storage import Store  # noqa: PLC0415

    trained = run(loaded, base=recipe.parent, say=_say)
    if not trained.first:
        return
    if save_to is not None:
        fetch_model(Store(loaded.root), trained.learner.encoder, save_to)
    if losses := trained.losses:
        steps = counted(trained.steps, "step")
        print(f"learner {trained.learner.number}: {steps}, loss {losses[0]:.3f} → {losses[-1]:.3f}")
    else:
        way_out = "all train.steps are taken" if trained.finished else "it was trained on every committed round"
        print(f"learner {trained.learner.number}: nothing to do, {way_out}")


@app.command("open-clip")
def open_clip(
    root: Annotated[str, typer.Argument(help="root of a curation")],
    arguments: Annotated[list[str], typer.Argument(help="of open_clip_train", metavar="-- ARGUMENTS")],
    follow: Annotated[
        bool, typer.Option("--follow", help="wait for rounds to come; needs open_clip's --epochs")
    ] = False,
    augment: Annotated[bool, typer.Option("--augment", help="open_clip's augmentation, not the pixels scored")] = False,
    publish: Annotated[bool, typer.Option(help="publish a learner after each round")] = True,
) -> None:
    """Train with open_clip's own trainer: an epoch is a round, every batch a sub-batch, whole.

    On N GPUs: torchrun --nproc-per-node N -m curate.jobs.cli open-clip ROOT -- --model ViT-B-16 --siglip
    """
    from curate.jobs.open_clip_trainer import train as run  # noqa: PLC0415

    run(expand(root), arguments, follow=follow, augment=augment, publish=publish, say=_say)


@app.command()
def rounds(
    recipe: RecipeArgument,
    address: Annotated[
        str | None, typer.Option(help="run each round as a job of this cluster: Ray's dashboard", metavar="URL")
    ] = None,
    image: Annotated[str | None, typer.Option(help="container image for these jobs", metavar="URI")] = None,
    overrides: SetOption = None,
) -> None:
    """Schedule rounds: look at the root, run the next one when the policy says so, stop after [schedule] rounds."""
    loaded = _load(recipe, overrides)
    if image and not address:
        raise UserError("--image: rounds run here without --address; give both, or none")
    from curate.jobs import rounds as scheduler  # noqa: PLC0415
    from curate.storage import Store  # noqa: PLC0415

    run = (
        scheduler.as_jobs(recipe, overrides or [], address, image)
        if address
        else scheduler.in_own_ray(loaded, recipe.parent, _note)
    )
    scheduler.schedule_rounds(Store(loaded.root), loaded.schedule, run, _say)


class Travel(StrEnum):
    """Which way embeddings go."""

    export = "export"
    import_ = "import"


@app.command()
def embeddings(
    way: Annotated[Travel, typer.Argument(help="export: out of a root; import: into that of a recipe")],
    what: Annotated[str, typer.Argument(help="root of a curation, or TOML file", metavar="ROOT|RECIPE")],
    folder: Annotated[str, typer.Argument(help="of the embeddings: a folder or s3://bucket/prefix")],
    overrides: SetOption = None,
) -> None:
    """Take a reference's embeddings to another root of the same pool; or clip-retrieval's or DataComp's into a root."""
    from curate.jobs.travel import export_all, import_all  # noqa: PLC0415

    if way is Travel.export:
        for line in export_all(expand(what), expand(folder)):
            print(printable(line))
        return
    recipe = Path(expand(what))
    for line in import_all(_load(recipe, overrides), recipe.parent, expand(folder)):
        print(printable(line))


for _verb in (show, search, report, export):
    app.command()(_verb)


@app.command()
def reshard(
    shard: Annotated[str, typer.Argument(help="Parquet file with too large row groups; with --shuffle a pool")],
    to: Annotated[str, typer.Option(help="folder for the new shards; with --shuffle also s3://bucket/prefix")],
    rows: Annotated[int, typer.Option(help="rows per new shard", min=1)] = 10_000,
    row_group_bytes: Annotated[int, typer.Option(help="uncompressed bytes per row group", min=1)] = 2**26,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="all rows of a pool, in a random order")] = False,
    seed: Annotated[int | None, typer.Option(help="with --shuffle: decides the order; 0 if not given", min=0)] = None,
    address: Annotated[
        str | None, typer.Option(help="with --shuffle: Ray cluster: auto, ray://host:port, or local if not given")
    ] = None,
) -> None:
    """Cut a Parquet file into shards with small row groups, row by row the same; or shuffle a whole pool."""
    for option, given in (("--seed", seed), ("--address", address)):
        if given is not None and not shuffle:
            raise UserError(f"{option} {given}: expected with --shuffle, found without it; add it, or leave this out")
    if shuffle:
        from curate.pipelines.reshard import shuffle_pool  # noqa: PLC0415
        from curate.recipe import PoolSection  # noqa: PLC0415

        shuffle_pool(
            PoolSection(path=expand(shard)),
            expand(to),
            rows_per_shard=rows,
            row_group_bytes=row_group_bytes,
            seed=seed or 0,
            address=address or "local",
            say=_say,
        )
        return
    from curate.pool.reshard import reshard_file  # noqa: PLC0415

    for path in reshard_file(shard, a_folder("--to", Path(to)), rows_per_shard=rows, row_group_bytes=row_group_bytes):
        print(path)


app.command()(gc)


@app.command()
def submit(
    recipe: RecipeArgument,
    command: Annotated[
        list[str],
        typer.Argument(help="check, round, dedup, rounds or train, and its options", metavar="-- VERB [OPTIONS]"),
    ],
    address: Annotated[
        str, typer.Option(help="of Ray's dashboard", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", show_default=False)
    ],
    wait: Annotated[bool, typer.Option(help="show the log until the job has ended")] = True,
    working_dir: Annotated[
        Path | None, typer.Option(help="folder to upload, with the recipe in it; .gitignore is honoured")
    ] = None,
    image: Annotated[str | None, typer.Option(help="container image to run in", metavar="URI")] = None,
    requirements: Annotated[
        Path | None, typer.Option(help="requirements.txt to be installed by uv before the job runs", metavar="FILE")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the job; may be repeated")] = None,
    overrides: SetOption = None,
) -> None:
    """Run a verb as a job of a Ray cluster; the same work is not run twice at a time."""
    from curate.jobs.submit import submit as run  # noqa: PLC0415

    status = run(
        recipe,
        command,
        address=address,
        overrides=overrides or (),
        wait=wait,
        working_dir=working_dir,
        image=image,
        requirements=requirements,
        env=env or (),
    )
    raise typer.Exit(status)


def silence_open_clip() -> None:
    """Keep the root logger to errors: open_clip narrates there every model that it makes."""
    logging.getLogger().setLevel(logging.ERROR)


def main() -> None:
    """Run the command line; errors that we raise on purpose are lines, not tracebacks, and so is being stopped.

    So, too, is a disk that is full or may not be written to: it can happen on any line.
    """
    silence_open_clip()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale may lack what a caption has
            stream.reconfigure(errors="backslashreplace")
    with _stoppable() as stopped_by:
        try:
            try:
                app()
            finally:
                progress.stop()  # before any last words: threads that nobody waits for may still show something
        except CurateError as error:
            print(printable(str(error)), file=sys.stderr)
            sys.exit(error.exit_status)
        except Exception as error:
            if (line := of_the_disk(error)) is None:
                raise
            print(printable(line), file=sys.stderr)
            sys.exit(1)
        except SystemExit as ended:
            # As typer ends a command that let KeyboardInterrupt pass; one that caught it has said its own.
            if stopped_by and isinstance(getattr(ended.__context__, "__cause__", None), KeyboardInterrupt):
                name = signal.Signals(stopped_by[0]).name
                print(
                    f"stopped by {name}: what is done stays, and the same command goes on from there", file=sys.stderr
                )
                sys.exit(128 + stopped_by[0])
            raise


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Let SIGTERM end a command as Ctrl-C does; yields the signals that came."""
    came: list[int] = []

    def stop(number: int, _frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    # What a shell told us to ignore, as for a job in the background, stays ignored.
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, stop) for number, how in usual.items() if signal.getsignal(number) is how}
    try:
        yield came
    finally:
        for number, how in before.items():
            signal.signal(number, how)


def _say(line: str) -> None:
    print(printable(line), flush=True)


def _note(line: str) -> None:
    """Say something beside what the command answers."""
    print(printable(line), file=sys.stderr)


def _load(path: Path, overrides: list[str] | None) -> "Recipe":
    # Not at the top: `--help` answers at once, and a verb loads what it needs once its recipe is right.
    from curate.recipe_file import load_recipe  # noqa: PLC0415

    return load_recipe(path, overrides or ())


if __name__ == "__main__":
    from curate.jobs import start

    start.main()
