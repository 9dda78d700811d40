"""A round is committed whole and once, by the appearance of one file that accounts for every row."""

import hashlib
import json
import re
import threading
from dataclasses import replace

import pytest

from curate.errors import CommitConflictError, RowsLostError, UserError
from curate.rounds.manifest import (
    CuratedFile,
    Manifest,
    commit,
    last_round,
    manifest_name,
    read_manifest,
    round_folder,
)
from curate.storage import Store
from curate.tally import Tally


def files(store: Store | None, number: int = 0, contents: tuple[bytes, ...] = (b"first", b"second one")) -> list:
    """Curated files of two sub-batches each, as far as a manifest is concerned."""
    made = []
    for i, data in enumerate(contents):
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"curated-{sha256}.parquet"
        if store:
            store.put_bytes(f"{round_folder(number)}/{name}", data)
        made.append(CuratedFile(name=name, sha256=sha256, size=len(data), rows=8, first_sub_batch=2 * i, sub_batches=2))
    return made


def manifest(store: Store | None, number: int = 0, parent: str | None = None) -> Manifest:
    return Manifest(
        round=number,
        parent=parent,
        first_batch=4 * number,
        sub_batch_size=4,
        sub_batches=4,
        columns={"image": "jpg", "caption": "ü", "uid": None},
        files=tuple(files(store, number)),
        pool_rows=50,
        tallies=(
            Tally(step="embed", rows_in=50, kept=40, dropped={"image_empty": 3, "caption_empty": 7}),
            Tally(step="window", rows_in=40, kept=20, dropped={"later_round": 20}),
            Tally(step="select", rows_in=20, kept=16, dropped={"not_selected": 4}),
        ),
        learnability=(0.1, None, 0.3, -1.5e-9),
        uniform_learnability=(None, 0.2, 0.3, 0.4),
        reference_loss=(0.1, 0.2, 0.3, 0.4),
        quality={"unique_examples": 16},
        lineage={"seed": 0, "reference": {"sha": "x"}, "shards": [1, 2]},
    )


# --- bytes -------------------------------------------------------------------------------------------------------


def test_a_manifest_comes_back(root: str):
    store = Store(root)
    made = manifest(store)
    digest = commit(store, made)
    found, sha256 = read_manifest(store, 0)
    assert found == made
    assert sha256 == digest == hashlib.sha256(store.read_bytes("rounds/r000000/manifest.json")).hexdigest()
    assert found.to_bytes() == made.to_bytes()


def test_equal_manifests_are_equal_bytes():
    made = manifest(None)
    assert made.to_bytes() == manifest(None).to_bytes()
    # Nor does it matter in which order a dictionary was filled.
    other = replace(
        made,
        lineage=dict(reversed(made.lineage.items())),
        columns=dict(reversed(made.columns.items())),
        tallies=tuple(replace(t, dropped=dict(reversed(t.dropped.items()))) for t in made.tallies),
    )
    assert other.to_bytes() == made.to_bytes()
    for change in ({"round": 1}, {"parent": "x"}, {"lineage": {}}, {"learnability": (0.1, None, 0.3, 0.0)}):
        assert replace(made, **change).to_bytes() != made.to_bytes()


def test_it_is_json_for_everybody():
    record = json.loads(manifest(None).to_bytes(), parse_constant=pytest.fail)
    assert record["format_version"] == 4
    assert record["tallies"][0] == {
        "step": "embed",
        "rows_in": 50,
        "kept": 40,
        "dropped": {"caption_empty": 7, "image_empty": 3},
    }
    assert record["files"][1]["first_sub_batch"] == 2


# --- rows are conserved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pool_rows": 51}, "inventory passed on 51 rows but step embed took in 50"),
        ({"pool_rows": 49}, "inventory passed on 49 rows but step embed took in 50"),
        ({"sub_batches": 3}, "16 rows came in but 12"),
        ({"sub_batch_size": 5}, "16 rows came in but 20"),
        ({"files": ()}, "0 rows came in but 16"),
    ],
)
def test_a_round_that_loses_rows_is_not_committed(store: Store, change: dict, expected: str):
    with pytest.raises(RowsLostError, match=expected):
        commit(store, replace(manifest(store), **change))
    assert read_manifest(store, 0) is None


def test_steps_must_pass_on_what_they_kept(store: Store):
    made = manifest(store)
    embed, window, select = made.tallies
    for tallies, expected in (
        ((embed, select), "step embed passed on 40 rows but step select took in 20"),
        ((window, select), "inventory passed on 50 rows but step window took in 40"),
        ((embed, window), "step window passed on 20 rows but step written took in 16"),
    ):
        with pytest.raises(RowsLostError, match=expected):
            commit(store, replace(made, tallies=tallies))
    assert store.size(manifest_name(0)) is None


