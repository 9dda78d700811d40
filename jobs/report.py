"""`curate report`: what a round chose and what it left, as pictures and plots in one HTML file."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from curate.embed.files import DAMAGED_SHARD, embedding_name, read_embeddings
from curate.errors import InputChangedError, StoreError, UserError
from curate.jobs.page import Figure, Gallery, Pair, Place, linked, picture, read_pairs, write_page
from curate.jobs.plots import curves, histograms, matrices
from curate.jobs.tables import round_facts
from curate.messages import counted, one_line
from curate.pipelines import progress
from curate.pool.shards import Shard, caption_bytes, read_rows
from curate.rounds.attempts import read_attempts
from curate.rounds.committed import open_rounds
from curate.rounds.explain import describe_round, read_committed, summarize_rounds
from curate.rounds.look import Group, Look, Repeat, Unusable, look_at
from curate.storage import Store

SHOWN = 18
"""Figures of a gallery."""
SHOWN_GROUPS, SHOWN_REPEATS = 12, 5
SHOWN_SOURCES = 12
READ_CAPTIONS = 4_000
"""Of candidates: shares are known to one per cent."""
NEWEST_ROUNDS = 200
"""Of which curves are drawn."""
LOSSES = {"learner_loss": "learner's loss", "reference_loss": "reference's loss"}
URL_COLUMNS = ("url", "URL", "image_url")

UNREADABLE = (InputChangedError, StoreError, UserError, FileNotFoundError)
"""What a shard raises that cannot be read any more: the others are shown."""
NOTHING: Pair = (None, "")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Counted:
    """How often something is met among chosen pairs and among candidates."""

    name: str
    chosen: float
    candidates: float


def write_report(store: Store, number: int, path: Path) -> None:
    """Write the report of a round.

    Args:
        store: the root.
        number: of the round.
        path: of the HTML file.

    Raises:
        UserError: there is no such round, or something that it left is gone.
        DamagedError: or is not what was written.
    """
    described = describe_round(store, number)
    manifest, _ = read_committed(store, number)
    look, shown = None, {"pairs": None}
    if not described["expired"]:
        try:
            look = look_at(open_rounds(store, [manifest])[0], progress=_bar)
            shown = _Shown(look).sections()
        except FileNotFoundError as error:
            raise UserError(f"{one_line(error)}: expected what round {number} left; restore the file") from error
    write_page(
        path,
        "report.html.j2",
        title=f"Round {number} of {store.url}",
        facts=round_facts(described),
        look=look,
        steps=described["steps"],
        pool_rows=max(1, described["pool_rows"]),
        trends=_trends(store),
        attempts=read_attempts(store, number),
        **shown,
    )


def _bar(shards: Iterable[Any], total: int) -> Iterable[Any]:
    return progress.over(shards, total, title="report", unit="shard")


class _Shown:
    """What is picked from a look, and read once for all galleries."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._table = _with_learnability(look.candidates)
        self._key = "learnability" if self._table["learnability"].null_count == 0 else "score"

    def sections(self) -> dict[str, Any]:
        """Galleries and plots, as the template names them."""
        look, table = self._look, self._table
        chosen = table["chosen"].to_numpy()
        picks = self._picks(chosen)
        unusable = _by_reason(look)
        groups = look.groups[:SHOWN_GROUPS]
        places = [self._place(i) for rows in picks.values() for i in rows.tolist()]
        places += [(row.shard, row.row) for rows in unusable.values() for row in rows if row.reason != DAMAGED_SHARD]
        places += [place for group in groups for place in _members(group)]
        pairs, gone = _read(look.shards, places)
        facts = _embedded(look, places)
        seen: set[str] = set()
        found = {
            name: linked(
                [Gallery(title=TITLES[name][0], text=TITLES[name][1], figures=self._figures(rows, pairs))], seen
            )[0]
            for name, rows in picks.items()
        }
        return {
            "gone": gone,
            "pairs": found,
            "unusable": linked([self._unusable(*item, pairs, facts) for item in unusable.items()], seen),
            "groups": linked([self._group(group, pairs, facts) for group in groups], seen),
            "plots": self._histograms(chosen),
            "matrices": _matrices(look),
            "kinds": self._kinds(chosen),
        }

    def _picks(self, chosen: npt.NDArray[np.bool_]) -> dict[str, Ints]:
        """Rows of the table, by gallery."""
        table = self._table
        value, fixed = table[self._key].to_numpy(), table["reference_loss"].to_numpy()
        taken, left = np.flatnonzero(chosen), np.flatnonzero(~chosen)
        found = {
            "most": taken[np.argsort(-value[taken])],
            "least": taken[np.argsort(value[taken])],
        }
        if table["independent"].null_count == 0:
            other = table["independent"].to_numpy(zero_copy_only=False).astype(bool)
            own = table["learnability"].fill_null(0).to_numpy() if self._key == "learnability" else -fixed
            joint, alone = np.flatnonzero(chosen & ~other), np.flatnonzero(~chosen & other)
            # Those that differ most: by themselves they are worth least of what was taken, most of what was left.
            found |= {"joint": joint[np.argsort(own[joint])], "alone": alone[np.argsort(-own[alone])]}
        found["doubted"] = left[np.argsort(-fixed[left])]
        return {name: rows[:SHOWN] for name, rows in found.items()}

    def _place(self, i: int) -> Place:
        return self._table["shard"][i].as_py(), self._table["row"][i].as_py()

    def _figures(self, rows: Ints, pairs: dict[Place, Pair]) -> list[Figure]:
        figures = []
        for row in self._table.take(pa.array(rows)).to_pylist():
            if (place := (row["shard"], row["row"])) not in pairs:
                continue
            image, caption = pairs[place]
            facts = {name.replace("_", " "): row[name] for name in ("learnability", *LOSSES) if row[name] is not None}
            if row["chosen"]:
                facts |= {"chunk": row["chunk"]}
            figures.append(
                Figure(
                    uid=row["uid"] or "",
                    caption=caption,
                    image=picture(image),
                    where=f"{self._look.shards[place[0]].name}, row {place[1]}, sub-batch {row['sub_batch']}",
                    facts={name: round(value, 4) for name, value in facts.items()},
                )
            )
        return figures

    def _unusable(
        self, reason: str, rows: Sequence[Unusable], pairs: dict[Place, Pair], facts: dict[Place, tuple[str, bool]]
    ) -> Gallery:
        figures = []
        for row in rows:
            image, caption = pairs.get((row.shard, row.row), NOTHING)
            decoded = (row.shard, row.row) in facts and facts[row.shard, row.row][1]
            figures.append(
                Figure(
                    uid=row.uid,
                    caption=caption,
                    image=picture(image) if decoded else None,  # what did not decode may be what kills a decoder
                    title=row.error or "",
                    where=f"{self._look.shards[row.shard].name}, row {row.row}",
                )
            )
        return Gallery(title=reason, figures=figures)

    def _group(self, group: Group, pairs: dict[Place, Pair], facts: dict[Place, tuple[str, bool]]) -> Gallery:
        """The row that stays, then those that leave."""

        def figure(place: Place, repeat: Repeat | None) -> Figure:
            image, caption = pairs.get(place, NOTHING)
            inside = place[0] < len(self._look.round.pool.shards)
            return Figure(
                uid=facts[place][0] if place in facts else "",
                caption=caption,
                image=picture(image),
                title=repeat.reason if repeat else "stays" if inside else "of an evaluation set",
                where=f"{self._look.shards[place[0]].name}, row {place[1]}",
                facts={"similarity": round(repeat.similarity, 4)} if repeat else {},
                near="" if repeat is None else self._named(repeat.near, facts),
                kind="leaves" if repeat else "stays" if inside else "",
            )

        shown = group.repeats[:SHOWN_REPEATS]
        more = len(group.repeats) - len(shown)
        return Gallery(
            title=f"at least {counted(1 + len(group.repeats), 'row')}" + (f", {more} more not shown" if more else ""),
            figures=[figure((group.shard, group.row), None), *(figure((one.shard, one.row), one) for one in shown)],
        )

    def _named(self, place: Place, facts: dict[Place, tuple[str, bool]]) -> str:
        return (place in facts and facts[place][0]) or f"{self._look.shards[place[0]].name}, row {place[1]}"

    def _histograms(self, chosen: npt.NDArray[np.bool_]) -> list[Markup]:
        table = self._table
        plots = []
        for name, label in ({"learnability": "learnability"} | LOSSES).items():
            if table[name].null_count == 0:
                values = table[name].to_numpy()
                plots.append(histograms({"chosen": values[chosen], "candidates": values}, label=label))
        return [plot for plot in plots if plot is not None]

    def _kinds(self, chosen: npt.NDArray[np.bool_]) -> dict[str, Any]:
        """What pairs are like, chosen ones beside candidates: sizes, and of a sample captions, scripts and sources."""
        table, pool = self._table, self._look.round.pool
        pixels = np.sqrt(table["width"].to_numpy().astype(float) * table["height"].to_numpy())
        plots = [
            histograms(
                {"chosen": pixels[chosen], "candidates": pixels}, label="picture, √(width × height)", logarithmic=True
            )
        ]
        some = np.sort(np.random.default_rng(0).permutation(len(table))[:READ_CAPTIONS])
        url = next((name for name in URL_COLUMNS if name in pool.schema.names), None)
        captions, sources = _captions(self._look, table.take(pa.array(some)), url)
        taken = {self._place(i) for i in some.tolist() if chosen[i]}
        lengths = {place: float(len(caption)) for place, caption in captions.items()}
        among = {"chosen": [lengths[place] for place in lengths if place in taken], "candidates": [*lengths.values()]}
        plots.append(histograms({name: np.array(some) for name, some in among.items()}, label="caption, characters"))
        return {
            "plots": [plot for plot in plots if plot is not None],
            "scripts": _counts({place: _script(caption) for place, caption in captions.items()}, taken),
            "sources": _counts(sources, taken),
            "source": "host" if url else "shard",
        }


