"""`curate submit`: a verb of ours as a Ray job, under a name that tells the same work again."""

import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from curate.errors import UserError
from curate.jobs.job_client import LIVE, Attempt, JobClient
from curate.recipe import Recipe
from curate.recipe_file import load_recipe

VERBS = ("check", "round", "dedup", "rounds", "train")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")


def submit(
    recipe_path: Path,
    command: Sequence[str],
    *,
    address: str,
    overrides: Sequence[str] = (),
    wait: bool = True,
    working_dir: Path | None = None,
    image: str | None = None,
    requirements: Path | None = None,
    env: Sequence[str] = (),
    client: JobClient | None = None,
) -> int:
    """Run a verb and its arguments on the cluster, unless it runs there already or, a round by number, is done.

    Args:
        recipe_path: goes with the job, and so do the JSON model configurations that it names.
        command: the verb and what follows it, but for the recipe.
        address: of Ray's dashboard.
        overrides: of the recipe, here and there.
        wait: show the log until the job has ended, and return its exit status; 130 if interrupted.
        working_dir: folder with the recipe in it, to be uploaded whole.
        image: container image to run in.
        requirements: file of Python packages that Ray installs with uv before the job runs.
        env: NAME=VALUE of the job.
        client: of this address, where there is one already.

    Raises:
        UserError: every mistake that can be known before anything is sent, together; or no cluster answers.
        CurateError: the cluster did not take the job, or does not say what became of it.
    """
    recipe = _checked(recipe_path, command, overrides, working_dir, image, requirements, env)
    name, numbered = _job_name(recipe, command)
    client = client or JobClient(address)
    attempts = client.attempts(name)
    last = attempts[-1] if attempts else Attempt(number=0, submission_id="", status="")
    if last.status in LIVE:
        submission_id = last.submission_id
        print(f"job {submission_id} is there already ({last.status})", file=sys.stderr)
    elif numbered and last.status == "SUCCEEDED":
        print(f"job {last.submission_id} has made this round; nothing to do")
        return 0
    else:
        in_job = os.path.relpath(recipe_path.resolve(), (working_dir or recipe_path.parent).resolve())
        sets = [part for override in overrides for part in ("--set", override)]
        entrypoint = shlex.join(["python", "-m", "curate.jobs.cli", command[0], in_job, *command[1:], *sets])
        runtime_env: dict[str, Any] = {"env_vars": dict(text.split("=", 1) for text in env)}
        if requirements:
            runtime_env["uv"] = str(requirements)
        with tempfile.TemporaryDirectory() as scratch:
            if image:
                # Ray uploads nothing to a job that has its own image: the command brings the files along.
                runtime_env["image_uri"] = image
                entrypoint = _with_files(recipe_path, recipe, entrypoint)
            else:
                runtime_env["working_dir"] = str(working_dir or _copied(recipe_path, recipe, Path(scratch)))
            submission_id = client.start(name, last.number + 1, entrypoint, runtime_env)
    ways = [f"ray job {what} {submission_id} --address {address}" for what in ("logs --follow", "stop")]
    if not wait:
        print(submission_id, *ways, sep="\n")
        return 0
    try:
        ended = client.follow(submission_id, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"job {submission_id} goes on; follow it with `{ways[0]}`, stop it with `{ways[1]}`", file=sys.stderr)
        return 130
    if ended.exit_status:
        print(f"job {submission_id} failed with status {ended.exit_status}: {ended.message}", file=sys.stderr)
    return ended.exit_status


