"""The recipe: every mistake found at once, each as one line that says field, value, law and the way out."""

import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import takewhile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import UserError
from curate.recipe import Recipe, SelectionSection
from curate.recipe_file import load_recipe

HOUSE = Path(__file__).parents[1]
RECIPES = HOUSE / "jobs/recipes"
VALID = """
root = "some/root"
[pool]
path = "some/pool"
[reference]
model = "ViT-B-32"
[learner]
model = "ViT-B-16"
[selection]
sub_batch_size = 32
"""
FIVE_MISTAKES = """
root = 7
[pool]
path = "p"
on_bad_shard = "ignore"
[learner]
modle = "m"
model = "m"
[selection]
sub_batch_size = 8
filter_ratio = 1.0
"""
Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def written(*overrides: str, text: str = VALID) -> Recipe:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides)

    return written


def only_line(load: Load, *overrides: str, text: str = VALID) -> str:
    with pytest.raises(UserError) as caught:
        load(*overrides, text=text)
    (line,) = caught.value.lines
    assert "\n" not in line
    return str(line)


# --- what a good recipe becomes ----------------------------------------------------------------------------------


def test_defaults_are_filled_in(load: Load) -> None:
    recipe = load()
    assert (recipe.root, recipe.seed, recipe.pool.path) == ("some/root", 0, "some/pool")
    assert recipe.selection.model_dump() == {
        "sub_batch_size": 32,
        "filter_ratio": 0.9,
        "n_chunks": 16,
        "loss": "sigmoid",
        "criterion": "easy_reference",
        "method": "joint",
        "gain": recipe.selection.gain,
        "super_batches": None,
        "window_rows": None,
    }
    assert recipe.pool.on_bad_shard == "fail"
    assert recipe.reference is not None
    assert not recipe.reference.trusted
    assert not recipe.learner.trusted
    assert recipe.resources.address == "local"


def test_every_field_explains_itself() -> None:
    sections = [
        Recipe,
        *(type(getattr(sample(), name)) for name in ("pool", "learner", "selection", "train", "schedule")),
    ]
    for section in sections:
        for name, field in section.model_fields.items():
            table = name in {"pool", "learner", "embed", "selection", "output", "resources", "train", "schedule"}
            assert field.description or table, f"{section.__name__}.{name}"


def sample() -> Recipe:
    return Recipe.model_validate(
        {"root": "r", "pool": {"path": "p"}, "learner": {"model": "m"}, "selection": {"sub_batch_size": 32}}
    )


def test_a_resolved_recipe_cannot_be_changed(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().selection.n_chunks = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("selection.filter_ratio=0.9", lambda r: r.selection.filter_ratio == 0.9),
        ("selection.filter_ratio = 0.9", lambda r: r.selection.filter_ratio == 0.9),
        ("selection.gain=100", lambda r: r.selection.gain == 100),
        ("selection.method=uniform", lambda r: r.selection.method == "uniform"),
        ('selection.method="uniform"', lambda r: r.selection.method == "uniform"),
        ("seed=7", lambda r: r.seed == 7),
        ("root=s3://bucket/a b", lambda r: r.root == "s3://bucket/a b"),
        ("root=a=b", lambda r: r.root == "a=b"),
        ('root="a # b"', lambda r: r.root == "a # b"),
        ('pool.path=["a", "b"]', lambda r: r.pool.path == ["a", "b"]),
        ("learner.trusted=true", lambda r: r.learner.trusted is True),
        ("embed.batch_size=3", lambda r: r.embed.batch_size == 3),  # of a table that the file does not have
    ],
)
def test_set_takes_toml_and_bare_words(load: Load, override: str, value: Callable[[Recipe], bool]) -> None:
    assert value(load(override))


def test_the_last_set_wins(load: Load) -> None:
    assert load("seed=1", "seed=2").seed == 2


