"""What the pages show runs as it stands."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import typer

from curate.jobs.cli import app
from curate.models.learners import newest_learner, read_learner
from curate.recipe import Recipe
from curate.rounds.stream import end_stream
from curate.storage import Store
from tests.helpers import commit_rounds, drawn_pool, tiny_config

HOUSE = Path(__file__).parents[1]
torch.set_num_threads(1)


def example(number: int, root: str) -> str:
    """A trainer of the page, on a root and a tiny model of ours."""
    code = re.findall(r"```python\n(.*?)```", (HOUSE / "docs/your-own-trainer.md").read_text(), re.DOTALL)[number]
    for shown, here in (("s3://bucket/curation", root), ("ViT-B-16-SigLIP", "ViT-tiny"), ("10_000", "6")):
        assert shown in code or here == "6"
        code = code.replace(shown, here)
    return code


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", tiny_config())
    store = Store(str(tmp_path / "root"))
    commit_rounds(store, drawn_pool(tmp_path / "pool", rows=48), rounds=2, sub_batches=3, b=8)
    end_stream(store)
    return store.url


@pytest.mark.timeout(120)
def test_your_own_trainer(root: str) -> None:
    store, code = Store(root), example(0, root)
    assert len(code.splitlines()) <= 25
    exec(compile(code, "docs/your-own-trainer.md", "exec"), {"__name__": "__main__"})
    learners = [read_learner(store, number) for number in range(newest_learner(store).number + 1)]
    assert [(one.step, one.next_batch, list(one.batch_losses)) for one in learners] == [
        (3, 3, [0, 1, 2]),
        (6, 6, [3, 4, 5]),
    ]
    assert learners[0].encoder.sha != learners[1].encoder.sha


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        pytest.param(1, 2, id="torchrun"),
        pytest.param(2, 1, id="lightning", marks=pytest.mark.exhaustive),
        pytest.param(3, 1, id="transformers", marks=pytest.mark.exhaustive),
    ],
)
def test_trainers_of_other_libraries(root: str, tmp_path: Path, number: int, ranks: int) -> None:
    code = example(number, root)
    assert len([line for line in code.splitlines() if line.strip()]) <= 31
    config = json.dumps(tiny_config())
    head = f"import json, open_clip\nopen_clip.factory._MODEL_CONFIGS['ViT-tiny'] = json.loads({config!r})\n"
    (tmp_path / "loop.py").write_text(head + code.replace('"workers": 2', '"workers": 0'))
    run = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    env = os.environ | {"PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *run, "loop.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert ended.returncode == 0, ended.stderr[-3000:]
    store = Store(root)
    learners = [read_learner(store, number) for number in range(newest_learner(store).number + 1)]
    assert [(one.step, one.next_batch) for one in learners] == [(3, 3), (6, 6)]
    assert learners[0].encoder.sha != learners[1].encoder.sha


def test_the_site_is_built_without_a_broken_link(tmp_path: Path) -> None:
    """Every page in a table of contents, every link within the site and to files of the project."""
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going"]
    ended = subprocess.run([*command, "docs", str(tmp_path)], cwd=HOUSE, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    recipe = (tmp_path / "reference/recipe.html").read_text(encoding="utf-8")
    for section, model in Recipe.model_fields.items():
        assert section in recipe
        for inner in getattr(model.annotation, "model_fields", {}):
            assert f">{inner}<" in recipe, (section, inner)
    verbs = (tmp_path / "reference/verbs.html").read_text(encoding="utf-8")
    assert set(typer.main.get_command(app).commands) <= set(re.findall("curate ([a-z-]+)", verbs))


def test_messages_of_the_faq_are_messages_of_the_code() -> None:
    said = []
    for folder in ("curate", "pipelines", "jobs"):
        for path in (HOUSE / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    said.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    said.append(node.value)
    for heading in re.findall(r"^## (.*)$", (HOUSE / "docs/faq.md").read_text(encoding="utf-8"), re.MULTILINE):
        if heading.endswith("?"):
            continue
        parts = [part.strip(" ,;") for part in re.split(r"…", heading)]
        for part in parts:
            assert any(part in message for message in said), (heading, part)


FENCE = r"^```(.*?)\n(.*?)^```$"
COMMAND = re.compile(r"^\s*\$? ?curate ([\w-]+)(.*?)(?:  +#.*)?$", re.MULTILINE)


def test_commands_of_the_pages_are_commands() -> None:
    """Verbs and options alone: what they do is tested where they are."""
    verbs = typer.main.get_command(app).commands
    seen = 0
    for path in [HOUSE / "README.md", *(HOUSE / "docs").glob("*.md")]:
        for _, block in re.findall(FENCE, path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for name, rest in COMMAND.findall(block):
                assert name in verbs, (path.name, name)
                own = {option for parameter in verbs[name].params for option in parameter.opts}
                for option in re.findall(r"(?<= )--?[a-z][\w-]*", rest.partition(" -- ")[0]):
                    assert option in own, (path.name, name, option)
                seen += 1
    assert seen > 30


def test_the_pictures_of_the_readme_are_there() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (HOUSE / "README.md").read_text(encoding="utf-8"))
    assert shown
    assert [name for name in shown if not (HOUSE / name).is_file()] == []
