"""Round after round, choose the batches that a CLIP or SigLIP learner should train on next."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curate.models.publish import publish_learner
    from curate.reader.curated import CuratedReader

__all__ = ["CuratedReader", "publish_learner"]


def __getattr__(name: str) -> Any:
    # Looked up when first used: importing torch and open_clip takes seconds, and most modules need neither.
    if name == "CuratedReader":
        from curate.reader.curated import CuratedReader  # noqa: PLC0415

        return CuratedReader
    if name == "publish_learner":
        from curate.models.publish import publish_learner  # noqa: PLC0415

        return publish_learner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