TITLES = {
    "most": ("The best of the chosen", "By learnability where the learner was looked at, else by score."),
    "least": ("The worst of the chosen", "Taken all the same: because of its neighbours in the batch, or by the draw."),
    "joint": (
        "Taken for the batch's sake",
        "One by one these would have stayed behind: joint selection took them for what they add to their batch.",
    ),
    "alone": ("Left for the batch's sake", "One by one these would have been taken."),
    "doubted": (
        "Left: what the reference believes least",
        "Candidates with the highest loss by the reference. Captions that belong to other pictures are found here.",
    ),
}


def _with_learnability(table: pa.Table) -> pa.Table:
    return table.append_column("learnability", pc.subtract(table["learner_loss"], table["reference_loss"]))


def _by_reason(look: Look) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in look.unusable:
        if len(some := found.setdefault(row.reason, [])) < SHOWN:
            some.append(row)
    return dict(sorted(found.items()))


def _members(group: Group) -> list[Place]:
    shown = group.repeats[:SHOWN_REPEATS]
    return [(group.shard, group.row), *((one.shard, one.row) for one in shown), *(one.near for one in shown)]


def _read(shards: Sequence[Shard], places: Sequence[Place]) -> tuple[dict[Place, Pair], list[str]]:
    """Pictures and captions, and a line for each shard that gives none: it was changed, removed, or is damaged."""
    found: dict[Place, Pair] = {}
    gone = []
    for shard in sorted({shard for shard, _ in places}):
        try:
            found |= read_pairs(shards, [place for place in places if place[0] == shard])
        except UNREADABLE as error:
            gone.append(f"No pictures of {shards[shard].name}: {one_line(error)}")
    return found, gone


