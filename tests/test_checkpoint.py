"""A checkpoint is what was written, bit for bit, or it is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from curate.errors import UserError
from curate.spec import EncoderSpec
from curate.storage import Store
from jobs.checkpoint import Progress, checkpoints, load_checkpoint, save_checkpoint

START = EncoderSpec(model="m", source="s", weights_sha256="w", embed_dim=4, logit_scale=10.0, logit_bias=0.0)


def test_no_flipped_bit_of_weights_or_of_the_optimiser_is_believed(tmp_path: Path) -> None:
    store, model = Store(str(tmp_path)), torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    progress = Progress(
        data="rounds", start=START, step=1, next_batch=1, learner=0, learner_step=0, batch_losses={0: 1.5}
    )
    save_checkpoint(store, progress, model, optimizer)
    (name,) = checkpoints(store)
    found, tensors = load_checkpoint(store, name)
    assert found == progress
    assert any("exp_avg" in key for key in tensors)

    data = store.read_bytes(name)
    rng = np.random.default_rng(0)
    length = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    for place in [*rng.integers(len(data), size=20), *(len(data) - 1 - rng.integers(length, size=40))]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        store.put_bytes(name, bytes(flipped))
        with pytest.raises(UserError, match="expected a checkpoint, found something else"):
            load_checkpoint(store, name)
