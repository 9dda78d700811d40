"""Publication, crash by crash and answer by answer, on a local folder and on S3 behind a proxy that fails."""

import contextlib
import hashlib
import itertools
import os
import pickle
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import access, storage
from curate.errors import CommitConflictError, CommitUnknownError, UserError
from curate.formats.source import list_shards
from curate.pool.inventory import take_inventory
from curate.recipe import PoolSection
from curate.storage import Store, open_input
from tests.faults import FaultProxy

# Child processes import storage alone: the package itself imports torch, which takes seconds.
PRELUDE = f"""
import sys, types
package = sys.modules["curate"] = types.ModuleType("curate")
package.__path__ = [{os.path.dirname(storage.__file__)!r}]
"""
NAME = "rounds/r000001/manifest.json"
Faulty = tuple[str, FaultProxy]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "DEADLINE_S", 1.0)
    monkeypatch.setattr(access, "PAUSES_S", (0.02, 0.1))


# --- plain use ---------------------------------------------------------------------------------------------------


def test_written_bytes_come_back(root: str) -> None:
    store = pickle.loads(pickle.dumps(Store(root + "/")))
    assert store.list("rounds") == []
    assert not store.exists(NAME)
    assert store.size(NAME) is None
    with pytest.raises(FileNotFoundError):
        store.read_bytes(NAME)
    with pytest.raises(FileNotFoundError):
        store.open_input(NAME).read()
    store.put_if_absent(NAME, b"one")
    store.put_bytes("cache/x", b"first")
    store.put_bytes("cache/x", b"")
    store.put_bytes("rounds/r000002/log %#?é", b"l")
    store.put_bytes(".hidden", b"h")
    assert store.read_bytes(NAME) == b"one"
    assert store.size(NAME) == 3
    assert store.read_bytes("cache/x") == b""
    assert store.size("cache/x") == 0
    assert not store.exists("rounds")
    assert store.list() == ["cache", "rounds"]
    assert store.list("rounds") == ["rounds/r000001", "rounds/r000002"]
    assert store.list("rounds/r000002") == ["rounds/r000002/log %#?é"]
    assert store.read_bytes("rounds/r000002/log %#?é") == b"l"
    assert store.list("rounds/r00000") == []
    local = store.local_path(NAME)
    assert local is None if root.startswith("s3") else local is not None and local.read_bytes() == b"one"
    with store.open_input(NAME) as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == hashlib.sha256(b"one").hexdigest()
        file.seek(1)
        assert file.read() == b"ne"


def test_file_moves_from_scratch_to_its_name(root: str, tmp_path: Path) -> None:
    store = Store(root)
    table = pa.table({"uid": [str(i) for i in range(1000)]})
    for _ in range(2):  # twice is the same as once
        with store.local_scratch() as folder:
            pq.write_table(table, f"{folder}/x.parquet")
            store.put_file(f"{folder}/x.parquet", "data/x.parquet")
            assert store.list() == ["data"]
            assert os.listdir(folder) == []
    assert not os.path.exists(folder)
    with store.open_input("data/x.parquet") as file:
        assert pq.ParquetFile(file).read().equals(table)
    with pytest.raises(FileNotFoundError):
        store.put_file(str(tmp_path / "absent"), "data/y")
    assert store.list("data") == ["data/x.parquet"]


def test_local_files_have_ordinary_permissions_and_leave_nothing_behind(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        Store(str(tmp_path)).put_if_absent("a/b", b"x")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o644
    assert os.listdir(tmp_path / "a") == ["b"]
    assert (tmp_path / "a/b").stat().st_nlink == 1


def test_relative_root_survives_another_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("x/../root").url == str(tmp_path / "root")


@pytest.mark.parametrize("url", ["", "s3://", "s3:///x", "gs://bucket/x", "file:///tmp/x", "http://host/x"])
def test_other_roots_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="expected a local folder or s3://bucket/prefix; found"):
        Store(url)


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "../a", "a/../b", "./a"])
def test_names_cannot_leave_the_root(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="relative to the root"):
        Store(str(tmp_path)).put_bytes(name, b"")


