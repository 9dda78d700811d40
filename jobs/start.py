"""The command `curate`, whatever is installed: a verb that wants more than there is says what to install."""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator

EXTRAS = {
    **dict.fromkeys(("rich", "tensorboard", "typer"), "train"),
    **dict.fromkeys(("duckdb", "faiss", "grpc", "jinja2", "loky", "matplotlib", "ray", "scipy"), "curate"),
    **dict.fromkeys(("sentencepiece", "transformers"), "text"),
}
"""Of what is not in every installation, by the name that one imports, the extra that brings it."""


def main() -> None:
    """Run the command line; a library that is missing is a line with the extra that brings it, and ends the process."""
    _open_streams()
    with _leaving():
        try:
            from curate.jobs.cli import main as run  # noqa: PLC0415 which needs an extra itself

            run()
        except ModuleNotFoundError as error:
            library = (error.name or "").partition(".")[0]
            if library not in EXTRAS:
                raise
            way_out = f"pip install 'curate-clip[{EXTRAS[library]}]'"
            print(f"curate: expected {library}, which this needs, found none installed; {way_out}", file=sys.stderr)
            sys.exit(2)


def _open_streams() -> None:
    """Where a standard stream is closed, as by `>&-`, have nothing read and nothing written.

    Else the next file to be opened would have the stream's number, and be written to by whatever prints.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 for as long as the process lives


@contextlib.contextmanager
def _leaving() -> Iterator[None]:
    """Have the process end, with its status, once all is done that is to be done at exit, and the interpreter still up.

    A thread of Arrow's lets go of what it read a moment after a table is there. If that is memory of Python's, and the
    interpreter is being taken down by then, the process aborts: one `curate show` in seven on a busy machine ended with
    the status 134, its answer given.
    """
    status = [1]

    def leave() -> None:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):  # whoever read them is gone, or they are closed
                stream.flush()
        os._exit(status[0])

    atexit.register(leave)  # before what is imported registers its own: the first comes last
    try:
        yield
        status[0] = 0
    except SystemExit as ended:
        status[0] = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
