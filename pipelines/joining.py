"""A Ray that is started here, or one that is joined; what keeps either from coming about is told in a line."""

import contextlib
import os
import secrets
import shutil
import stat
import time
from typing import Any

import grpc  # type: ignore[import-untyped]
import loky
import ray
from ray._private.authentication.authentication_token_setup import (
    AuthenticationTokenLoader,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.core.generated.ray_client_pb2 import ClusterInfoRequest
from ray.core.generated.ray_client_pb2_grpc import RayletDriverStub

from curate.errors import CurateError, UserError
from curate.messages import one_line

ANSWER_S = 10.0
"""How long a cluster may take to answer: one that is starting does not at once."""
# Of the paths of Unix sockets; and what Ray puts into a folder, with the largest process id of Linux.
SOCKET_BYTES, BELOW = 107, len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
POLL_S = 0.5


def meant(address: str) -> str:
    """The address that counts: within a Ray job RAY_ADDRESS names the cluster that runs it."""
    return os.environ.get("RAY_ADDRESS") or address


def start(quiet: dict[str, Any]) -> None:
    """Start Ray on this machine.

    Raises:
        UserError: no folder's name is short enough for Ray.
        CurateError: Ray does not start.
    """
    # Those that affinity and cgroups leave us, and two more: actors that hold every CPU starve the tasks that feed them
    # (ray#44687).
    how: dict[str, Any] = {"num_cpus": max(2, loky.cpu_count()) + 2, "include_dashboard": False}
    folder = ray._common.utils.get_default_ray_temp_dir()
    if len(os.fsencode(folder)) + BELOW > SOCKET_BYTES:
        # What does not fit into memory still goes where there may be room for it.
        how |= {"_temp_dir": _short_folder(folder), "object_spilling_directory": folder}
        folder = how["_temp_dir"]
    try:
        if not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
            # Ray would write one into the home folder, which batch systems may have left out.
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            AuthenticationTokenLoader.instance().reset_cache()
        # "local" and not None, or Ray joins whatever cluster it finds on this machine.
        ray.init(address="local", **how, **quiet)
    except Exception as error:  # of any class, Exception itself included
        reason, logs = one_line(error, 300), f"{folder}/session_latest/logs"
        with contextlib.suppress(OSError):  # Ray itself says then that it timed out
            if not isinstance(error, OSError) and shutil.disk_usage(os.path.dirname(folder)).free < 2**24:
                reason = "no space left on the device"
        raise CurateError(
            f"Ray does not start on this machine, with its files in {folder}: {reason}; free space there, or set "
            "RAY_TMPDIR to another folder, and run the same command again"
            + (f"; its logs are in {logs}" if os.path.isdir(logs) else "")
        ) from error


def _short_folder(long: str) -> str:
    """A folder of this user's for Ray, where `long` leaves no room for the names of its sockets."""
    for parent in ("/tmp", "/var/tmp"):
        folder = f"{parent}/curate-{os.geteuid()}"
        with contextlib.suppress(OSError):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            found = os.lstat(folder)
            # Nobody else's, nor open to them: Ray lets everybody write into its own folder, and runs what lies there.
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and os.access(folder, os.W_OK):
                os.chmod(folder, 0o700)
                return f"{folder}/ray"
    raise UserError(
        f"{long}: expected a path of at most {SOCKET_BYTES - BELOW} bytes for Ray, whose sockets lie below it; found "
        f"{len(os.fsencode(long))}, and neither /tmp nor /var/tmp can be used; set RAY_TMPDIR to a short folder"
    )


def join(where: str, quiet: dict[str, Any]) -> None:
    """Join a cluster.

    Raises:
        UserError: none answers there, or it does not let us in.
    """
    from_env = bool(os.environ.get("RAY_ADDRESS"))
    name = f"{'RAY_ADDRESS' if from_env else 'resources.address'} = {where!r}"
    way_out = "correct it, or unset it to use this machine" if from_env else "correct it, or use local"
    if where.startswith(("http://", "https://")):
        raise UserError(
            f"{name}: expected HOST:PORT of a cluster, by default port 6379; found the form of a dashboard's address, "
            f"which is for curate submit --address; {way_out}"
        )
    try:
        if where == "auto":
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            where = canonicalize_bootstrap_address(where)
        _ask(where)
        ray.init(address=where, **quiet)
    except ray.exceptions.AuthenticationError:
        raise UserError(f"{name}: {_TOKEN}") from None
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise UserError(f"{name}: {_TOKEN}") from None
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise UserError(
                f"{name}: expected the port of Ray's GCS, by default 6379; found another server; {way_out}; that of "
                "Ray's client is written ray://HOST:PORT"
            ) from None
        details = " ".join((error.details() or error.code().name).split())[:200]
        raise UserError(f"{name}: no Ray cluster answers there ({details}); start one, {way_out}") from None
    except Exception as error:  # of any class, Exception itself included
        raise UserError(
            f"{name}: cannot be joined ({one_line(error, 300)}); start a cluster there, {way_out}"
        ) from error


_TOKEN = (
    "expected to be let in, found that the cluster asks for a token, and that none or another is given here; set "
    "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to the cluster's"
)


def _ask(where: str) -> None:
    """Find out within seconds what Ray takes minutes for: whether a cluster is there, and lets us in.

    Raises:
        grpc.RpcError: as a rule UNAVAILABLE, which is another try's for `ANSWER_S` seconds.
    """
    until = time.monotonic() + ANSWER_S
    client = where.startswith("ray://")
    with init_grpc_channel(where.removeprefix("ray://")) as channel:
        while True:
            try:
                if client:
                    RayletDriverStub(channel).ClusterInfo(ClusterInfoRequest(), timeout=ANSWER_S)
                else:
                    NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=ANSWER_S)
                return
            except grpc.RpcError as error:
                code = error.code()
                if client and code not in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE}:
                    return  # its server does not know us yet, but is there
                if code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > until:
                    raise
            time.sleep(POLL_S)