def test_a_tally_that_does_not_close_cannot_even_be_made():
    with pytest.raises(RowsLostError, match="step x: 3 rows came in but 2 are accounted for"):
        Tally(step="x", rows_in=3, kept=1, dropped={"why": 1})


# --- the commit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, b"", b"secon", b"second one."])
def test_a_curated_file_that_is_missing_or_of_another_size_is_noticed(root: str, data: bytes | None):
    store = Store(root)
    made = manifest(None)
    names = [f"rounds/r000000/{file.name}" for file in made.files]
    store.put_bytes(names[0], b"first")
    if data is not None:
        store.put_bytes(names[1], data)
    with pytest.raises(UserError) as caught:
        commit(store, made)
    (line,) = caught.value.lines
    assert line.startswith(f"{names[1]}: expected 10 bytes, found {None if data is None else len(data)}")
    assert read_manifest(store, 0) is None
    store.put_bytes(names[1], b"second one")
    commit(store, made)


def test_committing_twice_changes_nothing(root: str):
    store = Store(root)
    first = commit(store, manifest(store))
    assert commit(store, manifest(store)) == first
    assert commit(Store(root), manifest(store)) == first


def test_whoever_commits_something_else_is_told(root: str):
    store = Store(root)
    digest = commit(store, manifest(store))
    other = replace(manifest(store), lineage={"seed": 1})
    with pytest.raises(CommitConflictError, match=r"rounds/r000000/manifest\.json"):
        commit(store, other)
    assert read_manifest(store, 0) == (manifest(store), digest)


def test_of_many_writers_one_wins(store: Store):
    manifests = [replace(manifest(store), lineage={"writer": i}) for i in range(8)]
    outcomes: dict[int, object] = {}
    barrier = threading.Barrier(8)

    def write(i: int) -> None:
        barrier.wait()
        try:
            outcomes[i] = commit(store, manifests[i])
        except CommitConflictError:
            outcomes[i] = None

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [i for i, digest in outcomes.items() if digest]
    assert read_manifest(store, 0) == (manifests[winner], outcomes[winner])


# --- which rounds there are --------------------------------------------------------------------------------------


def test_the_last_round_is_the_last_committed_one(root: str):
    store = Store(root)
    assert last_round(store) == -1
    assert read_manifest(store, 0) is None
    store.put_bytes("rounds/r000000/steps/selected-000000.parquet", b"x")
    assert last_round(store) == -1
    digest = commit(store, manifest(store))
    assert last_round(store) == 0
    manifest(store, 1)  # files, not committed
    store.put_bytes("rounds/r000001/plan.json", b"{}")
    store.put_bytes("rounds/notes.txt", b"")
    store.put_bytes("rounds/r00000x/manifest.json", b"")
    assert last_round(store) == 0
    assert read_manifest(store, 1) is None
    commit(store, manifest(store, 1, digest))
    assert last_round(store) == 1


def test_rounds_beyond_six_digits(store: Store):
    for number in (999_999, 1_000_000):
        commit(store, manifest(store, number))
    assert manifest_name(1_000_000) == "rounds/r1000000/manifest.json"
    assert last_round(store) == 1_000_000


# --- garbage -----------------------------------------------------------------------------------------------------


GARBAGE = [
    b"",
    b"\xff\xfe\0",
    b"null",
    b"[]",
    b'"text"',
    b"3",
    b"{}",
    b'{"format_version": 4}',
    manifest(None).to_bytes()[:-10],
    manifest(None).to_bytes().replace(b'"parent"', b'"patent"'),
    manifest(None).to_bytes().replace(b'"sha256"', b'"sha257"', 1),
    manifest(None).to_bytes().replace(b'"kept": 40', b'"kept": 41'),
    json.dumps(json.loads(manifest(None).to_bytes()) | {"files": 3}).encode(),
    json.dumps(json.loads(manifest(None).to_bytes()) | {"tallies": [3]}).encode(),
    json.dumps(json.loads(manifest(None).to_bytes()) | {"extra": 3}).encode(),
]


@pytest.mark.parametrize("data", GARBAGE)
def test_something_that_is_no_manifest(store: Store, data: bytes):
    store.put_bytes(manifest_name(0), data)
    with pytest.raises(UserError) as caught:
        read_manifest(store, 0)
    (line,) = caught.value.lines
    assert re.match(r"rounds/r000000/manifest\.json: expected .*, found (something else|damage)", line)
    assert "\n" not in line


def test_a_format_that_is_not_known_yet(store: Store):
    record = json.loads(manifest(None).to_bytes()) | {"format_version": 5}
    store.put_bytes(manifest_name(0), json.dumps(record).encode())
    with pytest.raises(
        UserError, match="format_version is 5, this version reads 4; read it with the one that wrote it"
    ):
        read_manifest(store, 0)
