"""The command line as one meets it: two streams and an exit status. (`test_recipe.py` runs it as a process, too.)"""

import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.jobs.cli import main
from curate.jobs.drawn_pool import draw_pair
from curate.pool.inventory import take_inventory
from curate.recipe_file import load_recipe
from curate.rounds.manifest import Manifest, read_manifest
from curate.rounds.plan import plan_name
from curate.storage import Store
from tests.helpers import commit_round

HOUSE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


Curate = Callable[..., Ended]


@pytest.fixture
def curate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Curate]:
    """`curate` with these arguments, in this process, which need not import torch each time."""

    def run(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["curate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    level = logging.getLogger().level
    yield run
    logging.getLogger().setLevel(level)


def mistakes(ended: Ended) -> list[str]:
    """The lines of a run that ended as the user's mistake and said nothing else."""
    assert ended.returncode == 2, ended
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert lines
    assert not [line for line in lines if not line.strip() or line.startswith(("Traceback", " "))]
    return lines


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small pool, and a recipe of it with a small model."""
    pool = tmp_path / "pool"
    pool.mkdir()
    images = [draw_pair(0, row, image_size=32)[0] for row in range(100)]
    pq.write_table(pa.table({"jpg": images, "caption": [f"caption {i}" for i in range(100)]}), pool / "a.parquet")
    (pool / "README.md").write_text("a pool")
    shutil.copy(HOUSE / "jobs/recipes/tiny-clip.json", tmp_path / "tiny.json")
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
        root = "{tmp_path}/root"
        pool.path = "{pool}"
        reference.model = "tiny.json"
        learner.model = "tiny.json"
        selection = {{sub_batch_size = 8, n_chunks = 4, filter_ratio = 0.75, criterion = "learnability"}}
        """
    )
    return path


# --- what needs no model -----------------------------------------------------------------------------------------


def test_help_is_quick_because_it_loads_nothing() -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "curate.jobs.cli", "--help"]
    ended = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, check=False)
    elapsed_s = time.monotonic() - began
    assert ended.returncode == 0
    for verb in ("check", "round", "train", "show", "reshard"):
        assert f"\n  {verb} " in ended.stdout
    assert elapsed_s < 30  # half a second on a machine of its own; what it loads is looked at below

    program = "import sys, curate.jobs.cli; print(*sorted({'torch', 'ray', 'open_clip', 'pyarrow'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=HOUSE, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


@pytest.mark.parametrize("verb", ["check", "round", "dedup", "train", "show", "reshard"])
def test_every_verb_explains_itself(curate: Curate, verb: str) -> None:
    ended = curate(verb, "--help")
    assert ended.returncode == 0
    assert "Usage:" in ended.stdout
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["shew", "root"], "No such command 'shew'"),
        (["check"], "Missing argument 'RECIPE'"),
        (["check", "r.toml", "--sat", "seed=1"], "No such option: --sat"),
        (["round", "r.toml", "--round", "-1"], "Invalid value for '--round'"),
        (["reshard", "a.parquet"], "Missing option '--to'"),
    ],
)
def test_misuse_is_status_2_and_says_what_was_expected(curate: Curate, arguments: list[str], expected: str) -> None:
    ended = curate(*arguments)
    assert ended.returncode == 2
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_without_a_verb_help_is_shown(curate: Curate) -> None:
    ended = curate()
    assert ended.returncode == 2
    assert "Commands:" in ended.stdout + ended.stderr


# --- show --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ([], "expected a committed round, found none; run: curate round RECIPE"),
        (["rounds", "--json"], "expected a committed round, found none; run: curate round RECIPE"),
        (["round", "3"], "round 3 is not committed"),
        (["uid", "abc"], "expected a committed round, found none"),
        (["round", "three"], "show round three: expected rounds, round N, uid U, diff A B or orphans"),
        (["everything"], "show everything: expected rounds, round N, uid U, diff A B or orphans"),
    ],
)
def test_show_where_there_is_nothing_to_show(curate: Curate, tmp_path: Path, what: list[str], expected: str) -> None:
    root = tmp_path / "root"
    (line,) = mistakes(curate("show", root, *what))
    assert expected in line
    assert not root.exists()  # looking creates nothing


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["dedup.threshold=1.0"], "dedup.threshold = 1.0: must be less than or equal to 0.9999"),
        (["dedup.groups=all"], "dedup.groups = 'all': must be 'components' or 'greedy'"),
        (["dedup.evaluation=[{path = []}]"], "must be a path or URL, or a list of at least one"),
        (["dedup.evaluation=[{image = 'jpg'}]"], "dedup.evaluation.0.path: must be given (as pool.path); add it below"),
    ],
)
def test_a_wrong_dedup_section_is_one_line(curate: Curate, recipe: Path, overrides: list[str], expected: str) -> None:
    (line,) = mistakes(curate("dedup", recipe, *(part for text in overrides for part in ("--set", text))))
    assert expected in line


