"""The definitions, against counts by hand and against chance."""

import base64

import numpy as np
import pytest

from hf_sparse_moe.insight.definitions import (
    coactivation,
    lift,
    mutual_information,
    order_by_similarity,
    saturation,
    tokens_by_lift,
)
from hf_sparse_moe.insight.packing import pack_integers, pack_shares
from insight.synthetic import synthetic


def own_experts(generator, group):
    """Each group has two of four experts to itself."""
    return 2 * group + generator.integers(0, 2, len(group))


def test_lift_by_hand():
    counts = np.zeros((2, 2, 2))
    counts[0, 0], counts[1, 1] = [3, 1], [20, 60]  # groups of other sizes count the same
    point, low, high = lift(counts)
    np.testing.assert_allclose(point, [[0.75 / 0.5, 0.25 / 0.5], [0.25 / 0.5, 0.75 / 0.5]])
    assert np.isnan(low).all()  # two texts say nothing of others
    assert np.isnan(high).all()


def test_the_interval_holds_the_true_lift():
    """Of texts drawn from one distribution: in about 95 of 100 draws."""
    generator, true, held = np.random.default_rng(0), np.array([0.5, 0.3, 0.2]), 0
    for _ in range(60):
        counts = np.zeros((40, 2, 3))
        for text in range(40):
            counts[text, text % 2] = generator.multinomial(50, true if text % 2 else true[::-1])
        _, low, high = lift(counts)
        expected = true / ((true + true[::-1]) / 2)
        held += sum(bool(low[1, e] <= expected[e] <= high[1, e]) for e in (0, 2))
    assert held >= 0.85 * 120


def test_mutual_information_knows_chance():
    same = synthetic(tokens=2000, texts=40).facts[0]
    parted = synthetic(tokens=2000, texts=40, choose=own_experts, top_k=1).facts[0]
    assert not same.is_specialised
    assert not any(same.serves(expert) for expert in range(4))
    assert parted.information > 0.5 > 0.1 > parted.chance
    assert parted.is_specialised
    assert parted.serves(0) == [0]
    assert parted.serves(3) == [1]


def test_groups_within_a_text_are_shuffled_within_it():
    generator = np.random.default_rng(1)
    counts = generator.multinomial(30, np.full(3, 1 / 3), size=(30, 2)).astype(float)
    found, chance = mutual_information(counts)
    assert found < chance
    counts[:, 0], counts[:, 1] = [30, 0, 0], [0, 15, 15]
    found, chance = mutual_information(counts)
    assert found > 10 * chance


def test_tokens_by_lift_by_hand():
    layer = synthetic(layers=1, experts=2, tokens=8, top_k=1, texts=1, groups=1).measurement.layers[0]
    layer.index = np.array([[0], [0], [0], [1], [1], [1], [0], [1]])
    ids = np.array([5, 5, 5, 7, 7, 7, 9, 9])
    assert tokens_by_lift(layer, ids, 3) == [[(5, 2.0, 3)], [(7, 2.0, 3)]]
    assert tokens_by_lift(layer, np.full(8, -1), 3) == [[], []]


def test_coactivation_by_hand():
    layer = synthetic(experts=3, tokens=4, texts=1).measurement.layers[0]
    layer.index = np.array([[0, 1], [0, 2], [1, 0], [2, -1]])
    expected = [[np.nan, 2 / 3, 1 / 3], [1, np.nan, 0], [1 / 2, 0, np.nan]]
    np.testing.assert_allclose(coactivation(layer), expected)
    layer.index = layer.index[:, :1]
    assert coactivation(layer) is None


def test_saturation_by_hand():
    assert saturation(np.array([[0, 1], [2, -1]]), np.array([[1, 3], [2, 0]])) == pytest.approx(2 / 3)


def test_similar_experts_stand_side_by_side():
    family = np.array([0, 1, 0, 1, 0, 1])
    order = order_by_similarity(np.where(family[:, None] == family, 0.9, 0.1))
    assert family[order].tolist() in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])


def test_packed_arrays_come_back():
    for most in (7, 254, 255, 999):
        array = np.array([[0, most], [-1, 3]])
        packed = pack_integers(array)
        assert packed["bytes"] == (1 if most < 255 else 2)
        back = np.frombuffer(base64.b64decode(packed["data"]), dtype=f"<u{packed['bytes']}").astype(int).reshape(2, 2)
        assert np.where(back == 256 ** packed["bytes"] - 1, -1, back).tolist() == array.tolist()
    shares = np.array([0.0, 0.5, 2.5, np.nan, -0.2])
    packed = pack_shares(shares)
    back = np.frombuffer(base64.b64decode(packed["data"]), dtype="u1") * packed["scale"]
    np.testing.assert_allclose(back[:3], shares[:3], atol=2.5 / 254)
    assert np.frombuffer(base64.b64decode(packed["data"]), dtype="u1")[3:].tolist() == [255, 255]
