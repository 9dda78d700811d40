"""Jobs on a real cluster of one node, with token authentication: submitted, followed, stopped, not run twice."""

import hashlib
import os
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from curate.errors import UserError
from curate.jobs.drawn_pool import draw_pool
from curate.jobs.job_client import JobClient
from curate.jobs.submit import _with_files, submit
from curate.recipe_file import load_recipe
from tests.helpers import write_tiny

HOUSE = Path(__file__).parents[1]
TOKEN = "a-token-of-the-tests-" + uuid.uuid4().hex
NOBODY = "http://127.0.0.1:9"
ENDED_S = 240
START = """
import sys
from curate.jobs.job_client import JobClient
JobClient(sys.argv[1]).start(sys.argv[2], 1, sys.argv[3], {})
"""
FOLLOW = """
import sys
from curate.jobs.job_client import JobClient
ended = JobClient(sys.argv[1]).follow(sys.argv[2], lambda text: print(text, end="", flush=True))
print("ended", ended.status, ended.exit_status)
"""
RECIPE = """
root = "{root}"
[pool]
path = "{pool}"
[reference]
model = "tiny.json"
[learner]
model = "tiny.json"
[selection]
sub_batch_size = 16
n_chunks = 4
filter_ratio = 0.8
criterion = "learnability"
[resources]
workers = 1
[schedule]
rounds = 1
backoff_s = 0
"""


@dataclass(frozen=True)
class Cluster:
    address: str
    env: dict[str, str]
    mark: str
    """In the environment of all of its processes, and of no others."""

    @property
    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {TOKEN}"})

    def start(self, *arguments: str | Path, **env: str) -> "subprocess.Popen[str]":
        command = [sys.executable, *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            env=self.env | env,
            stdout=pipe,
            stderr=pipe,
            text=True,
            cwd=HOUSE,
            preexec_fn=heed_interrupts,  # noqa: PLW1509 nothing else runs here
        )

    def submit(self, recipe: Path, *arguments: str | Path, address: str = "", **env: str) -> "subprocess.Popen[str]":
        return self.start(
            "-m", "curate.jobs.cli", "submit", recipe, "--address", address or self.address, *arguments, **env
        )

    def drivers(self, *words: str) -> list[int]:
        """Processes of jobs whose command has these words one after the other."""
        wanted = "\0".join(["", *words, ""]).encode()
        return [pid for pid in own_processes(self.mark) if wanted in read(Path(f"/proc/{pid}/cmdline"))]

    def sleeper(self, name: str, code: str) -> str:
        """Start a job; `code` should wait before it prints, for Ray's own first line may come after what it prints."""
        done = self.start("-c", START, self.address, name, shlex.join(["python", "-c", code]))
        assert ended(done)[0] == 0
        return f"{name}-a1"