def _embedded(look: Look, places: Sequence[Place]) -> dict[Place, tuple[str, bool]]:
    """Uid of each place, and whether its picture was decoded."""
    found = {}
    for shard in sorted({shard for shard, _ in places}):
        rows = sorted({row for there, row in places if there == shard})
        name = embedding_name(look.round.reference.sha, look.shards[shard])
        table = read_embeddings(look.round.store, name, ["uid", "width"]).take(pa.array(rows))
        for row, fact in zip(rows, table.to_pylist(), strict=True):
            found[shard, row] = (fact["uid"] or "", fact["width"] is not None)
    return found


def _captions(look: Look, table: pa.Table, url: str | None) -> tuple[dict[Place, str], dict[Place, str]]:
    """Captions and sources of some candidates, of those shards that can still be read."""
    captions: dict[Place, str] = {}
    sources: dict[Place, str] = {}
    for shard in table["shard"].unique().to_pylist():
        rows = sorted(table.filter(pc.field("shard") == shard)["row"].to_pylist())
        columns = look.shards[shard].columns
        try:
            found = read_rows(look.shards[shard], rows, [columns.caption, *([url] if url else [])])
        except UNREADABLE:  # said where its pictures are missing
            continue
        texts = caption_bytes(found[columns.caption].combine_chunks()).to_pylist()
        hosts = found[url].to_pylist() if url and url in found.column_names else [None] * len(rows)
        for row, text, host in zip(rows, texts, hosts, strict=True):
            captions[shard, row] = (text or b"").decode(errors="replace")
            sources[shard, row] = _host(host) if url else look.shards[shard].name
    return captions, sources


