"""Fixtures that several test modules share."""

import gc
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadFileScheduling

from curate import access
from curate.storage import Store
from tests.faults import FaultProxy

if TYPE_CHECKING:
    from curate.models.encoder import Encoder

RAY = ("acceleration", "cluster", "crops", "dedup", "devices", "embed", "faults", "index", "round")
"""Files with tests that share a Ray: where pytest runs in several processes, one of these runs them all."""
FIRST = (*RAY, "own_ray", "submit", "train_ranks", "environment", "encoder")
"""Files that take longest, so that no process works alone at the end."""


def stem(nodeid: str) -> str:
    """Of a test's file, without test_."""
    return Path(nodeid.partition("::")[0]).stem.removeprefix("test_")


class ByFile(LoadFileScheduling):
    """Each file is one process's, and so are all that share a Ray."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if stem(nodeid) in RAY else str(super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest come first. Tests that need a card are skipped where there is none."""
    import torch

    for item in items:
        if "ray_local" in getattr(item, "fixturenames", ()):
            assert stem(item.nodeid) in RAY, f"{item.nodeid}: add its file to RAY in tests/conftest.py"
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: FIRST.index(stem(item.nodeid)) if stem(item.nodeid) in FIRST else len(FIRST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not its keywords, in which the folder's name is, too
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def pytest_collection_finish() -> None:
    """What imports have made stays to the end; without it the garbage collector is done within milliseconds."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Bindings count at the end what nobody took back."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """The endpoint of a real S3 server in this process: moto over HTTP."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()
    server._server.server_close()


def _bucket(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    import boto3  # a machine with a card, which runs tests/test_gpu.py alone, need not have it

    for key, value in {
        "AWS_ENDPOINT_URL": moto_url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    client.close()
    return f"s3://{bucket}/root"


@pytest.fixture
def s3_root(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh, empty S3 root, the environment set up for it.

    By default a new bucket of moto. Set CURATE_TEST_S3_URL=s3://bucket/prefix, with credentials and endpoint in
    the environment as for any run, to use a fresh prefix of a real store; what the tests write there stays.
    """
    if url := os.environ.get("CURATE_TEST_S3_URL"):
        yield f"{url.rstrip('/')}/{uuid.uuid4().hex}"
    else:
        yield _bucket(request.getfixturevalue("moto_url"), monkeypatch)
    _close_sessions()


@pytest.fixture
def faulty_s3_root(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FaultProxy]]:
    """A fresh S3 root behind a proxy that fails requests on demand; always moto."""
    root = _bucket(moto_url, monkeypatch)
    proxy = FaultProxy(moto_url)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield root, proxy
    _close_sessions()
    proxy.shutdown()
    proxy.server_close()
    thread.join()


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray of our own on this machine; starting it takes seconds, so that all tests share it."""
    import ray

    # A shell has its jobs in the background ignore Ctrl-C; workers that inherit that cannot be interrupted, either.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # One for an actor and two for tasks: each further worker imports what it needs for five seconds.
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A fresh local root."""
    return Store(str(tmp_path / "root"))


@pytest.fixture
def encoder(store: Store, tmp_path: Path) -> "Encoder":
    """A tiny model with random weights, stored in that root."""
    from curate.models.encoder import load_encoder
    from tests.helpers import CPU, tiny_encoder

    return load_encoder(store, tiny_encoder(store, tmp_path), CPU)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest) -> str:
    """A fresh root of either kind."""
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path") / "root")
    return str(request.getfixturevalue("s3_root"))


def _close_sessions() -> None:
    access._s3_of.cache_clear()
    gc.collect()  # runs s3fs's finalizers here, not in the middle of another test