def heed_interrupts() -> None:
    """A shell has its jobs in the background ignore Ctrl-C, and so would what these tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    try:
        out, err = process.communicate(timeout=ENDED_S)
    finally:
        process.kill()
    print(out, err, sep="\n")  # shown by pytest if the test fails
    return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(reached: Callable[[], bool]) -> None:
    until = time.monotonic() + ENDED_S
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.2)


def own_processes(mark: str) -> list[int]:
    """Processes with `mark` in the environment that they were started with: the cluster's, and nobody else's."""
    folders = Path("/proc").glob("[0-9]*")
    return [int(folder.name) for folder in folders if mark.encode() in read(folder / "environ")]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # of a process that ended meanwhile, or of another user's
        return b""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    token = tmp_path_factory.mktemp("token") / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    short = Path(tempfile.mkdtemp(prefix="r"))  # Ray puts sockets below it, whose paths end at 107 characters
    mark = f"CURATE_TEST_CLUSTER={uuid.uuid4().hex}"
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HOUSE),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    port = free_port()
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={short}", "--port=0"]
    command += [f"--dashboard-port={port}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={free_port()}"]
    command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    with (short / "head.log").open("w") as log:
        head = subprocess.Popen(
            command,
            env=env | dict([mark.split("=")]),
            executable=str(Path(sys.executable).parent / "ray"),
            cwd=short,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def answers() -> bool:
        assert head.poll() is None, (short / "head.log").read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 401
        except OSError:
            return False
        raise AssertionError("let us in without a token")

    def takes_jobs() -> bool:
        """The server answers before the agent is there that it gives jobs to."""
        try:
            made.client.submit_job(entrypoint="true")
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            return False
        return True

    made = Cluster(f"http://127.0.0.1:{port}", env, mark)
    try:
        wait_until(answers)
        wait_until(takes_jobs)
        yield made
    finally:
        head.terminate()  # Ray's own way to an end, which with --block takes all processes along
        try:
            head.wait(3)
        except subprocess.TimeoutExpired:
            head.kill()
            head.wait()
        for process in own_processes(mark):
            os.kill(process, signal.SIGKILL)
        shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "tiny.json")
    draw_pool(folder / "pool", rows=200, shards=2, seed=0, image_size=32)
    return folder


def recipe_of(world: Path, root: str, *, folder: Path | None = None, pool: str | None = None) -> tuple[Path, str]:
    """A recipe with a root of its own, and how the names of its jobs begin."""
    path = (folder or world) / f"{root}.toml"
    path.write_text(RECIPE.format(root=world / root, pool=pool or world / "pool"))
    return path, "curate-" + hashlib.sha256(str(world / root).encode()).hexdigest()[:8]


# --- on a cluster ------------------------------------------------------------------------------------------------


@pytest.mark.timeout(ENDED_S * 2)
def test_the_status_of_a_job_is_the_status_of_the_command(cluster: Cluster, world: Path) -> None:
    below = world / "recipes"
    write_tiny(below, "tiny.json")
    recipe, name = recipe_of(world, "wrong", folder=below, pool="no pool")  # of the uploaded folder
    status, out, err = ended(cluster.submit(recipe, "--working-dir", world, "--env", "A=b=c", "--", "check"))
    assert status == 2
    assert "python -m curate.jobs.cli check recipes/wrong.toml" in out
    assert out.count("no pool: expected a file, folder or glob") == 1
    assert out.splitlines()[-1].startswith("no pool: expected")
    assert err.startswith(f"job {name}-check-a1 failed with status 2: ")
    assert err.count("\n") == 1
    assert cluster.client.get_job_info(f"{name}-check-a1").runtime_env["env_vars"] == {"A": "b=c"}


@pytest.mark.timeout(ENDED_S * 3)
def test_rounds_as_jobs_each_made_once_whoever_is_killed(cluster: Cluster, world: Path) -> None:
    recipe, name = recipe_of(world, "once")
    jobs = [f"{name}-round-r000000-a{attempt}" for attempt in (1, 2)]

    def scheduler() -> "subprocess.Popen[str]":
        return cluster.start("-m", "curate.jobs.cli", "rounds", recipe, "--address", cluster.address)

    def status_of(job: str) -> str:
        return {found.submission_id: str(found.status) for found in cluster.client.list_jobs()}.get(job, "")

    killed = scheduler()
    wait_until(lambda: bool(cluster.drivers("curate.jobs.cli", "round")))
    # Submitted again by somebody else: followed, not run twice.
    second = cluster.submit(recipe, "--", "round", "--round", "0")
    assert second.stderr is not None
    assert next(iter(second.stderr)).startswith(f"job {jobs[0]} is there already")
    for driver in cluster.drivers("curate.jobs.cli", "round"):
        os.kill(driver, signal.SIGKILL)
    status, _, err = ended(second)
    assert status == 137
    assert err.startswith(f"job {jobs[0]} failed with status 137: ")

    wait_until(lambda: status_of(jobs[1]) == "RUNNING")  # the scheduler's second try
    killed.kill()
    assert "round 0: try 1 of 3 failed: round 0: its job ended with status 137" in ended(killed)[1]

    status, out, err = ended(scheduler())
    assert status == 0
    assert f"job {jobs[1]} is there already" in err
    assert out.count("round 0: 2 sub-batches of 16 chosen by learner 0") == 1
    assert out.splitlines()[-1] == "the stream ends after 1 round"
    assert (world / "once/rounds/r000000/manifest.json").is_file()

    status, out, _ = ended(cluster.submit(recipe, "--", "round", "--round", "0"))
    assert (status, out) == (0, f"job {jobs[1]} has made this round; nothing to do\n")
    found = [job.submission_id for job in cluster.client.list_jobs() if str(job.submission_id).startswith(name)]
    assert sorted(found) == jobs


@pytest.mark.timeout(ENDED_S * 2)
def test_a_job_that_is_there_is_followed_left_and_stopped(cluster: Cluster, world: Path) -> None:
    recipe, name = recipe_of(world, "there")
    job = cluster.sleeper(f"{name}-check", "import time; time.sleep(1); print('begun', flush=True); time.sleep(600)")
    ways = [f"ray job {what} {job} --address {cluster.address}" for what in ("logs --follow", "stop")]

    # Ray's client would go where this variable says.
    status, out, err = ended(cluster.submit(recipe, "--no-wait", "--", "check", RAY_ADDRESS=NOBODY))
    assert (status, out.splitlines()) == (0, [job, *ways])
    assert f"job {job} is there already" in err

    waiting = cluster.submit(recipe, "--", "check")
    assert waiting.stdout is not None
    assert any(line == "begun\n" for line in waiting.stdout)
    waiting.send_signal(signal.SIGINT)
    status, _, err = ended(waiting)
    assert status == 130
    assert err.splitlines()[-1] == f"job {job} goes on; follow it with `{ways[0]}`, stop it with `{ways[1]}`"
    assert cluster.client.get_job_status(job) == "RUNNING"

    following = cluster.start("-c", FOLLOW, cluster.address, job)
    assert cluster.client.stop_job(job)
    status, out, _ = ended(following)
    assert status == 0
    assert out.splitlines().count("begun") == 1
    assert out.splitlines()[-1] == "ended STOPPED 1"

    # What was stopped is tried again, under the next number.
    status, out, err = ended(cluster.submit(recipe, "--no-wait", "--", "check"))
    assert (status, out.splitlines()[0], err) == (0, f"{name}-check-a2", "")
    cluster.client.stop_job(f"{name}-check-a2")


class Cutter(socketserver.ThreadingTCPServer):
    """Passes bytes on to a cluster, but breaks a log's stream at each of `cuts`, and lets no further stream begin."""

    daemon_threads = True

    def __init__(self, port: int, cuts: list[bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Cut)
        self.port, self.cuts, self.refused = port, cuts, 0


class _Cut(socketserver.BaseRequestHandler):
    server: Cutter

    def handle(self) -> None:
        asked = self.request.recv(65536)
        cut = None
        if b"/logs/tail" in asked:
            if not self.server.cuts:
                self.server.refused += 1
                return
            cut = self.server.cuts.pop(0)
        with socket.create_connection(("127.0.0.1", self.server.port)) as behind:
            behind.sendall(asked)
            threading.Thread(target=pass_on, args=(self.request, behind), daemon=True).start()
            pass_on(behind, self.request, cut)


def pass_on(source: socket.socket, sink: socket.socket, cut: bytes | None = None) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
            if cut and cut in data:
                break
        sink.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


@pytest.mark.timeout(ENDED_S)
def test_a_log_is_written_once_over_connections_that_drop(cluster: Cluster) -> None:
    code = "import time\nfor i in range(14): time.sleep(0.7); print('line', i, flush=True)\nexit(7)"
    job = cluster.sleeper("dropped", code)
    cutter = Cutter(int(cluster.address.rpartition(":")[2]), [b"line 2\n", b"line 5\n"])
    threading.Thread(target=cutter.serve_forever, args=(0.05,), daemon=True).start()
    try:
        address = f"http://127.0.0.1:{cutter.server_address[1]}"
        status, out, _ = ended(cluster.start("-c", FOLLOW, address, job))
    finally:
        cutter.shutdown()
        cutter.server_close()
    assert status == 0
    lines = [line for line in out.splitlines() if line.startswith(("line", "ended"))]
    assert lines == [*(f"line {i}" for i in range(14)), "ended FAILED 7"]
    assert not cutter.cuts
    assert cutter.refused


@pytest.mark.timeout(ENDED_S)
@pytest.mark.parametrize("wrong", ["address", "token", "no token"])
def test_who_is_not_let_in_reads_one_line(cluster: Cluster, world: Path, tmp_path: Path, wrong: str) -> None:
    recipe, name = recipe_of(world, "refused")
    (tmp_path / "token").write_text("not this one")
    env = {"token": {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}, "no token": {"RAY_AUTH_MODE": "disabled"}}
    address = f"http://127.0.0.1:{free_port()}" if wrong == "address" else cluster.address
    status, out, err = ended(cluster.submit(recipe, "--", "check", address=address, **env.get(wrong, {})))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"--address {address}: expected ")
    assert ("RAY_AUTH_MODE=token" in err) == (wrong != "address")
    assert not [job for job in cluster.client.list_jobs() if str(job.submission_id).startswith(name)]


