"""The Hugging Face hub: asked only where a model cannot be made without it, and given up on within seconds.

Left to themselves, open_clip and transformers ask it for files that lie in a local folder, and repeat each question for
more than a minute where there is no network.
"""

import contextlib
from collections.abc import Iterator

import huggingface_hub
from huggingface_hub import constants

from curate.messages import one_line

ANSWERS_WITHIN_S = 5.0


@contextlib.contextmanager
def without_hub() -> Iterator[None]:
    """Keep every library of this process from asking the hub; what was downloaded before is found."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def hub_if_it_answers() -> Iterator[str | None]:
    """Let the hub be asked if it answers one question in time; yields why it does not, else None."""
    reason = _why_silent()
    with without_hub() if reason else contextlib.nullcontext():
        yield reason


def _why_silent() -> str | None:
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        # Any answer will do: what it says of a file is for open_clip to find out.
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=ANSWERS_WITHIN_S)
    except Exception as error:  # of whichever library its client is built on
        return one_line(error) or type(error).__name__
    return None
