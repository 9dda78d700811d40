"""What a command meets around it: paths as a shell knows them, disks, terminals, clusters that are not there."""

import errno
import io
import os
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray._private.runtime_env import uv_runtime_env_hook

import curate.jobs.check
from curate import access
from curate.errors import CurateError, UserError
from curate.formats.source import list_shards
from curate.jobs.cli import main
from curate.jobs.tables import print_tables, table_of
from curate.pipelines import cluster, joining
from curate.recipe import Recipe
from curate.recipe_file import load_recipe
from curate.storage import Store

HOUSE = Path(__file__).parents[1]
RECIPE = """
root = "root"
pool.path = "pool"
reference.model = "tiny.json"
learner.model = "tiny.json"
selection.sub_batch_size = 16
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`curate` with these arguments: exit status and what it said."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["curate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


# --- paths -----------------------------------------------------------------------------------------------------------


def test_a_recipe_from_windows(recipe: Path) -> None:
    plain = load_recipe(recipe)
    recipe.write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert load_recipe(recipe) == plain


PATHS: dict[str, Callable[[Recipe], Any]] = {
    "root={}": lambda r: r.root,
    "pool.path={}": lambda r: r.pool.path,
    'pool.path=["{}"]': lambda r: r.pool.path[0],
    "train.logs={}": lambda r: r.train.logs,
    "evaluate.path={}": lambda r: r.evaluate and r.evaluate.path,
    'dedup.evaluation=[{{path = "{}"}}]': lambda r: r.dedup and r.dedup.evaluation[0].path,
    "learner.model={}": lambda r: r.learner.model,
    "learner.model=local-dir:{}": lambda r: r.learner.model.removeprefix("local-dir:"),
    "reference.pretrained={}": lambda r: r.reference and r.reference.pretrained,
}


@pytest.mark.parametrize("override", PATHS)
def test_a_home_folder_is_meant(recipe: Path, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert PATHS[override](load_recipe(recipe, [override.format("~/x/y")])) == "/home/me/x/y"
    assert PATHS[override](load_recipe(recipe, [override.format("a/~/b~")])) == "a/~/b~"


@pytest.mark.parametrize("override", PATHS)
def test_a_variable_is_not(recipe: Path, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    for said, found, write in (
        ("$HOME/x", "$HOME", "/home/me/x"),
        ("/x/${HOME}/y", "${HOME}", "/x//home/me/y"),
        ("$HOME/$NOWHERE", "$HOME", "what it stands for"),
    ):
        with pytest.raises(UserError) as caught:
            load_recipe(recipe, [override.format(said)])
        (line,) = caught.value.lines
        assert f"nothing replaces here; found {found}; write {write}" in line
        assert line.startswith(f"{recipe}: {override.partition('=')[0]}")


def test_nobody_s_home_folder(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"root = '~nobody-at-all/x': expected a home folder for ~nobody-at-all, found"):
        load_recipe(recipe, ["root=~nobody-at-all/x"])


@pytest.mark.parametrize("path", ["s3://bucket/~/x", "https://host/a?$format=parquet", "/a/cost$/b", "hf://a/~b"])
def test_other_paths_stay_as_they_are(recipe: Path, path: str) -> None:
    assert load_recipe(recipe, [f"pool.path={path}"]).pool.path == path


def test_show_knows_the_home_folder_too(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    status, _, err = run("show", "~/root")
    assert (status, str(tmp_path / "root") in err) == (2, True)
    status, _, err = run("show", "$HOME/root")
    assert (status, err.count("\n")) == (2, 1)
    assert f"write {tmp_path}/root" in err
    assert list(tmp_path.iterdir()) == []


# --- disks and terminals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "full", "/root/x"), "/root/x: No space left on device; free space there, and run"),
        (FileNotFoundError(errno.ENOENT, "gone", "/root/x"), "/root/x: No such file or directory; it was there when"),
        (FileNotFoundError("bucket/x"), "bucket/x: No such file or directory; it was there when what names it was"),
        (OSError(errno.EROFS, "no", "/root"), "/root: Read-only file system; make it writable or choose another place"),
        (PermissionError(errno.EACCES, "no", "/tmp/x"), "/tmp/x: Permission denied; let this user write there or"),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "root, TMPDIR = /scratch, or where the output goes: No space left",
        ),
    ],
)
@pytest.mark.parametrize("in_ray", [False, True])
def test_a_disk_is_told_in_a_line(
    run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str, *, in_ray: bool
) -> None:
    def fail(*_: Any, **__: Any) -> Iterator[str]:
        if not in_ray:
            raise error
        raise ray.exceptions.RayTaskError("task", "Traceback: of a worker", error).as_instanceof_cause()

    monkeypatch.setenv("TMPDIR", "/scratch")
    monkeypatch.setattr(curate.jobs.check, "check_recipe", fail)
    status, out, err = run("check", recipe)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(expected)
    assert err.endswith("run the same command again\n")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("a defect")])
def test_other_errors_keep_their_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> Iterator[str]:
        raise error

    monkeypatch.setattr(curate.jobs.check, "check_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["curate", "check", str(recipe)])
    with pytest.raises(type(error)):
        main()


def test_a_terminal_shows_what_it_can_and_obeys_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curate.jobs.check, "check_recipe", lambda *_, **__: ["café \x1b[2J\r\u202e→"])
    monkeypatch.setattr(sys, "argv", ["curate", "check", str(recipe)])
    monkeypatch.setattr(sys, "stdout", written := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    print_tables([table_of("rows", [{"uid": "a\x1b[2Jb\nc"}]), "\x07"])
    written.flush()
    text = written.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert text.startswith("caf\\xe9 \\x1b[2J\\r\\u202e\\u2192\n")
    assert "a\\x1b[2Jb\\nc" in text
    assert text.endswith("\\x07\n")


# --- clusters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own that has not joined any Ray, and does not get so far either."""

    def fail(**_: Any) -> None:
        raise AssertionError("joined")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(joining, "ANSWER_S", 0.5)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # What is switched off is switched on again.
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", ray._private.worker.print_to_stdstream)
    monkeypatch.setattr(ray._private.ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    for name in ("RAY_BACKEND_LOG_LEVEL", "RAY_IGNORE_UNHANDLED_ERRORS", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
        monkeypatch.delenv(name, raising=False)


def refusal(address: str) -> str:
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        cluster.connect(address)
    assert time.monotonic() - began < 15
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens, and nobody will."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_that_is_gone(monkeypatch: pytest.MonkeyPatch, closed_port: int, form: str) -> None:
    address = form.format(closed_port)
    line = refusal(address)
    assert line.startswith(f"resources.address = '{address}': no Ray cluster answers there (")
    assert line.endswith("; start one, correct it, or use local")
    monkeypatch.setenv("RAY_ADDRESS", address)
    line = refusal("local")
    assert line.startswith(f"RAY_ADDRESS = '{address}': no Ray cluster answers there (")
    assert line.endswith("; start one, correct it, or unset it to use this machine")


@pytest.mark.usefixtures("no_ray")
def test_the_address_of_a_dashboard() -> None:
    assert "expected HOST:PORT of a cluster, by default port 6379; found the form of a dashboard's" in refusal(
        "http://127.0.0.1:8265"
    )


@pytest.fixture(params=[grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED], ids=lambda code: code.name)
def refusing_server(request: pytest.FixtureRequest) -> Iterator[tuple[grpc.StatusCode, str]]:
    """A gRPC server that answers everything in one way."""

    class Refuse(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, _: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(request.param, "no"))

    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads, handlers=[Refuse()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield request.param, f"127.0.0.1:{port}"
        server.stop(None).wait()


@pytest.mark.usefixtures("no_ray")
def test_a_server_that_does_not_let_us_in(refusing_server: tuple[grpc.StatusCode, str]) -> None:
    code, address = refusing_server
    expected = {
        grpc.StatusCode.UNAUTHENTICATED: "found that the cluster asks for a token, and that none or another is given",
        grpc.StatusCode.UNIMPLEMENTED: "expected the port of Ray's GCS, by default 6379; found another server;",
    }
    assert expected[code] in refusal(address)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        assert expected[code] in refusal(f"ray://{address}")


@pytest.mark.usefixtures("no_ray")
def test_what_else_keeps_from_joining_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("Version mismatch:\n  python 3.9")

    monkeypatch.setattr(joining, "_ask", lambda _: None)
    monkeypatch.setattr(ray, "init", fail)
    assert "cannot be joined (Version mismatch: python 3.9)" in refusal("127.0.0.1:6379")


@pytest.mark.usefixtures("no_ray")
def test_an_empty_ray_address_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **how: asked.update(how))
    for address in ("", "local"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        asked.clear()
        cluster.connect("local")
        assert asked["address"] == "local"
        assert asked["num_cpus"] > 2


@pytest.mark.usefixtures("no_ray")
def test_uv_run_uploads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uv_runtime_env_hook, "_get_uv_run_cmdline", lambda: ["uv", "run", "curate"])
    monkeypatch.setattr(uv_runtime_env_hook, "hook", lambda _: {"working_dir": "everything"})
    environment = ray._private.worker._maybe_modify_runtime_env
    cluster._silence_ray()
    assert environment(None, False) is None
    # Unless somebody wants it.
    monkeypatch.setattr(ray._private.ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "1")
    cluster._silence_ray()
    assert environment(None, False) == {"working_dir": "everything"}


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("error", "free", "reason"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/x"), 0, "[Errno 30] Read-only file system: '/x'"),
        (RuntimeError("Timed out\nwaiting for file"), 0, "no space left on the device"),
        (RuntimeError("Timed out\nwaiting for file"), 2**40, "Timed out waiting for file"),
        (Exception("The current node timed out during startup."), 2**40, "The current node timed out"),
    ],
)
def test_a_ray_that_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception, free: int, reason: str
) -> None:
    def fail(**_: Any) -> None:
        os.write(2, b"a page of Ray's\n")
        raise error

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(joining.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    monkeypatch.setenv("RAY_TMPDIR", "/scratch")
    with pytest.raises(CurateError) as caught:
        cluster.connect("local")
    assert caught.value.exit_status == 1
    assert str(caught.value).startswith(f"Ray does not start on this machine, with its files in /scratch/ray: {reason}")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_ray")
def test_no_folder_is_short_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "no")

    monkeypatch.setattr(joining.os, "makedirs", refuse)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    assert "expected a path of at most 43 bytes for Ray, whose sockets lie below it; found" in refusal("local")


