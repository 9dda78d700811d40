"""`curate open-clip`: open_clip's own trainer on committed rounds, every batch a sub-batch, on any number of ranks.

open_clip's reader of tars shuffles samples across shards, and a batch of it then holds a few rows of many sub-batches:
what was chosen together is never trained on together. Here its `get_data` is handed `CuratedReader`'s batches instead.
An epoch of open_clip is a round; with `--accum-freq` a sub-batch is split over the parts of one step, whose loss is
over all of them.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from curate.errors import CommitConflictError, UserError
from curate.models.learners import newest_learner
from curate.models.publish import publish_learner
from curate.reader.curated import CuratedReader
from curate.rounds.manifest import Manifest, last_round, read_manifest
from curate.rounds.stream import await_round
from curate.storage import Store


class StreamEndedError(Exception):
    """The stream of rounds ended before open_clip's epochs did."""


def train(
    root: str,
    arguments: Sequence[str],
    *,
    follow: bool = False,
    augment: bool = False,
    publish: bool = True,
    say: Callable[[str], None],
) -> None:
    """Run `open_clip_train.main` on the rounds of a root.

    Args:
        root: of a curation.
        arguments: open_clip's own. Where they do not say, `--epochs` is the number of committed rounds and
            `--batch-size` a rank's share of b.
        follow: wait for the round after the last committed one.
        augment: open_clip's augmentation of pictures, in place of the pixels that were scored.
        publish: a learner after each round.
        say: is told what was published.

    Raises:
        UserError: no round, arguments that would take batches apart, or an open_clip without its trainer.
    """
    try:
        import open_clip_train.main as trainer  # noqa: PLC0415 needs webdataset, which not everybody has
        from open_clip_train.data import DataInfo  # noqa: PLC0415
        from open_clip_train.params import parse_args  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            f"open-clip: expected open_clip's trainer, found that {error}; pip install 'curate-clip[webdataset]'"
        ) from None
    store = Store(root)
    first = _round(store, 0, follow)
    asked = parse_args(list(arguments))
    parts = int(os.environ.get("WORLD_SIZE", "1")) * asked.accum_freq
    share, left = divmod(first.sub_batch_size, parts)
    if left:
        raise UserError(
            f"open-clip: {first.sub_batch_size} pairs per batch do not divide over {parts} parts, ranks × "
            "--accum-freq; use a divisor"
        )
    ours = {"--train-data": root, "--dataset-type": "webdataset", "--batch-size": str(share)}
    if given := [name for name in ours if _is_given(name, arguments)]:
        raise UserError(
            f"open-clip: expected no {given[0]}, which follows from {root} ({ours[given[0]]}), found one; leave it out"
        )
    if not _is_given("--epochs", arguments):
        if follow:
            raise UserError("open-clip: expected --epochs N, the rounds to come in all, with --follow; add it")
        ours["--epochs"] = str(last_round(store) + 1)
    loaders: list[RoundLoader] = []

    def get_data(args: Any, preprocess: tuple[Any, Any], epoch: int = 0, tokenizer: Any = None) -> dict[str, Any]:
        reader = CuratedReader(
            root,
            rank=args.rank,
            world_size=args.world_size,
            preprocess=preprocess[0 if augment else 1],
            tokenize=tokenizer,
            workers=args.workers,
            follow=follow,
        )
        begun = _round(store, epoch, follow)
        reader.load_state_dict({"next_batch": begun.first_batch})
        loaders.append(RoundLoader(reader, begun, args.accum_freq))
        others = argparse.Namespace(**vars(args) | {"train_data": None})
        held_out: dict[str, Any] = theirs(others, preprocess, tokenizer=tokenizer)
        return {"train": DataInfo(dataloader=loaders[0])} | held_out

    def train_one_epoch(model: Any, *others: Any, **more: Any) -> None:
        epoch_of_theirs(model, *others, **more)
        args = others[-1]
        if publish and args.rank == 0:
            _publish(store, model, args.model, loaders[0], say)

    theirs, epoch_of_theirs = trainer.get_data, trainer.train_one_epoch
    trainer.get_data, trainer.train_one_epoch = get_data, train_one_epoch
    try:
        trainer.main([*arguments, *(part for pair in ours.items() for part in pair)])
    except StreamEndedError:
        say("the stream of rounds has ended")
    finally:
        trainer.get_data, trainer.train_one_epoch = theirs, epoch_of_theirs
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _is_given(name: str, arguments: Sequence[str]) -> bool:
    return any(argument == name or argument.startswith(f"{name}=") for argument in arguments)


class RoundLoader:
    """What open_clip iterates over: in each epoch the batches of the next round.

    Args:
        reader: stands at the first of them.
        first: the round that the first epoch is of.
        parts: of each batch, for gradient accumulation.
    """

    def __init__(self, reader: CuratedReader, first: Manifest, parts: int) -> None:
        self._reader = reader
        self._batches = iter(reader)
        self._parts = parts
        self.num_batches = first.sub_batches * parts
        self.num_samples = first.sub_batches * first.sub_batch_size

    @property
    def next_batch(self) -> int:
        """As `CuratedReader.state_dict` has it."""
        return self._reader.state_dict()["next_batch"]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        found = False
        for batch in self._batches:
            found = True
            assert isinstance(batch.images, torch.Tensor)
            assert isinstance(batch.texts, torch.Tensor)
            yield from zip(batch.images.chunk(self._parts), batch.texts.chunk(self._parts), strict=True)
            if batch.last:
                break
        if not found:
            raise StreamEndedError


def _publish(store: Store, model: Any, name: str, loader: RoundLoader, say: Callable[[str], None]) -> None:
    newest = newest_learner(store)
    if newest is not None and newest.next_batch >= loader.next_batch:
        say(f"learner {newest.number} has seen batch {loader.next_batch} already: none is published")
        return
    step = loader.next_batch
    try:
        learner = publish_learner(store.url, getattr(model, "module", model), name, step=step, next_batch=step)
    except CommitConflictError as error:
        say(str(error))
        return
    say(f"learner {learner.number} published after batch {step}")


def _round(store: Store, number: int, follow: bool) -> Manifest:
    """A round, with `follow` once it is committed.

    Raises:
        UserError: there is none.
    """
    found = await_round(store, number) if follow else read_manifest(store, number)
    if found is None:
        raise UserError(
            f"{store.url}: expected round {number}, found none; run: curate round RECIPE, or wait for it with --follow"
        )
    return found[0]
