"""Remove one safeguard at a time; a test must turn red, or nothing holds that safeguard.

    python -m tests.mutate [WORD …]      all, or those whose name holds a word; exit status 1 if one survives

Each mutant is a copy of the tree in a temporary folder, in which one piece of text is replaced and the tests run that
are to notice it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HOUSE = Path(__file__).parents[1]
COPIED = (
    "curate",
    "pipelines",
    "jobs",
    "tests",
    "benchmarks",
    "docs",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
)


@dataclass(frozen=True)
class Mutant:
    """A safeguard that is taken away."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    """As pytest's command line names them."""


STORAGE, FAULTS = "tests/test_storage.py", "tests/test_faults.py"
DAMAGE = "tests/test_damage.py -k some_damage"
CRASH = "tests/test_crash.py::test_a_crash_or_an_error_at_each_operation"
MUTANTS = [
    # publication
    Mutant(
        "exclusive link",
        "curate/storage.py",
        "os.link(temporary, path)",
        "_looked(temporary, path)",
        f"{STORAGE} -k held_up",
    ),
    Mutant(
        "put_file syncs content", "curate/storage.py", "            _sync(local_path)\n", "", f"{STORAGE} -k reaches"
    ),
    Mutant(
        "put_file syncs its folder",
        "curate/storage.py",
        "            os.replace(local_path, path)\n            _sync(os.path.dirname(path))",
        "            os.replace(local_path, path)",
        f"{STORAGE} -k reaches",
    ),
    Mutant(
        "new folders are synced",
        "curate/storage.py",
        "        _sync(os.path.dirname(path))\n\n\n@",
        "\n\n@",
        f"{STORAGE} -k reaches",
    ),
    Mutant("conditional write", "curate/storage.py", ', mode="create")', ")", f"{STORAGE} -k other_bytes"),
    Mutant(
        "probe",
        "curate/storage.py",
        'self.put_if_absent(name, b"second")\n                raise',
        "raise CommitConflictError\n                raise",
        f"{STORAGE} -k probe",
    ),
    Mutant(
        "configuration last",
        "curate/models/encoder.py",
        "key=lambda path: path.name == CONFIG_NAME",
        "key=lambda path: path.name != CONFIG_NAME",
        "tests/test_encoder.py -k stored_last",
    ),
    Mutant(
        "rows are conserved",
        "curate/rounds/manifest.py",
        "check_chain([*self.tallies, written], rows=self.pool_rows)",
        "pass",
        "tests/test_manifest.py",
    ),
    Mutant(
        "cells say that their counts are there",
        "pipelines/neighbours.py",
        "if read_cells(store, folder) is None:",
        'if not store.exists(f"{folder}/counts.json"):',
        f"{CRASH}[dedup]",
    ),
    Mutant(
        "forests that share a row are joined",
        "curate/dedup/forests.py",
        "        above[roots] = roots[best_connected(number, number[forest.head], len(roots))]",
        "        pass",
        "tests/test_forests.py -k bucket",
    ),
    Mutant(
        "what was grouped by other pairs goes with them",
        "curate/dedup/files.py",
        "[account, *grouped, *parts,",
        "[account, *parts,",
        "tests/test_forests.py -k damaged_file",
    ),
    Mutant(
        "pairs say that a task is done",
        "pipelines/neighbours.py",
        "if pairs_name(folder, task) not in there",
        "if nodes_name(folder, task) not in there",
        f"{CRASH}[dedup]",
    ),
    Mutant(
        "a learner that is due is published by the next run",
        "jobs/train.py",
        "        self._publish_due()\n        source:",
        "        source:",
        f"{CRASH}[train]",
    ),
    Mutant(
        "read back before the commit",
        "pipelines/write.py",
        "if found != file.sha256:",
        "if False:",
        "tests/test_damage.py -k before_the_commit",
    ),
    # what is read
    Mutant(
        "page checksums of our files",
        "curate/parquet.py",
        "page_checksum_verification=True) as parquet",
        "page_checksum_verification=False) as parquet",
        "tests/test_reader.py -k flipped_bit",
    ),
    Mutant(
        "page checksums are written",
        "curate/parquet.py",
        '{"write_page_checksum": True}',
        "{}",
        "tests/test_reader.py -k flipped_bit",
    ),
    Mutant(
        "seals",
        "curate/sealed.py",
        "if (found := _hash(record)) != expected:",
        "if not (found := _hash(record)):",
        DAMAGE,
    ),
    Mutant(
        "cells carry a hash",
        "curate/dedup/files.py",
        "if hashlib.sha256(array).digest() != digest:",
        "if False:",
        "tests/test_dedup.py -k cells_that_changed",
    ),
    Mutant(
        "schemas are compared",
        "curate/parquet.py",
        "if schema is not None and parquet.schema_arrow != schema:",
        "if False:",
        "tests/test_damage.py -k all_damage",
    ),
    Mutant(
        "parts carry a checksum",
        "curate/parts.py",
        'if zlib.crc32(part) != entry["crc"]:',
        "if False:",
        "tests/test_parts.py",
    ),
    Mutant(
        "weights are hashed",
        "curate/models/encoder.py",
        "if found != spec.weights_sha256:",
        "if False:",
        "tests/test_encoder.py -k changed_in_the_root",
    ),
    Mutant(
        "checkpoints are hashed",
        "jobs/checkpoint.py",
        'if _sha256(metadata["progress"], tensors) != metadata["sha256"]:',
        "if False:",
        "tests/test_damage.py -k checkpoint",
    ),
    Mutant(
        "shards are those of the inventory",
        "curate/pool/shards.py",
        "if (found.size, version) != (shard.size, shard.version):",
        "if False:",
        "tests/test_pool.py tests/test_embed.py",
    ),
    Mutant(
        "rows are those that were embedded",
        "curate/rounds/write.py",
        "if content_hash(image, caption) != expected:",
        "if False:",
        "tests/test_write.py",
    ),
    Mutant(
        "rounds follow their parent",
        "curate/reader/curated.py",
        "if (manifest.parent, manifest.first_batch) != (parent, stop):",
        "if False:",
        "tests/test_reader.py",
    ),
    # whose fault it is
    Mutant("short reads", "curate/access.py", "if len(data) != wanted:", "if False:", f"{FAULTS} -k short"),
    Mutant(
        "a store is not taken for a bad file",
        "curate/pool/inventory.py",
        "    except CurateError:\n        raise  # the store",
        "    except MemoryError:\n        raise  # the store",
        f"{FAULTS} -k footer",
    ),
    Mutant(
        "retries", "curate/access.py", "if time.monotonic() + pause_s > deadline:", "if True:", f"{FAULTS} -k footer"
    ),
    # models
    Mutant(
        "no unpickling",
        "curate/models/create.py",
        "if path.suffix not in NEVER_UNPICKLED and not trusted:",
        "if False:",
        "tests/test_encoder.py -k pickle_that",
    ),
    Mutant(
        "fill colour",
        "curate/models/encoder.py",
        'return {"model_cfg": config, "preprocess_cfg": always | others}',
        'return {"model_cfg": config, "preprocess_cfg": always}',
        "tests/test_encoder.py -k source_sees",
    ),
    Mutant(
        "finite weights",
        "curate/models/encoder.py",
        "    if broken:\n",
        "    if False:\n",
        "tests/test_encoder.py -k finite",
    ),
    Mutant(
        "the hub is given up on",
        "curate/models/hub.py",
        "with without_hub() if reason else contextlib.nullcontext():",
        "with contextlib.nullcontext():",
        "tests/test_hub.py -k nobody_asks",
    ),
    # rows
    Mutant(
        "rows that are not finite are never drawn",
        "curate/jest.py",
        "keys.masked_fill_(~keys.isfinite() | gone[:-1], -math.inf)",
        "keys.nan_to_num_(math.inf).masked_fill_(gone[:-1], -math.inf)",
        "tests/test_jest.py",
    ),
    Mutant("limits of restarts", "pipelines/embed.py", "            **RETRIES,\n", "", f"{FAULTS} -k limits"),
    Mutant(
        "finished shards are not embedded again",
        "pipelines/embed.py",
        "if not self.store.exists(name := embedding_name(sha, shard, scope))",
        "if (name := embedding_name(sha, shard, scope))",
        "tests/test_embed.py -k takes_over",
    ),
    Mutant(
        "rows that hang",
        "curate/embed/decode.py",
        "if not pipe.poll(self._deadline_s):",
        "if False:",
        "tests/test_decode.py -k named --timeout 60",
    ),
    Mutant(
        "captions are text",
        "jobs/page.py",
        "autoescape=True",
        "autoescape=False",
        "tests/test_dedup.py -k obeys",
    ),
    Mutant(
        "near-duplicates alarm",
        "pipelines/round.py",
        "if recipe.dedup is not None and near > recipe",
        "if recipe.dedup is not None and near < 0 * recipe",
        "tests/test_stopped.py",
    ),
]
LOOKED = """

def _looked(temporary: str, path: str) -> None:
    if os.path.exists(path):
        raise FileExistsError(path)
    os.replace(temporary, path)
    open(temporary, "wb").close()
"""


def main() -> int:
    """Try mutants; returns the number of those that no test noticed."""
    words = sys.argv[1:]
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    survivors = 0
    for mutant in chosen:
        began = time.monotonic()
        noticed = try_mutant(mutant)
        survivors += not noticed
        print(f"{'red' if noticed else 'SURVIVES':9} {time.monotonic() - began:4.0f} s  {mutant.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} turn a test red")
    return survivors


def try_mutant(mutant: Mutant) -> bool:
    """Whether a test fails without the safeguard."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        for name in COPIED:
            copy = shutil.copytree if (HOUSE / name).is_dir() else shutil.copy
            copy(HOUSE / name, Path(folder) / name)
        path = Path(folder) / mutant.file
        text = path.read_text(encoding="utf-8")
        assert text.count(mutant.old) >= 1, f"{mutant.name}: {mutant.file} does not hold {mutant.old!r}"
        mutated = text.replace(mutant.old, mutant.new, 1) + (LOOKED if "_looked" in mutant.new else "")
        path.write_text(mutated, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": folder},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1):  # a test that could not run noticed nothing
            print(done.stdout[-2000:], done.stderr[-500:])
        return done.returncode == 1


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