def connecting(code: str, **env: str) -> "subprocess.CompletedProcess[str]":
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=HOUSE,
        env=mine | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_batch_system(tmp_path: Path) -> None:
    """Ray starts there without a word, and what it has is told at once."""
    scratch = tmp_path / ("job-" * 30)
    scratch.mkdir()
    code = "from tests import own_ray; own_ray.a_laptop_that_is_told_to_use_gpus()"
    # /proc: a folder where not even root makes others.
    done = connecting(code, TMPDIR=str(scratch), HOME="/proc/none", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_temporary_folder_that_is_none() -> None:
    code = "from curate.pipelines.cluster import connect; connect('local')"
    done = connecting(code, RAY_TMPDIR=f"/proc/{os.getpid()}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "CurateError: Ray does not start on this machine, with its files in /proc/" in done.stderr


# --- S3 settings with a slip -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["s3://bucket//curation", "s3://bucket/a//b"])
def test_an_empty_folder_name_after_the_bucket(url: str) -> None:
    """s3fs strips it where it lists and keeps it where it reads."""
    for look in (Store, list_shards):
        with pytest.raises(UserError, match="expected no empty folder name; found // after the bucket") as caught:
            look(url)
        assert len(caught.value.lines) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9000"}, "AWS_ENDPOINT_URL begins with http:// or https://"),
        ({"AWS_PROFILE": "no-such-profile"}, "correct AWS_PROFILE, or what it stands for"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:{}"}, "correct AWS_ENDPOINT_URL, or start what should answer there"),
    ],
    ids=["no scheme", "no such profile", "nobody answers"],
)
@pytest.mark.parametrize(
    "look",
    [lambda url: curate.jobs.check._root(types.SimpleNamespace(root=url)), lambda url: Store(url).list(), list_shards],
    ids=["check", "root", "pool"],
)
def test_settings_with_a_slip(
    monkeypatch: pytest.MonkeyPatch,
    closed_port: int,
    settings: dict[str, str],
    expected: str,
    look: Callable[[str], Any],
) -> None:
    monkeypatch.setattr(access, "DEADLINE_S", 3.0)
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (keys | settings).items():
        monkeypatch.setenv(name, value.format(closed_port))
    with pytest.raises(UserError) as caught:
        look("s3://bucket/curation")
    (line,) = caught.value.lines
    assert expected in line
    assert "\n" not in line
