"""The command `curate`, whatever is installed: a verb that wants more than there is says what to install."""

import sys

EXTRAS = {
    **dict.fromkeys(("rich", "tensorboard", "typer"), "train"),
    **dict.fromkeys(("duckdb", "faiss", "grpc", "jinja2", "loky", "matplotlib", "ray", "scipy"), "curate"),
    **dict.fromkeys(("sentencepiece", "transformers"), "text"),
}
"""Of what is not in every installation, by the name that one imports, the extra that brings it."""


def main() -> None:
    """Run the command line; a library that is missing is a line with the extra that brings it, and ends the process."""
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