# --- without one -------------------------------------------------------------------------------------------------


def mistakes(recipe: Path, *command: str, address: str = NOBODY, **how: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        submit(recipe, command, address=address, **how)
    return list(caught.value.lines)


def test_all_mistakes_are_found_before_anything_is_sent(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        """
        root = "x"
        pool.path = ["s3://bucket/pool", "shards/*.parquet", "/mnt/pool"]
        reference = {model = "local-dir:models/a", pretrained = "weights.safetensors"}
        learner.model = "other.json"
        evaluate.path = "held-out"
        dedup.evaluation = [{path = "/mnt/a"}, {path = "b"}]
        selection.sub_batch_size = 16
        """
    )
    (tmp_path / "requirements.txt").touch()
    cluster = "relative; the job runs on the cluster: give"
    everywhere = "an absolute path that every node has"
    upload = "or upload a folder with --working-dir"
    found = mistakes(
        recipe, "show", "--set=a=b", env=["1=2"], image="curate", requirements=tmp_path / "requirements.txt"
    )
    assert found == [
        "-- show --set=a=b: expected one of check, round, dedup, rounds, train after --",
        "--set after --: it would escape the checks made here; give it before --",
        "--image, --requirements: Ray installs nothing into an image; leave one out",
        "--env 1=2: expected NAME=VALUE",
        f"root = 'x': {cluster} s3://... or {everywhere}",
        f"pool.path = 'shards/*.parquet': {cluster} s3://... or {everywhere}, {upload}",
        f"evaluate.path = 'held-out': {cluster} s3://... or {everywhere}, {upload}",
        f"dedup.evaluation.path = 'b': {cluster} s3://... or {everywhere}, {upload}",
        f"reference.model = 'models/a': {cluster} {everywhere}, {upload}",
        f"reference.pretrained = 'weights.safetensors': {cluster} {everywhere}, {upload}",
        f"{recipe}: names other.json, found no such file beside the recipe; correct the name",
    ]
    # Those of the recipe itself, with what is set.
    assert mistakes(recipe, "check", overrides=["seed=-1"])[0].startswith(f"{recipe}: seed = -1")
    # An uploaded folder may hold the data, but what is written into it is lost.
    (tmp_path / "other.json").touch()
    (found,) = mistakes(recipe, "check", working_dir=tmp_path)
    assert found == f"root = 'x': {cluster} s3://... or {everywhere}"
    (found,) = mistakes(recipe, "check", overrides=["root=s3://bucket"], working_dir=tmp_path / "empty")
    assert found == f"--working-dir {tmp_path / 'empty'}: expected a folder, found none"
    (tmp_path / "empty").mkdir()
    (found,) = mistakes(recipe, "check", overrides=["root=s3://bucket"], working_dir=tmp_path / "empty")
    assert found == f"--working-dir {tmp_path / 'empty'}: does not hold the recipe {recipe}; move it there"


def test_a_plain_connection_to_elsewhere_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="expected Ray's job server, found none"):
        JobClient("http://curate.invalid:8265")
    assert capsys.readouterr().err.startswith("http://curate.invalid:8265: plain http")
    with pytest.raises(UserError, match="found none"):
        JobClient(NOBODY)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="expected http://HOST:PORT"):
        JobClient("ray://127.0.0.1:10001")


def test_a_job_with_an_image_brings_its_files_along(tmp_path: Path) -> None:
    write_tiny(tmp_path / "models")
    recipe = tmp_path / "it's a recipe.toml"
    recipe.write_text(
        """
        root = "s3://bucket"  # 100 % of $HOME, `ls` and \\\\ stay as they are; it's "text"
        pool.path = "s3://bucket/pool"
        learner.model = "models/tiny.json"
        selection.sub_batch_size = 16
        """
    )
    command = _with_files(recipe, load_recipe(recipe), 'cat "it\'s a recipe.toml" models/tiny.json')
    there = tmp_path / "there"
    there.mkdir()
    env = os.environ | {"TMPDIR": str(there)}
    written = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, env=env).stdout
    assert written == recipe.read_text() + (tmp_path / "models/tiny.json").read_text()
