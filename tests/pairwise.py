"""Fewer cases than the full product of parameters, which `make conformance` runs."""

from itertools import combinations, product

import pytest


def pairwise(names: str, *values: list, strength: int = 2) -> pytest.MarkDecorator:
    """
    Parametrise a test by the product of `values`. Cases beyond those in which each pair of two parameters' values
    occurs (with `strength=1`: each value) are marked `conformance`.
    """
    values = [list(each) for each in values]
    places = list(combinations(range(len(values)), strength))

    def parts(case: tuple[int, ...]) -> set:
        return {(place, tuple(case[axis] for axis in place)) for place in places}

    cases = list(product(*(range(len(each)) for each in values)))
    missing, chosen = set().union(*map(parts, cases)), set()
    while missing:
        best = max(cases, key=lambda case: len(parts(case) & missing))
        missing -= parts(best)
        chosen.add(best)
    marks = {False: [pytest.mark.conformance], True: []}
    rows = [[each[place] for each, place in zip(values, case, strict=True)] for case in cases]
    cases = [pytest.param(*row, marks=marks[case in chosen]) for row, case in zip(rows, cases, strict=True)]
    return pytest.mark.parametrize(names, cases)
