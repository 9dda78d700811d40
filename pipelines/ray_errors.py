"""What Ray raises, told plainly: an error of ours as what it is, a failure of Ray's own as one line."""

from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    RpcError,
    RuntimeEnvSetupError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from curate.errors import ClusterError, CurateError, UserError
from curate.messages import one_line

_ADDED = "\nFailed to apply UDF transform after "
"""How Ray Data goes on in an error's own text."""

_FAILURES: tuple[tuple[tuple[type[RayError], ...], str, str], ...] = (
    (
        (OutOfMemoryError,),
        "a worker was ended because its node ran out of memory",
        "lower resources.workers or embed.chunk_rows, or take nodes with more memory",
    ),
    (
        (OutOfDiskError, ObjectStoreFullError),
        "no room is left for what workers pass to each other, in memory or on a node's disk",
        "free space where Ray keeps its temporary files, or take nodes with more",
    ),
    (
        (RuntimeEnvSetupError,),
        "a node could not be made ready for the workers",
        "correct the environment or image that the job was submitted with",
    ),
    (
        (NodeDiedError, LocalRayletDiedError),
        "a node of the cluster died or cannot be reached",
        "see with `ray status` that the nodes are there",
    ),
    (
        (TaskUnschedulableError, ActorUnschedulableError),
        "no node of the cluster can run a worker",
        "see with `ray status` what is asked for and what is there",
    ),
    (
        (RayActorError, WorkerCrashedError),
        "a worker died, and so did those that took over from it",
        "look for the reason in Ray's logs on that node; most often it is memory",
    ),
    (
        (ObjectLostError,),
        "what a worker had made was lost, as when its node dies",
        "see with `ray status` that the nodes are there",
    ),
    (
        (GetTimeoutError,),
        "a worker did not answer in time",
        "see with `ray status` that the nodes are there",
    ),
    (
        (RaySystemError, RpcError),
        "a process of Ray's own failed",
        "look for the reason in Ray's logs",
    ),
)


def told_plainly(error: RayError) -> CurateError | None:
    """The error of ours inside, or the line for what failed in Ray; None where it is a defect in a task."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = getattr(cause, "cause", None) or cause.__cause__
    for cause in chain:
        # What Ray raises is an instance of our class, too, whose text is a remote traceback: the cause is inside.
        if isinstance(cause, CurateError) and not isinstance(cause, RayError):
            return _without_what_was_added(cause)
    for cause in reversed(chain):
        if not isinstance(cause, RayTaskError) and (found := _failure(cause)) is not None:
            return found
    return None


def _without_what_was_added(error: CurateError) -> CurateError:
    error.args = tuple(arg.partition(_ADDED)[0] if isinstance(arg, str) else arg for arg in error.args)
    if isinstance(error, UserError):
        error.lines = error.args
    return error


def _failure(error: BaseException) -> ClusterError | None:
    if isinstance(error, ActorDiedError) and error.actor_init_failed:
        return None  # its constructor raised what we did not expect: a defect, with its traceback
    for kinds, what, way_out in _FAILURES:
        if isinstance(error, kinds):
            return ClusterError(
                f"Ray: {what} ({one_line(error)}); {way_out}, and run the same command again: what is done stays"
            )
    return None