def _host(url: Any) -> str:
    """Of a URL as the web has them.

    >>> _host("https://example.org/a.jpg"), _host("http://[abc"), _host(None)
    ('example.org', 'unknown', 'unknown')
    """
    try:
        return urlsplit(str(url)).hostname or "unknown"
    except ValueError:
        return "unknown"


def _script(caption: str) -> str:
    """In which script most of a caption's letters are, by their Unicode names.

    >>> _script("a red tractor"), _script("красный трактор"), _script("37")
    ('latin', 'cyrillic', 'none')
    """
    letters = (unicodedata.name(letter, "unknown").split()[0].lower() for letter in caption if letter.isalpha())
    return next((name for name, _ in Counter(letters).most_common(1)), "none")


def _counts(names: Mapping[Place, str], chosen: set[Place]) -> list[Counted]:
    """Shares of the most frequent names."""
    everywhere = Counter(names.values())
    taken = Counter(name for place, name in names.items() if place in chosen)
    total = max(1, taken.total())
    return [
        Counted(name=name, chosen=taken[name] / total, candidates=count / len(names))
        for name, count in everywhere.most_common(SHOWN_SOURCES)
    ]


def _matrices(look: Look) -> Markup | None:
    """Pair losses of a sub-batch beside those of candidates at random."""
    before, after = look.before, look.after
    if before is None or after is None:
        return None
    found = {"reference's loss": (before.reference, after.reference)}
    if before.learner is not None and after.learner is not None:
        found = {"learner's loss": (before.learner, after.learner)} | found
        found["learnability"] = (before.learner - before.reference, after.learner - after.reference)
    return matrices(found)


def _trends(store: Store) -> list[Markup]:
    """How the rounds went, and what the trainer measured."""
    rounds = summarize_rounds(store)[-NEWEST_ROUNDS:]

    def of(name: str) -> list[tuple[float, float | None]]:
        return [(one["round"], one[name]) for one in rounds]

    learnability = {
        "chosen": of("learnability"),
        "uniform": of("uniform_learnability"),
        "when trained on": of("realised_learnability"),
    }
    wanted = [
        curves(learnability, title="learnability per example"),
        curves({"": of("lead")}, title="questions that only the reference answers"),
        curves({"": of("rank_correlation")}, title="rank correlation with the learner before"),
        curves({"": of("staleness_batches")}, title="committed batches not yet trained on"),
        curves({"": of("chosen_again")}, title="chosen before, share"),
        curves({"": of("unique_examples")}, title="unique examples so far"),
        curves(_measured(store), title="recall at 1 on held-out pairs", across="step"),
    ]
    return [plot for plot in wanted if plot is not None]


def _measured(store: Store) -> dict[str, list[tuple[float, float | None]]]:
    """What a trainer that logs into the root measured as it went."""
    try:
        lines = store.read_bytes("trainer/log.jsonl").decode().splitlines()
    except FileNotFoundError:
        return {}
    found: dict[str, list[tuple[float, float | None]]] = {"caption for a picture": [], "picture for a caption": []}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            break  # torn by a power cut
        for name, key in zip(found, ("image_to_text_r1", "text_to_image_r1"), strict=True):
            if key in record:
                found[name].append((record["step"], record[key]))
    return found
