"""The verbs that look at what a root holds, or take it elsewhere: none of them changes what was committed."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from curate.errors import UserError
from curate.jobs.surroundings import expand, expand_path, in_a_folder
from curate.jobs.tables import print_tables, table_of
from curate.messages import counted
from curate.pipelines import progress

RootArgument = Annotated[str, typer.Argument(help="root of a curation")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]


def show(
    root: RootArgument,
    what: Annotated[
        list[str] | None, typer.Argument(help="rounds | round N | uid U | diff A B | orphans", metavar="[WHAT]")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="with uid U: also save its picture here", metavar="FILE")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what was chosen, what was dropped, and why."""
    from curate.jobs import show as showing  # noqa: PLC0415
    from curate.storage import Store  # noqa: PLC0415

    store, asked = Store(expand(root)), what or ["rounds"]
    if picture is not None and asked[0] != "uid":
        raise UserError(f"--picture {picture}: expected with uid U, found show {' '.join(asked)}; name a uid")
    found, shown = showing.show(store, asked)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_tables(shown)
    if picture is not None:
        showing.save_picture(store, asked[1], in_a_folder("--picture", picture))


def search(
    root: RootArgument,
    words: Annotated[str | None, typer.Argument(help="what to look for", metavar="[WORDS]")] = None,
    image: Annotated[Path | None, typer.Option(help="look for this picture", metavar="FILE")] = None,
    uid: Annotated[str | None, typer.Option(help="look for this pair of the pool", metavar="U")] = None,
    captions: Annotated[bool, typer.Option("--captions", help="compare with captions in place of pictures")] = False,
    k: Annotated[int, typer.Option("-k", help="how many pairs", min=1)] = 10,
    sheet: Annotated[
        Path | None, typer.Option(help="also show them as pictures, in this HTML file", metavar="FILE")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the pairs of the pool that are nearest to words, a picture or another pair, to the reference."""
    from curate.jobs.search import search as run  # noqa: PLC0415
    from curate.storage import Store  # noqa: PLC0415

    found = run(
        Store(expand(root)),
        words=words,
        image=image and expand_path(image),
        uid=uid,
        among="captions" if captions else "pictures",
        k=k,
        sheet=sheet and in_a_folder("--sheet", sheet),
    )
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print_tables([table_of("the nearest pairs", found)])


def report(
    root: RootArgument,
    number: Annotated[int | None, typer.Option("--round", help="the newest if not given", min=0)] = None,
    to: Annotated[Path | None, typer.Option("-o", "--to", help="report-rN.html if not given", metavar="FILE")] = None,
) -> None:
    """Show a round as pictures and plots in one HTML file: chosen, left, unusable, duplicates, and how rounds go."""
    from curate.jobs.report import write_report  # noqa: PLC0415
    from curate.rounds.committed import newest_round  # noqa: PLC0415
    from curate.storage import Store  # noqa: PLC0415

    store = Store(expand(root))
    number = newest_round(store).round if number is None else number
    path = in_a_folder("--to", to or Path(f"report-r{number:06d}.html"))
    write_report(store, number, path)
    print(path)


class Target(StrEnum):
    """What a curation can be exported to."""

    webdataset = "webdataset"
    uids = "uids"
    datasets = "datasets"


def export(
    root: RootArgument,
    to: Annotated[
        tuple[Target, str],
        typer.Option(
            help="webdataset FOLDER: a tar for each sub-batch; uids FILE.npy: for pool.keep; datasets FOLDER: for "
            "datasets.load_dataset; a folder may be s3://bucket/prefix",
            metavar="FORMAT TARGET",
        ),
    ],
    first: Annotated[int, typer.Option(help="round to begin with", min=0)] = 0,
    last: Annotated[int | None, typer.Option(help="round to end with; the newest if not given", min=0)] = None,
) -> None:
    """Write committed rounds in the format of another library; what is there already is not written again."""
    from curate.rounds.explain import committed_rounds  # noqa: PLC0415
    from curate.rounds.export import to_datasets, to_uids, to_webdataset  # noqa: PLC0415
    from curate.storage import Store  # noqa: PLC0415

    store = Store(expand(root))
    rounds = committed_rounds(store)
    newest = rounds[-1].round
    last = newest if last is None else last
    for option, number in (("--first", first), ("--last", last)):
        if number > newest:
            raise UserError(f"{option} {number}: expected a committed round, found rounds 0 to {newest}; correct it")
    if first > last:
        raise UserError(f"--first {first} --last {last}: expected the first before the last; exchange them")
    chosen = [manifest for manifest in rounds if first <= manifest.round <= last]
    form, target = to
    if form is Target.uids:
        found = to_uids(store, chosen, path := in_a_folder("--to uids", Path(target)))
        print(f"{path}: {counted(found, 'uid')}; as pool.keep they make a pool of the pairs that were chosen")
        return
    out = Store(expand(target))
    write = to_webdataset if form is Target.webdataset else to_datasets
    total = sum(manifest.sub_batches for manifest in chosen)
    written = sum(1 for _ in progress.over(write(store, chosen, out), total, title="export", unit="sub-batch"))
    way_in = {
        Target.webdataset: f"{out.url}/{{{chosen[0].first_batch:08d}..{chosen[-1].stop_batch - 1:08d}}}.tar",
        Target.datasets: f'datasets.load_dataset("{out.url}", split="train")',
    }[form]
    print(f"{counted(written, 'sub-batch', 'sub-batches')} in place: {way_in}")


def gc(
    root: RootArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and remove nothing")] = False,
    grace: Annotated[float, typer.Option(help="hours: what is younger stays", min=0)] = 24.0,
    keep_rounds: Annotated[
        int | None,
        typer.Option(
            help="remove the rows, not the manifest, of all rounds but the newest, if the newest learner has seen them",
            min=1,
        ),
    ] = None,
    keep_learners: Annotated[
        int | None, typer.Option(help="remove the models of all learners but the first and the newest", min=1)
    ] = None,
) -> None:
    """Remove what nobody needs any more: what killed steps left, and embeddings by learners of earlier rounds."""
    from curate.rounds.gc import find_garbage, remove_garbage  # noqa: PLC0415
    from curate.storage import Store  # noqa: PLC0415

    store = Store(expand(root))
    in_use: list[str] = []
    if keep_learners is not None:
        from curate.jobs.checkpoint import checkpoints, load_checkpoint  # noqa: PLC0415 imports torch

        in_use = [load_checkpoint(store, name)[0].start.model for name in checkpoints(store)]
    garbage = find_garbage(
        store, grace_s=3600 * grace, keep_rounds=keep_rounds, keep_learners=keep_learners, in_use=in_use
    )
    rows: dict[str, dict[str, Any]] = {}
    for found in garbage:
        row = rows.setdefault(found.kind, {"what": found.kind, "files": 0, "MiB": 0.0})
        row["files"] += 1
        row["MiB"] += found.size / 2**20
        if not dry_run:
            remove_garbage(store, found)
    if not rows:
        print(f"{store.url}: nothing that can go is older than {grace:g} hours")
        return
    print_tables([table_of("would be removed" if dry_run else "removed", list(rows.values()))])
