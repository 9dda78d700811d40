"""The recipe's file, in TOML: all mistakes are reported at once, and any field can be set on the command line.

As in `--set selection.filter_ratio=0.9`.
"""

import difflib
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from curate.errors import UserError
from curate.recipe import Recipe
from curate.recipe_types import Section


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: the TOML file.
        overrides: `section.field=value`, the value in TOML; a bare word is a string.

    Raises:
        UserError: one line per mistake, all of them at once.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows begin a file with a mark
    except OSError as error:
        raise UserError(
            f"{path}: expected a recipe, found none ({error.strerror}); give the path of a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}; mend that line") from None
    mistakes = [line for text in overrides if (line := _override(data, text))]
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        mistakes += [_line(path, details) for details in error.errors(include_url=False)]
    if mistakes:
        raise UserError(*mistakes)
    return recipe


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables, each by its dotted name.

    >>> dict(flat({"pool": {"uid": "key"}, "seed": 0}))
    {'pool.uid': 'key', 'seed': 0}
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}".lstrip("."))
    else:
        yield name, value


def _override(data: dict[str, Any], text: str) -> str | None:
    """Set one field in `data`; return a line if the text is not an override."""
    name, equals, value = text.partition("=")
    *tables, field = name.strip().split(".")
    if not equals or not field:
        return f"--set {text}: expected section.field=value, as in --set selection.filter_ratio=0.9"
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            return f"--set {text}: {table} is a field, not a section; name the field itself"
    try:
        data[field] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        data[field] = value.strip()
    return None


def _line(path: Path, details: ErrorDetails) -> str:
    """One mistake: field, value, law and the way out."""
    names = [str(part) for part in details["loc"]]
    name, kind, value = ".".join(names), details["type"], details["input"]
    known = _section(names[:-1]).model_fields
    found = "" if kind == "missing" or value is None or isinstance(value, dict) else f" = {value!r}"
    where = f"{path}: {name}{found}"
    if kind in {"chunks", "window", "steps", "templates", "expanded", "approximate_share"}:
        return f"{where}: {details['msg']}"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(names[-1], known, n=1)
        way_out = f"did you mean {near[0]}?" if near else f"the fields here are {', '.join(known)}"
        return f"{where}: unknown field; {way_out}"
    field = known.get(names[-1])
    meaning = f" ({field.description})" if field and field.description else ""
    if kind == "missing":
        if names[-2:-1] and names[-2].isdecimal():
            return f"{where}: must be given{meaning}; add it below [[{'.'.join(names[:-2])}]]"
        way_out = f"add [{name}]" if _section(names) is not _section(names[:-1]) else f"add it or use --set {name}=…"
        return f"{where}: must be given{meaning}; {way_out}"
    if kind == "model_type":
        return f"{where}: must be a table{meaning}; write its fields below [{name}]"
    law = details["msg"].replace("Input should be", "must be").replace("Input should have", "must have")
    way_out = f"correct it or use --set {name}=…"
    if field and not field.is_required():
        default = field.get_default()
        way_out = "correct it or leave it out" if default is None else f"the default is {default!r}"
    return f"{where}: {law}{meaning}; {way_out}"


def _section(names: Sequence[str]) -> type[Section]:
    """The model class of the table that `names` leads to."""
    section: type[Section] = Recipe
    for name in names:
        field = section.model_fields.get(name)
        options = typing.get_args(field.annotation) if field else ()
        found = [
            o
            for o in (*options, field.annotation if field else None)
            if isinstance(o, type) and not isinstance(o, types.GenericAlias) and issubclass(o, Section)
        ]
        if not found:
            break
        section = found[0]
    return section