# --- one mistake, one line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("selection.filter_rate=0.9", ["selection.filter_rate = 0.9: unknown field; did you mean filter_ratio?"]),
        ("slection.gain=3", ["slection: unknown field; did you mean selection?"]),
        ("selection.zzz=3", ["selection.zzz = 3: unknown field; the fields here are sub_batch_size, filter_ratio"]),
        ("strategy=1", ["strategy = 1: unknown field; the fields here are root, seed"]),
        ("pool.string=1", ["pool.string = 1: unknown field; the fields here are path"]),
        ("seed=1.0", ["seed = 1.0: must be a valid integer", "draw derives from it", "the default is 0"]),
        ("seed=true", ["seed = True: must be a valid integer"]),
        ("seed=-1", ["seed = -1: must be greater than or equal to 0"]),
        ("seed=1979-05-27", ["must be a valid integer"]),
        ("learner.trusted=1", ["learner.trusted = 1: must be a valid boolean"]),
        ("selection.sub_batch_size=0", ["= 0: must be greater than or equal to 1", "correct it or use --set"]),
        ("selection.filter_ratio=1", ["= 1: must be less than 1", "the default is 0.9"]),
        ("selection.filter_ratio=-0.1", ["= -0.1: must be greater than or equal to 0"]),
        ("selection.filter_ratio=nan", ["= nan: must be"]),
        ("selection.gain=inf", ["= inf: must be a finite number"]),
        ("selection.gain=0", ["= 0: must be greater than 0"]),
        ("selection.loss=clip", ["= 'clip': must be 'sigmoid' or 'softmax'", "the default is 'sigmoid'"]),
        ("selection.n_chunks=33", ["selection.n_chunks = 33: must not exceed sub_batch_size = 32", "lower n_chunks"]),
        ("selection.sub_batch_size=8", ["selection.n_chunks = 16: must not exceed sub_batch_size = 8"]),
        ("selection.window_rows=319", ["selection.window_rows = 319: must be at least the 320 candidates", "raise it"]),
        ("resources.workers=0", ["= 0: must be greater than or equal to 1", "leave it out"]),
        ("pool.max_row_group_bytes=5", ["= 5: must be greater than or equal to 1048576", "the default is 536870912"]),
        ("pool.path=5", ["pool.path = 5: must be a path or URL, or a list", "correct it"]),
        ('pool.path=["a", 1]', ["pool.path = ['a', 1]: must be a path or URL, or a list"]),
        ("pool.path=[]", ["pool.path = []: must be", "a list of at least one"]),
        ("pool.path=", ["pool.path = '': must be a path or URL"]),
        ("reference=5", ["reference = 5: must be a table", "[reference]"]),
        ("train.data=pool", ["train.steps: must be given", "--set train.steps="]),
        ("nonsense", ["--set nonsense: expected section.field=value"]),
        ("=3", ["--set =3: expected section.field=value"]),
        ("root.x=3", ["--set root.x=3: root is a field, not a section"]),
    ],
)
def test_a_mistake_is_one_line(load: Load, override: str, expected: list[str]) -> None:
    line = only_line(load, override)
    for words in expected:
        assert words in line, line


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ('root = "some/root"', "root: must be given (where everything is written"),
        ('path = "some/pool"', "pool.path: must be given"),
        ('[learner]\nmodel = "ViT-B-16"', "learner: must be given; add [learner]"),
        ("sub_batch_size = 32", "selection.sub_batch_size: must be given"),
    ],
)
def test_what_is_missing_is_said_with_the_way_to_add_it(load: Load, removed: str, expected: str) -> None:
    assert removed in VALID
    line = only_line(load, text=VALID.replace(removed, ""))
    assert expected in line
    assert "; add" in line


def test_a_recipe_without_a_reference_is_valid_because_train_needs_none(load: Load) -> None:
    assert load(text=VALID.replace('[reference]\nmodel = "ViT-B-32"', "")).reference is None


def test_no_recipe_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UserError) as caught:
            load_recipe(path)
        (line,) = caught.value.lines
        assert line.startswith(f"{path}: expected a recipe, found none")


