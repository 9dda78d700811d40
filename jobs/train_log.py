"""What the trainer writes down as it goes: one JSON line per logged step, and the same for TensorBoard."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from curate.storage import Store


class TrainingLog:
    """A log that equals an uninterrupted run's: what an interrupted one wrote after its checkpoint is taken back.

    Args:
        folder: local; `log.jsonl` and TensorBoard's event files go there.
        step: of the checkpoint that training goes on from; later lines are removed.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        _rewind(path, step)
        self._lines = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, **values: Any) -> None:
        """Write one line; its numbers go to TensorBoard, too."""
        # One write of a whole line: a reader, or a kill, never sees half of one that was flushed.
        self._lines.write(json.dumps({"step": step} | values) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._board.close()


def log_folder(store: Store, logs: str | None) -> Path:
    """Where the log goes: as the recipe says, else within a local root, else in the working directory.

    There it is named by the root, for each run takes back what it finds after its checkpoint.
    """
    if logs:
        return Path(logs)
    return store.local_path("trainer") or Path(f"trainer-{hashlib.sha256(store.url.encode()).hexdigest()[:8]}")


def _rewind(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to this one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except ValueError:
            break  # torn by a power cut
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