# --- one writer wins ---------------------------------------------------------------------------------------------


def test_same_bytes_twice_are_one_publication_and_other_bytes_conflict(root: str) -> None:
    store = Store(root)
    store.put_if_absent(NAME, b"one")
    store.put_if_absent(NAME, b"one")
    with pytest.raises(CommitConflictError) as error:
        store.put_if_absent(NAME, b"other")
    for part in (NAME, hashlib.sha256(b"other").hexdigest()[:12], hashlib.sha256(b"one").hexdigest()[:12]):
        assert part in str(error.value)
    store.put_if_absent("empty", b"")
    with pytest.raises(CommitConflictError):
        store.put_if_absent("empty", b"x")
    assert store.read_bytes(NAME) == b"one"


RACE = """
import os, sys, time
from curate.errors import CommitConflictError
from curate.storage import Store

root, rounds = sys.argv[1], 4
start = time.time() + 1.0
children = {}
for writer in range(16):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            wins = []
            for r in range(rounds):
                time.sleep(max(0, start + r * 0.3 - time.time()))
                try:
                    Store(root).put_if_absent(f"r{r}", bytes([writer]) * 50_000)
                    wins.append(r)
                except CommitConflictError:
                    pass
            os.write(1, f"{writer} {wins}\\n".encode())
            status = 0
        finally:
            os._exit(status)
    children[pid] = writer
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
"""


def _race(root: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE + RACE, root], capture_output=True, text=True, timeout=180, check=False
    )
    assert run.returncode == 0, run.stderr
    wins = {int(line.split(" ", 1)[0]): line for line in run.stdout.splitlines()}
    assert sorted(wins) == list(range(16))
    for r in range(4):
        winner = Store(root).read_bytes(f"r{r}")
        assert [w for w, line in wins.items() if str(r) in line.split("[")[1]] == [winner[0]]
        assert winner == winner[:1] * 50_000


def test_sixteen_processes_race_and_one_wins_locally(tmp_path: Path) -> None:
    _race(str(tmp_path))


def test_sixteen_processes_race_and_one_wins_on_s3(faulty_s3_root: Faulty) -> None:
    _race(faulty_s3_root[0])


def test_store_works_in_a_fork_of_a_process_that_used_it(s3_root: str) -> None:
    code = """
import os, sys
from curate.storage import Store
store = Store(sys.argv[1])
store.put_if_absent("parent", b"p")
pid = os.fork()
if pid == 0:
    try:
        store.put_if_absent("child", store.read_bytes("parent"))
    finally:
        os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert store.read_bytes("child") == b"p"
"""
    subprocess.run([sys.executable, "-c", PRELUDE + code, s3_root], check=True, timeout=180)


def test_poller_sees_a_name_after_it_missed_it(s3_root: str) -> None:
    poller, writer = Store(s3_root), Store(s3_root)
    writer.put_bytes("rounds/a", b"")
    assert poller.list("rounds") == ["rounds/a"]
    assert not poller.exists("rounds/b")
    boto = "import boto3, sys; b, _, k = sys.argv[1][5:].partition('/'); " + (
        "boto3.client('s3').put_object(Bucket=b, Key=k + '/rounds/b', Body=b'x')"
    )
    subprocess.run([sys.executable, "-c", boto, s3_root], check=True, timeout=180)
    assert poller.exists("rounds/b")
    assert poller.list("rounds") == ["rounds/a", "rounds/b"]
    assert poller.read_bytes("rounds/b") == b"x"


# --- answers that S3 can give ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["drop-ack", "drop", "503", "409"])
@pytest.mark.parametrize("times", [1, 3])
def test_write_that_failed_for_a_moment_succeeds(
    faulty_s3_root: Faulty, monkeypatch: pytest.MonkeyPatch, mode: str, times: int
) -> None:
    root, proxy = faulty_s3_root
    monkeypatch.setattr(access, "PAUSES_S", (0.02, 0.1))
    fault = proxy.fail(mode, key=NAME, times=times)
    Store(root).put_if_absent(NAME, b"ours")
    assert Store(root).read_bytes(NAME) == b"ours"
    assert fault.seen == times if mode != "drop-ack" else fault.seen <= 2  # the read settles a lost answer


