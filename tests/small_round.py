"""A small complete curation, in three stages that run in this process, and all that each leaves in the root."""

import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest

from curate.errors import CurateError
from curate.jobs.drawn_pool import draw_pool
from curate.jobs.surroundings import of_the_disk
from curate.jobs.train import train
from curate.pipelines.dedup import dedup_recipe
from curate.pipelines.round import run_round
from curate.recipe import Recipe
from curate.storage import Store
from tests.faults import FaultProxy
from tests.helpers import write_tiny
from tests.stand_in import without_ray

OF_ONE_ATTEMPT = re.compile(r"events\.out|attempt-")
STAGES = ("dedup", "round", "train")
"""Each begins with what the one before it left."""
BLAMED = re.compile(
    r"the store (answered [45]|gave no usable answer)|: no usable answer for|No space left|Permission denied|quota"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and a pool."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "reference.json")
    write_tiny(folder, "learner.json", embed_dim=24)
    draw_pool(folder / "pool", rows=96, shards=2, seed=0, image_size=32, broken_share=0.05, duplicate_share=0.1)
    return folder


def recipe(world: Path, root: str, *, pool: str | None = None, logs: str | None = None, **section: Any) -> Recipe:
    """A recipe with everything in it; its pool is the world's if none is given, `section` goes to [pool]."""
    return Recipe.model_validate(
        {
            "root": root,
            "pool": {"path": pool or str(world / "pool"), "uid": "key"} | section,
            "reference": {"model": "reference.json"},
            "learner": {"model": "learner.json"},
            "dedup": {"threshold": 0.9999},
            "selection": {
                "sub_batch_size": 4,
                "n_chunks": 2,
                "filter_ratio": 0.75,
                "super_batches": 2,
                "criterion": "learnability",
            },
            "train": {"checkpoint_every": 1, "log_every": 1, "logs": logs},
        }
    )


def run_stage(stage: str, made: Recipe, world: Path, say: Callable[[str], None] = lambda line: None) -> None:
    """Do what a verb does."""
    if stage == "dedup":
        dedup_recipe(made, base=world, say=say)
    elif stage == "round":
        run_round(made, base=world, number=0, say=say)
    else:
        train(made, base=world, say=say)


def left(root: Path) -> dict[str, str]:
    """All that is to be seen in a local root, by name, each file by what it says."""
    paths = [(path.relative_to(root), path) for path in sorted(root.rglob("*")) if path.is_file()]
    return {
        str(name): what_it_says(str(name), path.read_bytes())
        for name, path in paths
        if not any(part.startswith(".") for part in name.parts) and not OF_ONE_ATTEMPT.search(path.name)
    }


def what_it_says(name: str, data: bytes) -> str:
    """A file's hash; equal where the same is said in another order or at another speed."""
    if "/checkpoint-" in name:
        (length,) = struct.unpack("<Q", data[:8])
        return str(json.loads(data[8 : 8 + length])["__metadata__"]["sha256"])
    if name.endswith("log.jsonl"):
        lines = [json.loads(line) | {"rows_per_s": 0, "data_s": 0} for line in data.splitlines()]
        data = json.dumps(lines).encode()
    return hashlib.md5(data).hexdigest()  # as S3's ETag


def published(root: str) -> dict[str, str]:
    """What a reader meets: manifests and curated files, by their hashes."""
    store = Store(root)
    folders = store.list("rounds")
    names = [name for folder in folders for name in store.list(folder) if not re.search("/(steps|attempt)-", name)]
    return {name: hashlib.sha256(store.read_bytes(name)).hexdigest() for name in names}


class Killed(BaseException):
    """As if the process were gone: nothing catches it."""


def told(act: Callable[[], None]) -> str:
    """Run a verb; how it ended: "done", "killed", or "told" in lines that blame the store or the disk."""
    try:
        act()
    except Killed:
        return "killed"
    except Exception as error:
        line = str(error) if isinstance(error, CurateError) else of_the_disk(error)
        if line is None:
            raise
        assert all(BLAMED.search(one) for one in line.splitlines()), line  # pool and root may be refused at once
        return "told"
    return "done"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage that nothing disturbed."""

    before: Path
    """The root as it found it."""
    after: dict[str, str]
    """What it left."""


@pytest.fixture(scope="module")
def stages(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    """The three stages in a local root."""
    folder = tmp_path_factory.mktemp("stages")
    root = folder / "root"
    root.mkdir()
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        for stage in STAGES:
            shutil.copytree(root, folder / stage)
            run_stage(stage, recipe(world, str(root)), world)
            found[stage] = Stage(before=folder / stage, after=left(root))
    return found


@dataclass(frozen=True, kw_only=True)
class OnS3:
    """A bucket behind a proxy that fails on demand, and what the stages did there while nothing failed."""

    world: Path
    bucket: str
    proxy: FaultProxy
    client: Any
    """Of the server behind the proxy."""
    logs: str
    after: dict[str, dict[str, str]] = field(default_factory=dict)
    """By stage what it left; what it found is there as `before-STAGE/`."""
    methods: dict[str, list[str]] = field(default_factory=dict)
    """By stage, of each of its requests."""
    mended: set[tuple[str, frozenset[tuple[str, str]]]] = field(default_factory=set)
    """By stage, states of the root from which another run left what it should."""

    def recipe(self, prefix: str) -> Recipe:
        """Bad shards are to be skipped: no failure of the store may be taken for one."""
        pool = f"s3://{self.bucket}/pool"
        return recipe(self.world, f"s3://{self.bucket}/{prefix}", pool=pool, logs=self.logs, on_bad_shard="skip")

    def run(self, stage: str, prefix: str, say: Callable[[str], None] = lambda line: None) -> None:
        run_stage(stage, self.recipe(prefix), self.world, say)

    def objects(self, prefix: str) -> dict[str, str]:
        """ETags of all objects below a prefix, by name."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{prefix}/")
        found = [item for page in pages for item in page.get("Contents", [])]
        return {item["Key"].removeprefix(f"{prefix}/"): item["ETag"].strip('"') for item in found}

    def left(self, prefix: str) -> dict[str, str]:
        """As `left` of a local root."""
        objects = self.objects(prefix).items()
        found = {name: tag for name, tag in objects if not name.startswith(".") and not OF_ONE_ATTEMPT.search(name)}
        for name in [name for name in found if "/checkpoint-" in name]:
            answer = self.client.get_object(Bucket=self.bucket, Key=f"{prefix}/{name}")
            found[name] = what_it_says(name, answer["Body"].read())
        return found

    def copy(self, source: str, target: str) -> None:
        for name in self.objects(source):
            where = {"Bucket": self.bucket, "Key": f"{source}/{name}"}
            self.client.copy_object(Bucket=self.bucket, Key=f"{target}/{name}", CopySource=where)

    def delete(self, prefix: str) -> None:
        if keys := [{"Key": f"{prefix}/{name}"} for name in self.objects(prefix)]:
            self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": keys})


@pytest.fixture
def on_s3(world: Path, faulty_s3_root: tuple[str, FaultProxy], tmp_path: Path) -> Iterator[OnS3]:
    """A bucket that holds the pool."""
    root, proxy = faulty_s3_root
    bucket = root.removeprefix("s3://").partition("/")[0]
    client = boto3.client("s3", endpoint_url=proxy.target.geturl())
    for path in sorted((world / "pool").iterdir()):
        client.upload_file(str(path), bucket, f"pool/{path.name}")
    yield OnS3(world=world, bucket=bucket, proxy=proxy, client=client, logs=str(tmp_path / "logs"))
    client.close()


@pytest.fixture
def s3_stages(on_s3: OnS3, without_ray: None) -> OnS3:
    """The three stages in a bucket."""
    for stage in STAGES:
        on_s3.copy("root", f"before-{stage}")
        on_s3.proxy.requests.clear()
        on_s3.run(stage, "root")
        on_s3.after[stage] = on_s3.left("root")
        on_s3.methods[stage] = [method for method, _ in on_s3.proxy.requests]
    return on_s3
