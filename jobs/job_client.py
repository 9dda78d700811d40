"""The job server of a Ray cluster, as a scheduler needs it: jobs by name and attempt, followed to their end."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from curate.errors import CurateError, UserError

LIVE = ("PENDING", "RUNNING")
POLL_S = 1.0
QUIET_S = 60.0
"""Longest silence of a log's stream before we ask whether the job, or only the connection, has ended."""
PATIENCE_S = 60.0
"""Longest time that the job server may be away while we follow a job."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One job among those of a name; `status` is PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""

    number: int
    submission_id: str
    status: str


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job ended; `exit_status` is 0 if and only if it succeeded."""

    status: str
    exit_status: int  # the driver's; 128 + signal as a shell has it; 1 if stopped or unknown
    message: str


class JobClient:
    """The job server of a cluster; attempt k at what is called NAME is the job NAME-a<k>.

    Raises:
        UserError: no job server answers at the address, or it does not let us in.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        url = urlsplit(address)
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise UserError(
                f"--address {address}: expected http://HOST:PORT of Ray's dashboard; its port is mostly 8265"
            )
        if url.scheme == "http" and not _is_loopback(url.hostname):
            print(
                f"{address}: plain http, so tokens can be read on the way; use https, or forward a port",
                file=sys.stderr,
            )
        for chatty in (
            "dashboard.modules.dashboard_sdk",
            "dashboard.modules.job.sdk",
            "_private.runtime_env.packaging",
        ):
            logging.getLogger(f"ray.{chatty}").setLevel(logging.WARNING)
        # Where Ctrl-C ends a stream, it complains after our last line of connections that were not closed in time.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        try:
            with _unset("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray would prefer them to what the caller asked for
                self._client = JobSubmissionClient(address)
        except AuthenticationError as error:
            raise self._refused(error) from None
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"--address {address}: expected Ray's job server, found none ({_gist(error)}); "
                "start the cluster or correct the address"
            ) from error

    def attempts(self, name: str) -> list[Attempt]:
        """The jobs called `name`, by number.

        Raises:
            CurateError: the server was away for a minute.
        """
        form = re.compile(re.escape(name) + r"-a(\d+)")
        found = []
        for job in self._ask(self._client.list_jobs, patience_s=PATIENCE_S):
            if match := form.fullmatch(job.submission_id or ""):  # a driver that nobody submitted has none
                found.append(Attempt(number=int(match[1]), submission_id=match[0], status=str(job.status)))
        return sorted(found, key=lambda attempt: attempt.number)

    def start(self, name: str, attempt: int, entrypoint: str, runtime_env: dict[str, Any]) -> str:
        """Submit attempt number `attempt` and return its submission id, also if somebody else submitted it meanwhile.

        Raises:
            UserError: the runtime environment is not one, or too large to upload.
            CurateError: the server did not take the job.
        """
        submission_id = f"{name}-a{attempt}"
        try:
            self._client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env, submission_id=submission_id)
        except AuthenticationError as error:
            raise self._refused(error) from None
        except (OSError, RuntimeError) as error:
            # Refused as a duplicate, or taken and the answer was lost: either way the job is there, to be followed.
            if submission_id not in {found.submission_id for found in self.attempts(name)}:
                raise CurateError(f"job {submission_id}: {self.address} did not take it ({_gist(error)})") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"job {submission_id}: cannot be submitted ({_gist(error)}); correct that") from error
        return submission_id

    def follow(self, submission_id: str, write: Callable[[str], None]) -> Ended:
        """Write a job's log as it grows, until the job has ended; each text once, whatever becomes of the connection.

        Raises:
            CurateError: the server knows no such job, or was away for a minute.
        """
        log = _Log(write)
        while True:
            # Whatever ends the stream, a dropped connection or a proxy without websockets, we ask and go on.
            with contextlib.suppress(Exception):
                asyncio.run(self._stream(submission_id, log))
            job = self._ask(self._client.get_job_info, submission_id, patience_s=PATIENCE_S)
            text = ""
            with contextlib.suppress(CurateError):  # the log's node may be gone, for good
                text = self._ask(self._client.get_job_logs, submission_id)
            log.show(text, 0)
            if str(job.status) not in LIVE:
                break
            time.sleep(POLL_S)
        status, code = str(job.status), job.driver_exit_code
        exit_status = 0 if status == "SUCCEEDED" else code if code and status == "FAILED" else 1
        return Ended(
            status=status,
            exit_status=exit_status if exit_status >= 0 else 128 - exit_status,
            message=" ".join((job.message or "").partition(", last available logs")[0].split()),
        )

    async def _stream(self, submission_id: str, log: "_Log") -> None:
        start = 0
        async with asyncio.timeout(QUIET_S) as limit:
            async for chunk in self._client.tail_job_logs(submission_id):  # always from the log's beginning
                log.show(chunk, start)
                start += len(chunk)
                limit.reschedule(asyncio.get_running_loop().time() + QUIET_S)

    def _ask(self, question: Callable[..., Any], *arguments: str, patience_s: float = 0) -> Any:
        until = time.monotonic() + patience_s
        while True:
            try:
                return question(*arguments)
            except AuthenticationError as error:
                raise self._refused(error) from None
            except (OSError, RuntimeError) as error:
                if "status code 404" in str(error) or time.monotonic() >= until:
                    about = f"job {arguments[0]}: " if arguments else ""
                    raise CurateError(
                        f"{about}{self.address} does not say ({_gist(error)}); ask again later"
                    ) from error
            time.sleep(POLL_S)

    def _refused(self, error: AuthenticationError) -> UserError:
        return UserError(
            f"--address {self.address}: expected to be let in, found that token authentication is on there "
            f"({error.message.splitlines()[0]}); set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN)"
        )


class _Log:
    """How much of a log was written."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self.seen = 0

    def show(self, text: str, start: int) -> None:
        """Write what is new in `text`, which begins at position `start` of the log."""
        if new := text[max(0, self.seen - start) :]:
            self.write(new)
            self.seen += len(new)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _unset(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _gist(error: BaseException) -> str:
    """The last line that says something: Ray's server answers with a whole traceback."""
    lines = [line for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1].strip()[:200] if lines else type(error).__name__
