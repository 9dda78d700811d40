"""The house rules that a compiler would enforce: who may import whom, and what others may rely on. Read, not run."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]

FOLDERS = ["curate", "pipelines", "jobs"]
"""Each may import itself and those before it."""

ROOMS = {
    # what everything rests on; the paper's words and its algorithm, arrays alone; what the user says
    "": [
        *("errors", "messages", "seeds", "access", "storage", "sealed", "parquet", "parts", "tally"),
        *("criteria", "kernels", "logits", "jest"),
        *("recipe_types", "recipe", "recipe_file"),
    ],
    "formats": ["parquet", "arrow", "listing", "tar", "source"],
    "pool": [
        *("images", "column_types", "hive", "columns", "derived", "wanted"),
        *("shards", "inventory", "img2dataset", "reshard"),
    ],
    "models": [
        *("spec", "hub", "weights", "resolution", "words", "create"),
        *("crop", "causal", "encoder", "learners", "publish"),
    ],
    # the steps of a round, each after the files that it exchanges with others
    "embed": ["decode", "files", "room", "pieces", "loader", "shard", "run", "layouts", "taking"],
    "dedup": ["files", "grouping", "forests", "neighbours"],
    "select": ["topics", "windows", "index", "files", "standing", "draw", "load"],
    "rounds": [
        "manifest",
        "attempts",
        "write",
        "quality",
        "plan",
        "stream",
        "explain",
        "committed",
        "compare",
        "look",
        "trace",
        "pictures",
        "export",
        "travel",
        "search",
        "gc",
    ],
    "reader": ["pieces", "curated", "uniform", "evaluate"],
}
"""The folders of curate/ and their modules: each imports only modules above itself, in its own folder or before it."""

ORDER = [f"{room}.{name}".lstrip(".") for room, names in ROOMS.items() for name in names]

ONLY_IN = {
    "ray": ["pipelines/", "jobs/"],
    "huggingface_hub": ["curate/models/hub.py", "curate/models/create.py"],
    "transformers": [],
    "open_clip": [
        "curate/models/encoder.py",
        "curate/models/create.py",
        "curate/models/causal.py",
        "curate/models/words.py",
        "curate/models/publish.py",
        "curate/models/resolution.py",
        "jobs/optimize.py",
    ],
    "fsspec": ["curate/access.py", "curate/storage.py"],
    "s3fs": ["curate/access.py"],
    "botocore": ["curate/access.py"],
    "duckdb": ["curate/pool/wanted.py"],
    "boto3": [],
    "typer": ["jobs/"],
    "rich": ["jobs/", "pipelines/progress.py"],
    "pytest": [],
}

MODULES = sorted(path.relative_to(HOUSE).as_posix() for folder in FOLDERS for path in (HOUSE / folder).rglob("*.py"))


def path_of(name: str) -> str:
    """Of a module of the library."""
    return f"curate/{name.replace('.', '/')}.py"


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((HOUSE / module).read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """Dotted names of all that a module imports, wherever in it: `curate.pool.shards`, `ray.data`, `jobs.cli`."""
    for name in imported(module):
        assert name.partition(".")[0] not in FOLDERS[1:], f"{module}: {name}; write curate.{name}, as others must"
        ours = name.startswith(tuple(f"curate.{folder}" for folder in FOLDERS[1:]))
        yield name.removeprefix("curate.") if ours else name


def imported(module: str) -> Iterator[str]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import; write the whole name"
            if (HOUSE / str(node.module).replace(".", "/")).is_dir():  # from curate import storage
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def calls(module: str) -> Iterator[str]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


def public_names(module: str) -> list[str]:
    found = []
    for node in tree(module).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.append(name)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found.append(name)
    return sorted(name for name in found if not name.startswith("_"))


def test_there_is_something_to_look_at() -> None:
    assert {"curate/jest.py", "pipelines/round.py", "jobs/cli.py"} <= set(MODULES)
    assert "ray.data" in set(imports("pipelines/embed.py"))
    assert "curate.storage" in set(imports("curate/pool/shards.py"))  # from curate import storage
    assert "pipelines.round" in set(imports("jobs/cli.py"))  # within a function


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_from_jobs_to_pipelines_to_curate(module: str) -> None:
    folder = module.partition("/")[0]
    forbidden = set(FOLDERS[FOLDERS.index(folder) + 1 :]) | {"tests", "benchmarks"}
    assert not [name for name in imports(module) if name.partition(".")[0] in forbidden]


def test_every_module_of_the_library_has_its_place_in_the_order() -> None:
    assert len(ORDER) == len(set(ORDER))
    doors = {f"curate/{room}/__init__.py".replace("//", "/") for room in ROOMS}
    assert {path_of(name) for name in ORDER} | doors == {m for m in MODULES if m.startswith("curate/")}


@pytest.mark.parametrize("name", ORDER)
def test_within_the_library_imports_go_upward(name: str) -> None:
    above = ORDER[: ORDER.index(name)]
    ours = [found.partition(".")[2] for found in imports(path_of(name)) if found.partition(".")[0] == "curate"]
    assert not [found for found in ours if found not in above]


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_where_it_belongs(library: str) -> None:
    users = [module for module in MODULES if library in {name.partition(".")[0] for name in imports(module)}]
    assert not [module for module in users if not module.startswith(tuple(ONLY_IN[library]) or ("nowhere",))]


AT_ONCE = ["recipe", "pool.inventory", "pool.reshard", "rounds.manifest", "models.learners", "select.windows"]


@pytest.mark.parametrize("name", [*AT_ONCE, "dedup.files", "rounds.explain"])
def test_what_answers_at_once_does_not_load_torch(name: str) -> None:
    seen, todo = set[str](), [path_of(name)]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += [f"{found.replace('.', '/')}.py" for found in imports(module) if found.startswith("curate.")]
    heavy = {(module, found) for module in seen for found in imports(module)}
    assert not {(module, found) for module, found in heavy if found.partition(".")[0] in {"torch", "open_clip"}}


def test_one_module_at_most_imports_faiss() -> None:
    assert len([module for module in MODULES if "faiss" in {name.partition(".")[0] for name in imports(module)}]) <= 1


SHOWS = "pipelines/progress.py"
"""The one module, beside the command line's, that writes to a terminal."""


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("jobs/") and m != SHOWS])
def test_the_library_does_not_print(module: str) -> None:
    assert "print" not in set(calls(module))
    assert "sys" not in set(imports(module)), "no argv, no exit"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_read_in_one_sitting(module: str) -> None:
    lines = (HOUSE / module).read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 400


