"""What the pages show runs as it stands."""

import re
from pathlib import Path

import open_clip
import pytest
import torch

from curate.models.learners import newest_learner, read_learner
from curate.rounds.stream import end_stream
from curate.storage import Store
from tests.helpers import commit_rounds, drawn_pool, tiny_config

HOUSE = Path(__file__).parents[1]
torch.set_num_threads(1)


@pytest.mark.timeout(120)
def test_your_own_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (HOUSE / "docs/your-own-trainer.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 25
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", tiny_config())
    root = str(tmp_path / "root")
    store = Store(root)
    commit_rounds(store, drawn_pool(tmp_path / "pool", rows=48), rounds=2, sub_batches=3, b=8)
    end_stream(store)
    for shown, here in (("s3://bucket/curation", root), ("ViT-B-16-SigLIP", "ViT-tiny")):
        assert shown in code
        code = code.replace(shown, here)
    exec(compile(code, "docs/your-own-trainer.md", "exec"), {"__name__": "__main__"})
    learners = [read_learner(store, number) for number in range(newest_learner(store).number + 1)]
    assert [(one.step, one.next_batch, list(one.batch_losses)) for one in learners] == [
        (3, 3, [0, 1, 2]),
        (6, 6, [3, 4, 5]),
    ]
    assert learners[0].encoder.sha != learners[1].encoder.sha
