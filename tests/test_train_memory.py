"""What `curate check` says that the trainer holds is what it holds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="where Linux tells the peak"),
]

# Activations must outweigh what varies from process to process: 4 layers of 64, 65 tokens.
VISION = {"image_size": 64, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8}

MEASURE = """
import json, sys
import torch
from curate.models.encoder import load_model, normalize_pixels, split_transform
from curate.recipe import TrainSection
from curate.storage import Store
from jobs.memory import trainer_memory
from jobs.optimize import Trainee, make_optimizer, take_step
from jobs.ranks import Ranks
from pathlib import Path
from tests.helpers import CPU, tiny_encoder

torch.set_num_threads(1)
folder, b, how, vision = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
store = Store(str(folder / "root"))
spec = tiny_encoder(store, folder, vision_cfg=vision)

def loaded(): return load_model(store, spec, CPU)[0]

settings = TrainSection(**how)
stated = trainer_memory(loaded(), rows=b, batch=b, embed_dim=16, settings=settings, device_type="cpu")

def trainee(settings):
    model = loaded()
    if settings.grad_checkpointing:
        model.set_grad_checkpointing()
    shift = split_transform(model)[1]
    return Trainee(
        model=model, parallel=model, optimizer=make_optimizer(model, settings), loss="sigmoid",
        ranks=Ranks(rank=0, world_size=1, device=CPU), normalize=lambda pixels: normalize_pixels(pixels, shift),
        micro_batch=settings.micro_batch, grad_clip=1.0,
    )

def batch(b):
    side = vision["image_size"]
    return torch.zeros(b, side, side, 3, dtype=torch.uint8), torch.ones(b, 24, dtype=torch.int64)

def peak():  # not of getrusage, which begins with what the parent of the process held
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

take_step(trainee(settings), *batch(2), rate=0.1)  # what libraries load when first used
before = peak()
take_step(trainee(settings), *batch(b), rate=0.1)
print(json.dumps([stated.device + stated.batches, peak() - before]))
"""


@pytest.mark.parametrize(
    ("b", "how"),
    [(96, {}), (192, {"micro_batch": 96}), (768, {"micro_batch": 384, "grad_checkpointing": True})],
)
def test_what_is_stated_is_what_is_held(tmp_path: Path, b: int, how: dict[str, Any]) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(b), json.dumps(how), json.dumps(VISION)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    stated, held = json.loads(done.stdout.splitlines()[-1])
    assert stated / 1.5 < held < stated * 1.5, f"stated {stated:,}, held {held:,}"