@pytest.mark.parametrize("module", [module for module in MODULES if (HOUSE / module).stat().st_size])
def test_a_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(tree(module))


# --- what others rely on: change it knowingly --------------------------------------------------------------------


def test_the_package_exports() -> None:
    (exported,) = [
        ast.literal_eval(node.value)
        for node in tree("curate/__init__.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert exported == ["CuratedReader", "publish_learner"]


def test_the_selection_exports() -> None:
    assert [name for name in public_names("curate/jest.py") if not name.isupper()] == [
        "Embeddings",
        "SubBatch",
        "diagonal_losses",
        "jointly_sample_batch",
        "sub_batch_learnability",
        "sub_batch_loss",
    ]


def test_the_command_line_has_these_verbs() -> None:
    from curate.jobs.cli import app

    functions = {command.name or command.callback.__name__: command.callback for command in app.registered_commands}
    assert " ".join(functions) == (
        "init check round dedup train open-clip rounds embeddings show search report export reshard gc submit"
    )
    assert all(function.__doc__ for function in functions.values())


def test_exit_statuses() -> None:
    statuses = {}
    for node in tree("curate/errors.py").body:
        assert isinstance(node, ast.ClassDef | ast.Expr)
        if isinstance(node, ast.ClassDef):
            own = [ast.literal_eval(n.value) for n in node.body if isinstance(n, ast.Assign)]
            base = ast.unparse(node.bases[0])
            statuses[node.name] = own[0] if own else statuses[base]
    assert statuses == {
        "CurateError": 1,
        "UserError": 2,
        "DamagedError": 2,
        "InputChangedError": 2,
        "ShardDamagedError": 2,
        "StoreError": 1,
        "ClusterError": 1,
        "RowsLostError": 1,
        "StreamStalledError": 1,
        "CommitConflictError": 3,
        "CommitUnknownError": 1,
    }
