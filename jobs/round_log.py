"""What rounds were like, for TensorBoard: a step for each round, beside what the trainer writes."""

from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from curate.jobs.train_log import log_folder
from curate.rounds.attempts import read_attempts
from curate.rounds.explain import mean_of, read_committed
from curate.storage import Store


def try_to_log(store: Store, logs: str | None, number: int, say: Callable[[str], None]) -> None:
    """`log_round`, or a line that says why not: a round that is committed is done, whatever becomes of its log."""
    try:
        log_round(store, logs, number)
    except Exception as error:
        say(f"round {number} is committed, and its log for TensorBoard was not written: {error}")


def log_round(store: Store, logs: str | None, number: int) -> Path | None:
    """Write a committed round's numbers; twice says the same twice.

    Args:
        store: the root.
        logs: `train.logs` of the recipe. Without it, and with a root that is no local folder, there is no place that
            the next round would find again, and nothing is written.
        number: of the round.

    Returns:
        The folder.
    """
    if logs is None and store.local_path("trainer") is None:
        return None
    manifest, _ = read_committed(store, number)
    quality = manifest.quality
    values = {
        "learnability/chosen": mean_of(manifest.learnability),
        "learnability/uniform": mean_of(manifest.uniform_learnability),
        "lead": (quality.get("standing") or {}).get("lead"),
        "staleness_batches": quality["staleness_batches"],
        "rank_correlation": (quality["rank_correlation"] or {}).get("value"),
        "chosen_again": quality["chosen_again"],
        "unique_examples": quality["unique_examples"],
    }
    for step in manifest.tallies:
        values |= {f"rows/{step.step}/kept": step.kept}
        values |= {f"rows/{step.step}/{reason}": rows for reason, rows in step.dropped.items() if rows}
    for attempt in read_attempts(store, number)[-1:]:
        values |= {f"seconds/{one['step']}": one["seconds"] for one in attempt["steps"]}
        values["seconds"] = attempt["wall_s"]
    folder = log_folder(store, logs) / "rounds"
    with SummaryWriter(str(folder)) as board:
        for name, value in values.items():
            if value is not None:
                board.add_scalar(f"round/{name}", value, number)
    return folder