def test_dedup_without_a_section_or_with_a_sheet_nowhere(curate: Curate, recipe: Path) -> None:
    (line,) = mistakes(curate("dedup", recipe))
    assert "dedup: must be given; add [dedup]" in line
    (line,) = mistakes(curate("dedup", recipe, "--set", "dedup.threshold=0.9", "--sheet", "no/where/sheet.html"))
    assert line.startswith("--sheet no/where/sheet.html: expected it in a folder")
    (line,) = mistakes(curate("dedup", recipe, "--set", "dedup.threshold=0.9", "--sheet", recipe.parent))
    assert line == f"--sheet {recipe.parent}: expected a file to write, found a folder; add the file's name"


@pytest.mark.parametrize("below", ["", "further/down"])
def test_a_file_where_a_folder_is_to_be_is_told_before_any_work(curate: Curate, recipe: Path, below: str) -> None:
    place = recipe / below
    said = f"{place}: expected a folder, found the file {recipe}; choose another place"
    assert mistakes(curate("train", recipe, "--save-to", place)) == [f"--save-to {said}"]
    assert mistakes(curate("reshard", recipe.parent / "a.parquet", "--to", place)) == [f"--to {said}"]


def test_what_is_about_shuffling_is_not_left_unheard(curate: Curate, recipe: Path) -> None:
    (line,) = mistakes(curate("reshard", recipe.parent / "a.parquet", "--to", recipe.parent, "--seed", "0"))
    assert line == "--seed 0: expected with --shuffle, found without it; add it, or leave this out"


def test_a_store_where_a_file_is_is_told(curate: Curate, recipe: Path) -> None:
    for verb in ("check", "round"):
        ended = curate(verb, recipe, "--set", f"root={recipe}/root")
        (line,) = ended.stderr.splitlines()
        assert ended.returncode == 1
        assert line.startswith(str(recipe))
        assert line.endswith(
            "; move away what is there, or choose another place or name, and run the same command again"
        )


# --- check -------------------------------------------------------------------------------------------------------


def test_check_says_what_a_round_would_do(curate: Curate, recipe: Path) -> None:
    ended = curate("check", recipe)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == "pool: 100 rows in 1 shard, jpg with caption"
    assert lines[1].startswith("pool: 1 file ignored, such as ")
    assert lines[1].endswith("README.md")
    assert lines[2] == "pool: 64 of 64 sampled rows can be used"
    assert lines[3] == "next round: 0"
    assert lines[4:6] == ["reference: tiny.json, fp32 on cpu", "learner: tiny.json, fp32 on cpu"]
    assert lines[6] == "selection: 3 super-batches of 32 at most, joint learnability, 24 rows in batches of 8"
    assert lines[7].startswith("windows: one, the whole pool")
    assert lines[8].startswith("cost: 100 forward passes of the reference at most, once, and 96 of the learner in each")
    assert lines[-1].startswith("short: ")
    assert ended.stderr == ""
    assert not (recipe.parent / "root").exists()  # nothing is written


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["resources.device=cuda"], "bf16 on cuda"),
        (["resources.device=cuda", "reference.precision=fp32"], "fp32 on cuda"),
        (["resources.address=ray://head:10001"], "bf16 if the cluster has GPUs, else fp32; a model that is in use"),
        (["resources.address=ray://head:10001", "reference.precision=bf16"], "bf16"),
    ],
)
def test_check_says_the_precision(curate: Curate, recipe: Path, sets: list[str], said: str) -> None:
    changes = [part for text in sets for part in ("--set", text)]
    lines = curate("check", recipe, "--no-measure", *changes).stdout.splitlines()
    assert lines[4].startswith(f"reference: tiny.json, {said}")


UNIGNORED = """
import signal  # a shell has its jobs in the background ignore Ctrl-C, and so do their children
signal.signal(signal.SIGINT, signal.default_int_handler)
from curate.jobs import cli
"""
WAITING = """
import time
cli._load = lambda *_: (print("begun", flush=True), time.sleep(600))
"""