@pytest.mark.parametrize("mode", ["drop-ack", "drop", "503", "409"])
@pytest.mark.usefixtures("short")
def test_write_that_failed_and_met_other_bytes_is_a_conflict(faulty_s3_root: Faulty, mode: str) -> None:
    root, proxy = faulty_s3_root
    Store(root).put_if_absent(NAME, b"theirs")
    proxy.fail(mode, key=NAME)
    with pytest.raises(CommitConflictError):
        Store(root).put_if_absent(NAME, b"ours")
    assert Store(root).read_bytes(NAME) == b"theirs"


@pytest.mark.parametrize("mode", ["503", "drop", "409"])
@pytest.mark.usefixtures("short")
def test_write_that_stays_unanswered_is_unknown_before_the_deadline(faulty_s3_root: Faulty, mode: str) -> None:
    root, proxy = faulty_s3_root
    fault = proxy.fail(mode, key=NAME, times=10**6)
    began = time.monotonic()
    with pytest.raises(CommitUnknownError, match="delete nothing"):
        Store(root).put_if_absent(NAME, b"ours")
    assert time.monotonic() - began < 30
    assert fault.seen > 2
    fault.times = 0
    Store(root).put_if_absent(NAME, b"ours")


@pytest.mark.usefixtures("short")
def test_lost_answer_that_cannot_be_read_back_is_unknown_not_refused(faulty_s3_root: Faulty) -> None:
    root, proxy = faulty_s3_root
    proxy.fail("drop-ack", key=NAME, times=2)  # twice, because aiohttp resends once by itself
    for method in ("PUT", "GET", "HEAD"):
        proxy.fail("403", method=method, key=NAME, times=10**6)
    with pytest.raises(CommitUnknownError):
        Store(root).put_if_absent(NAME, b"ours")
    proxy.faults.clear()
    assert Store(root).read_bytes(NAME) == b"ours"


def test_lost_answer_followed_by_a_refusal_is_settled_by_reading(faulty_s3_root: Faulty) -> None:
    root, proxy = faulty_s3_root
    proxy.fail("drop-ack", key=NAME)
    proxy.fail("403", key=NAME, times=10**6)
    Store(root).put_if_absent(NAME, b"ours")


def test_refusal_ends_at_once_with_the_way_out(faulty_s3_root: Faulty) -> None:
    root, proxy = faulty_s3_root
    fault = proxy.fail("403", key=NAME, times=10**6)
    with pytest.raises(UserError, match=r"403 AccessDenied.*AWS_ACCESS_KEY_ID"):
        Store(root).put_if_absent(NAME, b"ours")
    assert fault.seen == 1
    proxy.fail("403", method="GET", times=10**6)
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID"):
        Store(root).read_bytes(NAME)
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID"):
        Store(root).list("rounds")


def test_absent_bucket_is_the_users_mistake(s3_root: str) -> None:
    store = Store(s3_root.replace("s3://", "s3://not-"))
    for act in (lambda: store.put_if_absent("a", b"x"), lambda: store.read_bytes("a"), store.list, store.probe):
        with pytest.raises(UserError, match=r"NoSuchBucket.*create the bucket"):
            act()


def test_absent_credentials_are_the_users_mistake(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(UserError, match="credentials in the environment"):
        Store(s3_root).put_if_absent("a", b"x")


@pytest.mark.parametrize("mode", ["truncate", "503", "drop"])
def test_read_that_failed_for_a_moment_is_complete(faulty_s3_root: Faulty, mode: str) -> None:
    root, proxy = faulty_s3_root
    data = os.urandom(300_000)
    Store(root).put_bytes("x", data)
    fault = proxy.fail(mode, method="GET", key="root/x")
    assert Store(root).read_bytes("x") == data
    assert fault.seen == 1


# --- what a store must be able to do -----------------------------------------------------------------------------


def test_probe_accepts_a_good_store_and_leaves_nothing(root: str) -> None:
    Store(root).probe()
    assert Store(root).list() == []
    fs, path = storage.filesystem(root)
    assert not [name for name in fs.find(path) if ".probe" in name]


def test_probe_refuses_a_store_that_ignores_the_condition(faulty_s3_root: Faulty) -> None:
    root, proxy = faulty_s3_root
    proxy.fail("strip", times=10**6)
    with pytest.raises(UserError, match="If-None-Match"):
        Store(root).probe()


def test_probe_refuses_a_folder_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UserError, match="hard links"):
        Store(str(tmp_path)).probe()
    assert os.listdir(tmp_path) == []