def _checked(
    path: Path,
    command: Sequence[str],
    overrides: Sequence[str],
    working_dir: Path | None,
    image: str | None,
    requirements: Path | None,
    env: Sequence[str],
) -> Recipe:
    mistakes = []
    if not command or command[0] not in VERBS:
        mistakes.append(f"-- {shlex.join(command)}: expected one of {', '.join(VERBS)} after --")
    if any(re.match("--set(=|$)", text) for text in command):
        mistakes.append("--set after --: it would escape the checks made here; give it before --")
    if image and requirements:
        mistakes.append("--image, --requirements: Ray installs nothing into an image; leave one out")
    if image and working_dir:
        mistakes.append("--image, --working-dir: Ray uploads nothing to a job with its own image; leave one out")
    if requirements and not requirements.is_file():
        mistakes.append(
            f"--requirements {requirements}: expected a file, found none; `make lock` shows how one is made"
        )
    mistakes += [f"--env {text}: expected NAME=VALUE" for text in env if not re.match(r"[A-Za-z_][A-Za-z_0-9]*=", text)]
    if working_dir and not working_dir.is_dir():
        mistakes.append(f"--working-dir {working_dir}: expected a folder, found none")
    elif working_dir and not path.resolve().is_relative_to(working_dir.resolve()):
        mistakes.append(f"--working-dir {working_dir}: does not hold the recipe {path}; move it there")
    try:
        recipe = load_recipe(path, overrides)
        mistakes += _unreachable(path, recipe, uploaded=working_dir is not None)
    except UserError as error:
        mistakes += error.lines
    if mistakes:
        raise UserError(*mistakes)
    return recipe


def _unreachable(path: Path, recipe: Recipe, *, uploaded: bool) -> Iterator[str]:
    """A line for each thing that the recipe names and the job would not find, or would write where nobody looks."""
    data = [("pool.path", recipe.pool.path), ("evaluate.path", recipe.evaluate.path if recipe.evaluate else [])]
    data += [("dedup.evaluation.path", held_out.path) for held_out in (recipe.dedup.evaluation if recipe.dedup else ())]
    named = [(field, path) for field, paths in data for path in ([paths] if isinstance(paths, str) else paths)]
    files = []
    for role, section in (("reference", recipe.reference), ("learner", recipe.learner)):
        if section and section.model.startswith("local-dir:"):
            files.append((f"{role}.model", section.model.removeprefix("local-dir:")))
        if section and section.pretrained and ("/" in section.pretrained or section.pretrained.endswith(SUFFIXES)):
            files.append((f"{role}.pretrained", section.pretrained))
    s3, upload = "s3://... or ", ", or upload a folder with --working-dir"
    told = [("root", recipe.root, s3, "")]  # not in an uploaded folder, of which each node has a copy that goes away
    if not uploaded:
        told += [(*item, s3, upload) for item in named] + [(*item, "", upload) for item in files]
    for field, value, where, way_out in told:
        if "://" not in value and not Path(value).is_absolute():
            yield (
                f"{field} = {value!r}: relative; the job runs on the cluster: give {where}an absolute path that every "
                f"node has{way_out}"
            )
    for config in _configs(recipe):
        if not (path.parent / config).is_file():
            yield f"{path}: names {config}, found no such file beside the recipe; correct the name"
        elif not uploaded and ".." in Path(config).parts:
            yield f"{path}: names {config}, outside the recipe's folder; put it beside the recipe"


def _configs(recipe: Recipe) -> list[str]:
    """The JSON model configurations that are looked up beside the recipe."""
    models = {section.model for section in (recipe.reference, recipe.learner) if section}
    return sorted(model for model in models if model.endswith(".json") and not Path(model).is_absolute())


def _copied(path: Path, recipe: Recipe, folder: Path) -> Path:
    for name in (path.name, *_configs(recipe)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path.parent / name, folder / name)
    return folder


def _with_files(path: Path, recipe: Recipe, command: str) -> str:
    """A shell command that makes a folder, writes the recipe and its model configurations there, and runs `command`."""
    steps = ['cd "$(mktemp -d)"']
    for name in (path.name, *_configs(recipe)):
        text = (path.parent / name).read_text(encoding="utf-8")
        steps.append(f"mkdir -p {shlex.quote(str(Path(name).parent))}")
        steps.append(f"printf %s {shlex.quote(text)} > {shlex.quote(name)}")
    return " && ".join([*steps, command])


def _job_name(recipe: Recipe, command: Sequence[str]) -> tuple[str, bool]:
    """The name of a job, the same for the same work on the same root; and whether it is a round by its number."""
    verb = command[0]
    name = f"curate-{hashlib.sha256(recipe.root.encode()).hexdigest()[:8]}-{verb}"
    number = re.search(r"(?:^| )--round[ =](\d+)(?: |$)", " ".join(command[1:])) if verb == "round" else None
    return (f"{name}-r{int(number[1]):06d}", True) if number else (name, False)
