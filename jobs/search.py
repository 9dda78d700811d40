"""`curate search`: the nearest pairs of the pool, as rows and, if wanted, as pictures."""

from pathlib import Path
from typing import Any

from curate.errors import InputChangedError, UserError
from curate.jobs.page import Figure, Gallery, picture, read_pairs, write_page
from curate.messages import counted
from curate.pipelines import progress
from curate.rounds.search import TOWERS, open_pool
from curate.storage import Store


def search(
    store: Store, *, words: str | None, image: Path | None, uid: str | None, among: str, k: int, sheet: Path | None
) -> list[dict[str, Any]]:
    """The nearest pairs, the nearest first; also written as a sheet of pictures if there is a path for it.

    Args:
        store: the root.
        words: what is looked for; or
        image: a picture's file; or
        uid: a pair of the pool, whose own picture or caption is looked for.
        among: `pictures` or `captions`: whose embeddings it is compared with.
        k: how many.
        sheet: an HTML file.

    Raises:
        UserError: not one of the three; or one that cannot be looked for.
    """
    if sum(asked is not None for asked in (words, image, uid)) != 1:
        raise UserError('search: expected one of "words", --image FILE and --uid U, found none or several; give one')
    searched = open_pool(store)
    tower = TOWERS[among]
    if words is not None:
        what, query = words, searched.embed_words(words)
    elif image is not None:
        try:
            data = image.read_bytes()
        except OSError as error:
            raise UserError(
                f"--image {image}: expected a picture, found none ({error.strerror}); name a file"
            ) from error
        what, query = str(image), searched.embed_picture(data, f"--image {image}")
    else:
        assert uid is not None
        what, query = f"uid {uid}", searched.embedding_of(uid, tower)

    near = searched.nearest(
        query,
        tower=tower,
        k=k,
        progress=lambda shards, total: progress.over(shards, total, title="search", unit="shard"),
    )
    try:
        pairs = read_pairs(searched.pool.shards, [(one.shard, one.row) for one in near])
    except (InputChangedError, FileNotFoundError) as error:
        raise UserError(
            f"search: expected the pool of round {searched.round}, found that shards were changed or removed since; "
            "run the next round, which takes the pool as it is now"
        ) from error
    names = [searched.pool.shards[one.shard].name for one in near]
    if sheet is not None:
        figures = [
            Figure(
                uid=one.uid,
                caption=pairs[one.shard, one.row][1],
                image=picture(pairs[one.shard, one.row][0]),
                where=f"{name}, row {one.row}",
                facts={"cosine": round(one.cosine, 4)},
            )
            for one, name in zip(near, names, strict=True)
        ]
        facts = f"by the reference's embeddings of {among}, of {counted(searched.pool.rows, 'row')}"
        found = [Gallery(title="", figures=figures)]
        write_page(sheet, "sheet.html.j2", title=f"Nearest to {what}", facts=facts, galleries=found)
    return [
        {
            "cosine": round(one.cosine, 4),
            "uid": one.uid,
            "shard": name,
            "row": one.row,
            "caption": pairs[one.shard, one.row][1],
        }
        for one, name in zip(near, names, strict=True)
    ]