# --- death at every step -----------------------------------------------------------------------------------------

CRASH = """
import os, sys
from curate.storage import Store

root, act, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
count = 0
def mortal(function):
    def call(*args, **kwargs):
        global count
        for last in (False, True):  # die before it, or after it
            count += 1
            if count == step:
                os._exit(9)
            result = result if last else function(*args, **kwargs)
        return result
    return call
for name in ("link", "fsync", "replace", "unlink", "mkdir"):
    setattr(os, name, mortal(getattr(os, name)))
data = b"x" * 100_000
if act == "put_file":
    with Store(root).local_scratch() as folder:
        with open(f"{folder}/x", "wb") as file:
            file.write(data)
        Store(root).put_file(f"{folder}/x", "a/x")
else:
    getattr(Store(root), act)("a/x", data)
print(count)
"""


@pytest.mark.parametrize("act", ["put_if_absent", "put_bytes", "put_file"])
def test_death_at_any_step_shows_nothing_half_and_a_rerun_succeeds(tmp_path: Path, act: str) -> None:
    data, outcomes = b"x" * 100_000, []
    # One interpreter forks for every step: importing it each time would take a minute.
    driver = f"""
import os, sys
import curate.storage
code = compile({CRASH!r}, "crash", "exec")
for step in range(1, 100):
    pid = os.fork()
    if pid == 0:
        sys.argv = ["crash", f"{{sys.argv[1]}}/{{step}}", sys.argv[2], str(step)]
        try:
            exec(code, {{"__name__": "crash"}})
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(step, status, flush=True)
    if status != 9:
        sys.exit(status)
sys.exit(3)
"""
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE + driver, str(tmp_path), act],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    steps = [int(line.split()[0]) for line in run.stdout.splitlines()]
    assert len(steps) >= 12
    for step in steps:
        store = Store(str(tmp_path / str(step)))
        assert store.list("a") in ([], ["a/x"])
        outcomes.append(store.exists("a/x"))
        if outcomes[-1]:
            assert store.read_bytes("a/x") == data
        if act == "put_file":
            with store.local_scratch() as folder:
                Path(folder, "x").write_bytes(data)
                store.put_file(f"{folder}/x", "a/x")
        else:
            getattr(store, act)("a/x", data)
        assert store.read_bytes("a/x") == data
        assert store.list() == ["a"]
    assert outcomes == sorted(outcomes)  # absent up to one step, complete from there on
    assert set(outcomes) == {False, True}


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("act", ["put_if_absent", "put_bytes", "put_file"])
def test_content_reaches_the_disk_before_its_name_does(
    tmp_path: Path, act: str, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    (root / "a" if made else root).mkdir(parents=True)
    order: list[str] = []

    def spy(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object) -> object:
            what = "name" if name != "fsync" else "folder" if os.path.isdir(f"/proc/self/fd/{args[0]}") else "content"
            order.append(what)
            return real(*args)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "link", "replace"):
        spy(name)
    if act == "put_file":
        (root / "scratch").write_bytes(b"x")
        Store(str(root)).put_file(root / "scratch", "a/x")
    else:
        getattr(Store(str(root)), act)("a/x", b"x")
    # A folder that was not there is a name, too: of the folder above it.
    assert order == [*([] if made else ["folder"]), "content", "name", "folder"]