def check_stopped(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    line = f"stopped by {number.name}: what is done stays, and the same command goes on from there"
    assert said.replace("\r", "\n").splitlines()[-1] == line
    assert process.returncode == 128 + number


def test_a_trainer_that_is_stopped_says_how_to_go_on(recipe: Path) -> None:
    command = [sys.executable, "-c", UNIGNORED + "cli.main()", "train", str(recipe), "--set", "train.follow=wait"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not (recipe.parent / "root/learners/l000000/learner.json").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        time.sleep(1)
        check_stopped(process, signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_either_signal_stops_a_command(recipe: Path, number: signal.Signals) -> None:
    """Here one that has loaded nothing yet."""
    command = [sys.executable, "-c", UNIGNORED + WAITING + "cli.main()", "check", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        check_stopped(process, number)


def test_check_says_what_dedup_would_do(curate: Curate, recipe: Path) -> None:
    evaluation = f'dedup.evaluation=[{{path = "{recipe.parent / "pool"}"}}]'
    sets = ["--set", "dedup.threshold=0.9", "--set", evaluation]
    lines = curate("check", recipe, "--no-measure", *sets).stdout.splitlines()
    assert lines[3] == "dedup: components of cosine 0.9 and above; 100 evaluation rows are kept out"
    assert lines[-2].startswith("cost: 200 forward passes of the reference at most, once, and 96 of the learner in")
    (line,) = mistakes(curate("check", recipe, "--set", "dedup.evaluation=[{path = 'nowhere'}]"))
    assert "nowhere: expected a file" in line


def test_check_reports_the_mistakes_of_pool_models_and_root_together(curate: Curate, recipe: Path) -> None:
    (recipe.parent / "root").write_text("a file")
    (recipe.parent / "pool/b.parquet").write_bytes(b"")
    (recipe.parent / "pool/c.parquet").write_bytes(b"not Parquet at all")
    sets = ["reference.model=ViT-B-99", "learner.model=none.json"]
    lines = mistakes(curate("check", recipe, *[part for text in sets for part in ("--set", text)]))
    for line, start in zip(
        lines,
        [
            "root: ",
            f"{recipe.parent}/pool/b.parquet: ",
            f"{recipe.parent}/pool/c.parquet: ",
            "reference.model",
            "learner.model",
        ],
        strict=True,
    ):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "selection.filter_ratio=0.95",
            "a round wants 160 candidates (1 super-batches of 160), the pool holds 100 rows",
        ),
        ("selection.super_batches=4", "a round wants 128 candidates (4 super-batches of 32), the pool holds 100 rows"),
    ],
)
def test_check_finds_a_pool_that_is_too_small(curate: Curate, recipe: Path, override: str, expected: str) -> None:
    (line,) = mistakes(curate("check", recipe, "--set", override))
    assert line.startswith("selection: ")
    assert expected in line
    assert "lower sub_batch_size" in line


def test_check_without_a_reference(curate: Curate, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace('reference.model = "tiny.json"', ""))
    (line,) = mistakes(curate("check", recipe))
    assert line.startswith("reference: must be given for a round; add [reference]")


def test_a_round_with_a_wrong_recipe_is_refused_before_anything_is_written(curate: Curate, recipe: Path) -> None:
    (line,) = mistakes(curate("round", recipe, "--set", "selection.gian=3"))
    assert "selection.gian = 3: unknown field; did you mean gain?" in line
    assert not (recipe.parent / "root").exists()


# --- reshard -----------------------------------------------------------------------------------------------------


def test_reshard_refuses_what_is_not_there_and_does_not_overwrite(curate: Curate, recipe: Path) -> None:
    source, out = recipe.parent / "pool/a.parquet", recipe.parent / "out"
    (line,) = mistakes(curate("reshard", source.parent / "none.parquet", "--to", out))
    assert "none.parquet: expected a Parquet file; " in line
    made = curate("reshard", source, "--to", out, "--rows", "60")
    assert made.returncode == 0
    assert made.stdout.splitlines() == [f"{out}/a-00000.parquet", f"{out}/a-00001.parquet"]
    (line,) = mistakes(curate("reshard", source, "--to", out))
    assert line == f"{out}/a-00000.parquet: exists already; choose an empty folder"


def test_a_round_that_was_committed_by_a_command_that_was_killed(
    curate: Curate, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who does not know of the commit is told that the same command begins the next round."""
    loaded = load_recipe(recipe)
    store = Store(loaded.root)
    commit_round(store, take_inventory(loaded.pool), [[(0, row) for row in range(8)]], number=0)
    ran: list[int | None] = []

    def run_round(*_: Any, number: int | None, **__: Any) -> Manifest:
        ran.append(number)
        found = read_manifest(store, 0)
        assert found is not None
        return found[0]

    monkeypatch.setattr("curate.pipelines.round.run_round", run_round)
    monkeypatch.setattr("curate.jobs.cli.round_tables", lambda _: [])
    ended = curate("round", recipe)
    where = f"{store.url}/rounds/r000000: its files; look at them: curate report {store.url}\n"
    begins = "round 0 is committed (--round 0 shows it); this begins round 1\n"
    assert (ended.returncode, ended.stderr) == (0, begins + where)
    assert curate("round", recipe, "--round", "0").stderr == where
    store.put_bytes(plan_name(1), b"begun")  # is finished, as everybody expects
    assert curate("round", recipe).stderr == where
    assert ran == [1, 0, 1]


LEAVING = """
import atexit, sys
from curate.jobs import cli, start

class Held:
    def __del__(self):
        print("the interpreter was taken down")

def run():
    atexit.register(print, "done at exit")
    sys.modules["kept"] = Held()
    sys.exit(STATUS)

cli.main = run
start.main()
"""


@pytest.mark.parametrize(("status", "expected"), [("0", 0), ("3", 3), ("None", 0), ("'a line'", 1)])
def test_a_command_ends_before_its_interpreter_does(status: str, expected: int) -> None:
    """Or a thread of Arrow's that lets go of memory of Python's too late would abort it."""
    command = [sys.executable, "-c", LEAVING.replace("STATUS", status)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (expected, "done at exit\n")
    assert done.stderr == ("a line\n" if status == "'a line'" else "")
