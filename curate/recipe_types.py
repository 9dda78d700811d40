"""What the fields of a recipe are made of: sections, and paths as people write them."""

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from curate.errors import UserError


class Section(BaseModel):
    """A table of the recipe. Unknown fields are mistakes, values are never coerced from another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _names_something(path: Any) -> Any:
    paths = path if isinstance(path, list) else [path]
    if not paths or not all(isinstance(p, str) and p for p in paths):
        raise PydanticCustomError("path", "must be a path or URL, or a list of at least one")
    return path


VARIABLE = re.compile(r"\$(?:\w+|\{\w+\})")


def expanded(path: str) -> str:
    """A local path with `~` replaced by the home folder, as a shell would; a URL, or anything else, as it is.

    Raises:
        UserError: there is no such home folder, or a variable, which would become a folder called `$HOME`.
    """
    if path.startswith(("http://", "https://")):  # whose queries may have a $ of their own
        return path
    if variable := VARIABLE.search(path):
        meant = os.path.expandvars(path)
        raise UserError(
            f"expected a path without variables, which nothing replaces here; found {variable[0]}; write "
            + ("what it stands for" if VARIABLE.search(meant) else meant)
        )
    if path.startswith("~") and (path := os.path.expanduser(path)).startswith("~"):
        raise UserError(f"expected a home folder for {path.split('/')[0]}, found none; write the whole path")
    return path


def expanding(prefix: str = "") -> AfterValidator:
    """Expands what a field says after a prefix, if it has it."""

    def expand(said: Any) -> Any:
        if isinstance(said, list):
            return [expand(path) for path in said]
        before = prefix if said.startswith(prefix) else ""
        try:
            return before + expanded(said.removeprefix(before))
        except UserError as error:
            raise PydanticCustomError("expanded", "{mistake}", {"mistake": str(error)}) from None

    return AfterValidator(expand)


LocalPath = Annotated[str, expanding()]
Paths = Annotated[str | list[str], BeforeValidator(_names_something), expanding()]
