"""The helper that leaves cases out leaves no pair out."""

from itertools import combinations, product

import pytest

from pairwise import pairwise


@pytest.mark.parametrize("strength", [1, 2])
def test_what_has_to_occur_occurs(strength):
    values = (["a", "b", "c"], [1, 2, 3, 4], [True, False])
    cases = pairwise("letter,number,flag", *values, strength=strength).args[1]
    assert [case.values for case in cases] == list(product(*values))
    kept = [case.values for case in cases if not case.marks]
    for places in combinations(range(3), strength):
        wanted = set(product(*(values[place] for place in places)))
        assert {tuple(row[place] for place in places) for row in kept} == wanted
    assert len(kept) <= {1: 4, 2: 14}[strength]
