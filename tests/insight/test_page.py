"""What the page says and leaves out, whatever the size."""

import re

import numpy as np
import pytest

from insight.synthetic import synthetic
from insight.test_definitions import own_experts


def test_a_large_model_fits():
    page = synthetic(layers=48, experts=128, tokens=2000, top_k=8, texts=60, groups=10).to_html()
    assert len(page.encode()) < 5e6
    assert "of 6144 experts" in page
    assert "data-e" in page


def test_heads_of_the_verdict():
    def heads(**made):
        return {claim.head for claim in synthetic(tokens=4000, layers=1, **made).verdict}

    assert {"Balanced", "No dead expert:", "Not specialised by group:"} <= heads(texts=40)
    assert "Specialised by group" in heads(texts=40, choose=own_experts)
    assert "One group of text:" in heads(groups=1)
    collapsed = heads(experts=8, choose=lambda _, group: np.zeros_like(group))
    assert {"Collapsed", "6 dead experts"} <= collapsed


def test_few_choices_are_said():
    page = synthetic(tokens=20, texts=5, experts=32).to_html()
    assert "too few to tell it from chance" in page


def test_every_claim_leads_to_a_figure():
    page = synthetic(choose=own_experts).to_html()
    ids = set(re.findall(r'id="([^"]+)"', page))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= ids


@pytest.mark.parametrize(("groups", "said"), [(2, None), (40, "16 largest of 40 groups")])
def test_groups_left_out_are_said(groups, said):
    page = synthetic(tokens=800, texts=80, groups=groups).to_html()
    assert (said in page) if said else ("largest of" not in page)
