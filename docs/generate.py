"""Pages that are made from the code: the recipe, field by field, and the verbs, as their `--help` has them."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from curate.jobs.cli import app
from curate.recipe import Recipe

BOUNDS = {"Ge": ("ge", "≥"), "Gt": ("gt", ">"), "Le": ("le", "≤"), "Lt": ("lt", "<")}


def write_pages(folder: Path) -> None:
    """Write `recipe.md` and `verbs.md`; twice is the same as once."""
    folder.mkdir(exist_ok=True)
    for name, lines in (("recipe", recipe_lines()), ("verbs", verb_lines())):
        text = "\n".join(lines) + "\n"
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def recipe_lines() -> Iterator[str]:
    """The recipe, section by section."""
    yield "# The recipe"
    yield ""
    yield (
        "A recipe is one TOML file. Any field can be set on the command line as well, as in "
        "`--set selection.filter_ratio=0.9`. `curate init POOL` writes a recipe from what lies in a pool, and "
        "`curate check` says all that is wrong with one."
    )
    yield ""
    yield from _fields("", Recipe)
    for name, field in Recipe.model_fields.items():
        if (model := _model(field.annotation)) is not None:
            yield f"## [{name}]"
            yield ""
            if model.__doc__:
                yield _sentence(model.__doc__)
                yield ""
            yield from _fields(name, model)
    yield from _inner(Recipe, set())


def _inner(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """Tables within sections, such as an evaluation set."""
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            if inner in seen:
                continue
            seen.add(inner)
            if model is not Recipe:
                yield f"## A table of {name}"
                yield ""
                yield from _fields(name, inner)
            yield from _inner(inner, seen)


def _fields(section: str, model: type[BaseModel]) -> Iterator[str]:
    notes = _comments(model)
    for name, field in model.model_fields.items():
        if not section and _model(field.annotation) is not None:
            continue
        yield f"`{name}`"
        facts = ", ".join([_type(field.annotation), *_bounds(field), _default(field)])
        reasons = " ".join(_sentence(text) for text in [field.description or "", notes.get(name, "")] if text)
        yield f": {facts}: {reasons}"
        yield ""


def _comments(model: type[BaseModel]) -> dict[str, str]:
    """By field what the code says above it: as a rule, what was measured to choose its default."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(model).splitlines():
        if re.match(r"    # ", line):
            above.append(line.strip("# "))
            continue
        if match := re.match(r"    (\w+): ", line):
            found[match[1]] = " ".join(above)
        above = []
    return found


def _type(annotation: Any) -> str:
    """A type as a recipe's author thinks of it."""
    if get_origin(annotation) is Literal:
        return " or ".join(f'`"{value}"`' for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        kinds = [_type(kind) for kind in get_args(annotation) if kind is not type(None)]
        return " or ".join(dict.fromkeys(kinds))
    if get_origin(annotation) is not None and hasattr(annotation, "__metadata__"):
        return _type(get_args(annotation)[0])
    if get_origin(annotation) in (list, tuple):
        return f"list of {_type(get_args(annotation)[0])}"
    names = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", Path: "path"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(field: FieldInfo) -> Iterator[str]:
    for one in field.metadata:
        if type(one).__name__ in BOUNDS:
            attribute, sign = BOUNDS[type(one).__name__]
            yield f"{sign} {getattr(one, attribute):g}"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "not given by default"
    if isinstance(value, BaseModel):
        return "a table"
    if isinstance(value, bool):
        return f"default `{str(value).lower()}`"
    shown = f'"{value}"' if isinstance(value, str) else list(value) if isinstance(value, tuple) else value
    return f"default `{shown}`"


def _model(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of the recipe is."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "?", "!")) else f"{text}."


def verb_lines() -> Iterator[str]:
    """The verbs, as `--help` has them."""
    yield "# The verbs"
    yield ""
    yield (
        "Exit status: 0 done, 1 failed, 2 a mistake in recipe or input, 3 somebody else committed this round. "
        "What a command answers goes to stdout, all else to stderr."
    )
    yield ""
    command = typer.main.get_command(app)
    for name, verb in command.commands.items():  # type: ignore[attr-defined]
        yield f"## curate {name}"
        yield ""
        context = verb.make_context(f"curate {name}", [], resilient_parsing=True)
        context.max_content_width = 100
        yield "```text"
        yield re.sub(r"^(Usage: )(?:\S+ )*?curate ", r"\1curate ", verb.get_help(context)).strip()
        yield "```"
        yield ""
