"""The mutants of tests/mutate.py still find what they take away."""

import pytest

from tests.mutate import HOUSE, MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_safeguard_is_where_the_mutant_looks(mutant: Mutant) -> None:
    assert mutant.old in (HOUSE / mutant.file).read_text(encoding="utf-8")
    assert all(
        (HOUSE / word.partition("::")[0]).is_file() for word in mutant.tests.split() if word.startswith("tests/")
    )