@pytest.mark.parametrize("data", [b"root = ", b"\xff\xfe", b"root = 1\nroot = 2\n"])
def test_not_toml(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    (line,) = caught.value.lines
    assert line.startswith(f"{path}: not valid TOML")


# --- all mistakes at once ----------------------------------------------------------------------------------------


def check_five(lines: list[str], path: Path) -> None:
    fields = [re.match(rf"{re.escape(str(path))}: ([a-z_.]+)( = .+?)?: .+; .+", line) for line in lines]
    assert [match and match[1] for match in fields] == [
        "root",
        "pool.on_bad_shard",
        "learner.modle",
        "selection.filter_ratio",
        "selection.n_chunks",  # also where another field of its section is wrong
    ], lines


def test_five_mistakes_are_five_lines(load: Load, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(text=FIVE_MISTAKES)
    check_five(list(caught.value.lines), tmp_path / "recipe.toml")


def test_five_mistakes_are_five_lines_of_the_command_line_too(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(FIVE_MISTAKES)
    command = [sys.executable, "-m", "curate.jobs.cli", "check", str(path)]
    ended = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, check=False)
    assert ended.stdout == ""
    assert ended.returncode == 2
    check_five(ended.stderr.splitlines(), path)


def test_mistakes_of_file_and_command_line_come_together(load: Load) -> None:
    with pytest.raises(UserError) as caught:
        load("nonsense", "train.beta2=2", text=FIVE_MISTAKES)
    assert len(caught.value.lines) == 7


# --- B -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "filter_ratio", "expected"),
    [
        (32768, 0.8, 163840),  # JEST
        (32768, 0.9, 327680),
        (32768, 0.5, 65536),
        (32768, 0.0, 32768),
        (128, 0.8, 640),
        (100, 0.7, 334),
        (1, 0.3, 2),
        (10, 0.99, 1000),
        (3, 0.1, 4),
    ],
)
def test_super_batch_size(b: int, filter_ratio: float, expected: int) -> None:
    assert SelectionSection(sub_batch_size=b, n_chunks=1, filter_ratio=filter_ratio).super_batch_size == expected


@given(b=st.integers(1, 10**6), thousandths=st.integers(0, 999))
def test_super_batch_size_is_the_smallest_that_discards_enough(b: int, thousandths: int) -> None:
    ratio = Fraction(thousandths, 1000)
    size = SelectionSection(sub_batch_size=b, n_chunks=1, filter_ratio=thousandths / 1000).super_batch_size
    assert 1 - Fraction(b, size) >= ratio
    assert size == b or 1 - Fraction(b, size - 1) < ratio


# --- fingerprint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "root=elsewhere",
        "resources.threads=3",
        "resources.workers=2",
        "resources.address=auto",
        "train.steps=9",
        "pool.max_dropped_share=0.2",
    ],
)
def test_the_fingerprint_ignores_what_cannot_change_a_round(load: Load, override: str) -> None:
    assert load(override).fingerprint() == load().fingerprint()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "pool.path=elsewhere",
        "pool.image=jpg",
        "pool.caption=txt",
        "pool.uid=key",
        "pool.on_bad_shard=skip",
        "reference.model=other",
        "reference.precision=bf16",
        "learner.pretrained=openai",
        "selection.sub_batch_size=64",
        "selection.filter_ratio=0.8",
        "selection.n_chunks=8",
        "selection.loss=softmax",
        "selection.criterion=hard_learner",
        "selection.method=independent",
        "selection.gain=2.5",
        "selection.super_batches=2",
        "output.file_rows=64",
        "dedup.threshold=0.95",
        "dedup.evaluation=[{path = 'a'}]",
    ],
)
def test_the_fingerprint_changes_with_everything_else(load: Load, override: str) -> None:
    assert load(override).fingerprint() != load().fingerprint()


def test_a_recipe_without_dedup_is_what_it_was_before_there_was_any(load: Load) -> None:
    assert "dedup" not in load().of_round()


def test_writing_a_default_out_changes_nothing(load: Load) -> None:
    assert load("selection.filter_ratio=0.9", "seed=0").fingerprint() == load().fingerprint()


# --- the recipes that we ship ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_recipes_load_and_agree_with_their_files(path: Path) -> None:
    recipe = load_recipe(path, ["pool.path=some/pool"])
    for encoder in (recipe.reference, recipe.learner):
        if encoder is not None and encoder.model.endswith(".json"):
            assert (path.parent / encoder.model).is_file(), encoder.model
    head = "\n".join(takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines()))
    assert f"jobs/recipes/{path.name}" in head, "a recipe begins with its command"


def test_there_are_shipped_recipes() -> None:
    assert list(RECIPES.glob("*.toml"))