@pytest.mark.parametrize("writers", [2, 5])
def test_one_of_several_writers_wins_that_are_held_up_until_all_are_ready(
    tmp_path: Path, writers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system where looking takes long: whoever looks first and then writes would see nobody before him."""
    ready, look, looks = threading.Barrier(writers), os.stat, itertools.count(1)

    @contextlib.contextmanager
    def prepared(target: str, data: bytes) -> Iterator[str]:
        with temporary(target, data) as path:
            ready.wait(10)
            yield path

    def slow(*arguments: Any, **named: Any) -> os.stat_result:
        try:
            return look(*arguments, **named)
        finally:
            time.sleep(0.1 * next(looks))  # one after the other, each with what he saw at first

    temporary = storage._temporary
    monkeypatch.setattr(storage, "_temporary", prepared)
    monkeypatch.setattr(os, "stat", slow)

    def publish(writer: int) -> bool:
        try:
            Store(str(tmp_path)).put_if_absent("x", b"%d" % writer)
        except CommitConflictError:
            return False
        return True

    with ThreadPoolExecutor(writers) as threads:
        won = list(threads.map(publish, range(writers)))
    assert won.count(True) == 1
    assert Store(str(tmp_path)).read_bytes("x") == b"%d" % won.index(True)


@pytest.mark.parametrize("act", ["put_if_absent", "put_bytes"])
def test_full_disk_is_told_and_leaves_nothing(tmp_path: Path, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").mkdir()
    store = Store(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            getattr(store, act)("a/x", b"x")
    assert os.listdir(tmp_path / "a") == []
    getattr(store, act)("a/x", b"x")


# --- listing a pool ----------------------------------------------------------------------------------------------

NAMES = ["a.parquet", "b c.parquet", "d%20#?é.parquet", "deep/er/e.parquet"]
OTHER = ["_tmp.parquet", ".x.parquet", "a.parquet.tmp", "README", "deep/_tmp/x.parquet", "deep/.t/y/z.parquet"]


@pytest.fixture
def pool(root: str) -> str:
    store = Store(root)
    for name in NAMES + OTHER:
        fs, path = storage.filesystem(f"{root}/{name}")
        if store.url.startswith("s3://"):
            fs.pipe_file(path, name.encode())
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).write_bytes(name.encode())
    return root


def test_folder_is_listed_whole_sorted_and_says_what_it_passes_over(pool: str) -> None:
    files, ignored = list_shards(pool)
    assert [file.path for file in files] == [f"{pool}/{name}" for name in sorted(NAMES)]
    assert [file.size for file in files] == [len(name.encode()) for name in sorted(NAMES)]
    passed = sorted({name.replace("/x.parquet", "").replace("/y/z.parquet", "") for name in OTHER})
    assert [path.partition("/root/")[2] for path in ignored] == passed
    for file in files:
        with open_input(file.path) as opened:
            assert f"{pool}/{opened.read().decode()}" == file.path
    assert list_shards(pool + "/") == (files, ignored)


def test_version_changes_with_the_content(pool: str) -> None:
    before, _ = list_shards(f"{pool}/a.parquet")
    assert before == list_shards(f"{pool}/a.parquet")[0] == list_shards(f"{pool}/a*")[0]
    assert before[0].version
    assert storage.file_info(f"{pool}/a.parquet") == before[0]
    with pytest.raises(FileNotFoundError):
        storage.file_info(f"{pool}/absent")
    time.sleep(0.01)
    Store(pool).put_bytes("a.parquet", b"A.parquet")
    assert list_shards(f"{pool}/a.parquet")[0] != before


def test_one_file_and_globs(pool: str) -> None:
    def names(pattern: str) -> list[str]:
        return [file.path.removeprefix(pool + "/") for file in list_shards(f"{pool}/{pattern}")[0]]

    assert names("a.parquet.tmp") == ["a.parquet.tmp"]  # named itself: taken
    assert names("d%20#?é.parquet") == ["d%20#?é.parquet"]  # exists, so that ? is no wildcard
    assert names("*.parquet") == sorted(NAMES[:3])
    assert names("[ab]*.parquet") == ["a.parquet", "b c.parquet"]
    assert names("**/*.parquet") == sorted(NAMES)
    assert names("d*/**") == ["deep/er/e.parquet"]
    assert any(path.endswith("a.parquet.tmp") for path in list_shards(f"{pool}/a*")[1])


@pytest.mark.parametrize(
    ("pattern", "found"), [("absent", "found nothing"), ("x*.parquet", "found"), ("deep/_tmp/y", "found nothing")]
)
def test_absent_pools_are_refused(pool: str, pattern: str, found: str) -> None:
    with pytest.raises(UserError, match=found) as error:
        list_shards(f"{pool}/{pattern}")
    assert pattern in str(error.value)


def test_folder_without_parquet_is_refused(root: str) -> None:
    Store(root).put_bytes("pool/README", b"")
    with pytest.raises(UserError, match=r"expected \*.parquet, .*; found 1 other or hidden names, such as .*README"):
        list_shards(f"{root}/pool")


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing"):
        list_shards(str(tmp_path))


def test_other_schemes_and_typing_errors(s3_root: str) -> None:
    with pytest.raises(UserError, match="expected a local path or a URL"):
        list_shards("nonsense://x/y")
    with pytest.raises(UserError, match="Invalid bucket name"):
        list_shards("s3://test-*/x")
    with pytest.raises(UserError):
        list_shards(s3_root.replace("s3://", "s3://not-"))
    fs, _ = storage.filesystem("memory://pool")
    fs.pipe_file("/pool/a.parquet", b"abc")
    assert [(file.path, file.size) for file in list_shards("memory://pool")[0]] == [("memory:///pool/a.parquet", 3)]
    with open_input("memory:///pool/a.parquet") as file:
        assert file.read() == b"abc"


def test_folder_markers_of_s3_consoles_are_no_files(s3_root: str) -> None:
    fs, path = storage.filesystem(s3_root)
    fs.call_s3("put_object", Bucket=path.split("/")[0], Key="root/pool/", Body=b"")
    Store(s3_root).put_bytes("pool/a.parquet", b"a")
    assert list_shards(f"{s3_root}/pool") == (list_shards(f"{s3_root}/pool/a.parquet")[0], [])
    assert Store(s3_root).list("pool") == ["pool/a.parquet"]


def test_symlinks_list_every_real_file_once(tmp_path: Path) -> None:
    (tmp_path / "pool/deep").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for name in ("pool/deep/a.parquet", "blobs/0123"):
        (tmp_path / name).write_bytes(b"x")
    for link, target in {
        "0.parquet": "deep/a.parquet",
        "deep/loop": "..",
        "again": "deep",
        "self": "self",
        "hub.parquet": "../blobs/0123",
    }.items():
        (tmp_path / "pool" / link).symlink_to(target)
    files, ignored = list_shards(str(tmp_path / "pool"))
    assert [file.path for file in files] == [str(tmp_path / name) for name in ("blobs/0123", "pool/deep/a.parquet")]
    assert ignored == [str(tmp_path / "pool" / name) for name in ("0.parquet", "again", "deep/loop", "self")]
    assert list_shards(str(tmp_path / "pool/0.parquet"))[0] == files[1:]
    (tmp_path / "pool/lost.parquet").symlink_to("gone")
    with pytest.raises(UserError, match=r"lost.parquet: expected a file; found a link to nothing"):
        list_shards(str(tmp_path / "pool"))


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("00000.tar.gz", "unpack it"),
        ("0001.lance", "write its rows as Parquet"),
        ("shard.00000.mds", "write its samples as Parquet or tars"),
        ("red.JPG", "pictures alone are no pool: write a metadata.csv beside them"),
        ("urls.csv", "name the file itself, if its rows name pictures"),
        ("cache-1a2b.arrow", "name a single file"),
        ("notes.txt", "name a single file to take it as it is"),
    ],
)
def test_a_pool_in_another_format_is_told_the_way_from_there(tmp_path: Path, name: str, way_out: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"expected \*.parquet, .*; found 1 other or hidden name.*; {way_out}"):
        list_shards(str(tmp_path))


def test_a_tar_that_is_named_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"x" * 1024)
    with pytest.raises(UserError, match=r"00000.tar: expected a tar, found a broken one \(.*\); remove or replace it"):
        take_inventory(PoolSection(path=str(tmp_path / "00000.tar")))
