"""What a person wrote in a card survives every rendering."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_moe.hub import render_model_card
from hf_sparse_moe.hub.card_words import END, START, join, read_words
from tiny_models import tiny_sparse


REPO = "tester/card"


@pytest.fixture(scope="module")
def model():
    return tiny_sparse("bert")


@pytest.fixture(scope="module")
def card(model) -> str:
    return render_model_card(model, REPO)


def refreshed(model, *present: str, repo_id: str = REPO, **arguments) -> str:
    return render_model_card(model, repo_id, previous=present, **arguments)


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_that_nobody_edited_is_rendered_the_same(model, card):
    assert refreshed(model, card) == card
    assert refreshed(model, card, card) == card


WORDS = [
    "Words.",
    "## Thanks\n\nTo all.",
    "# A chapter\r\n\r\n```python\n# open",
    "{{ 7 * 7 }} \t",
    "<!-- free: x -->",
]


@pytest.mark.parametrize("words", WORDS)
def test_text_above_and_below_keeps_its_bytes(model, card, words):
    above = card.replace(START, f"{words}\n\n{START}")
    below = f"{card}\n{words}"
    for edited in (above, below, below.replace(f"# {REPO}\n", "# My own title\n"), below.replace(f"# {REPO}\n\n", "")):
        assert refreshed(model, edited) == edited


def test_generated_text_is_rendered_anew(model, card):
    edited = card.replace("## Details\n", "## Details\n\nA lie.\n").replace("| Class |", "| Klasse |")
    assert edited != card
    assert refreshed(model, edited) == card


def test_another_repository_s_name_goes_and_its_words_stay(model, card):
    moved = refreshed(model, f"{card}\nMine.\n", repo_id="other/name")
    assert "tester" not in moved
    assert moved == f"{render_model_card(model, 'other/name')}\nMine.\n"


def test_the_first_card_with_words_wins_unless_a_later_one_has_them_too(model, card):
    local, other, more = f"{card}\nLocal.\n", f"{card}\nOther.\n", f"{card}\nLocal.\n\nAdded on the Hub.\n"
    assert refreshed(model, card, other) == other
    assert refreshed(model, local, other) == local
    assert refreshed(model, local, more) == more
    assert refreshed(model, more, local) == more


@pytest.mark.parametrize("body", ["# By hand\n\n## Evaluation\n\nVery good.\n", "No heading, no end of line"])
def test_a_card_written_by_hand_is_kept_whole(model, body):
    by_hand = "---\nlicense: mit\nbase_model: a/b\nlibrary_name: sentence-transformers\ntags: [mine]\n"
    by_hand += f"pipeline_tag: sentence-similarity\n---\n{body}"
    once = refreshed(model, by_hand)
    assert once.split("---\n\n", 1)[1].startswith(body)
    told = metadata_of(once)
    assert (told["license"], told["base_model"], told["library_name"]) == ("mit", "a/b", "sentence-transformers")
    assert (told["pipeline_tag"], told["base_model_relation"]) == ("sentence-similarity", "finetune")
    assert told["tags"] == ["moe", "sparse-moe", "encoder", "mine"]
    assert refreshed(model, once) == once


@pytest.mark.parametrize(
    "body",
    [
        "<!-- This model card has been generated automatically according to the information the Trainer had access to."
        " You\nshould probably proofread and complete it, then remove this comment. -->\n\n# out\n",
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub.",
    ],
)
def test_a_stock_card_is_replaced(model, card, body):
    assert refreshed(model, body) == card


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ((END, ""), "needs one"),
        ((START, "<!-- gone"), "needs one"),
        ((END, f"{END}\n{START} {{}} -->\n{END}"), "needs one"),
        (('"repo_id"', '"repository"'), "changed"),
        (('{"repo_id"', '{{"repo_id"'), "changed"),
        (("tags:\n", "tags: [\n"), "not a YAML mapping"),
        (("---\n", "---\n- a\n---\n\n"), "not a YAML mapping"),
    ],
)
def test_a_damaged_card_is_refused_before_anything_is_lost(model, card, damage, words):
    assert damage[0] in card
    with pytest.raises(ValueError, match=words):
        refreshed(model, card.replace(*damage, 1))


def test_metadata_of_a_person_stays_and_derived_ones_follow_the_files(card):
    model = tiny_sparse("bert")
    edited = card.replace("---\n", "---\nwidget:\n- text: Hello\nlicense: mit\nlanguage: en\nthumbnail: a.png\n", 1)
    edited = edited.replace("tags:\n", "tags:\n- mine\n", 1).replace("pipeline_tag: fill-mask", "pipeline_tag: other")
    once = refreshed(model, edited)
    told = metadata_of(once)
    assert told["widget"] == [{"text": "Hello"}]
    assert (told["license"], told["thumbnail"], told["language"]) == ("mit", "a.png", ["en"])
    assert (told["tags"], told["pipeline_tag"]) == (["moe", "sparse-moe", "encoder", "mine"], "other")
    assert refreshed(model, once) == once
    assert metadata_of(refreshed(model, once, license="apache-2.0"))["license"] == "apache-2.0"
    model.receipt = {"source": {"name_or_path": "a/one", "revision": "1"}}
    one = refreshed(model, once)
    assert (metadata_of(one)["base_model"], metadata_of(one)["tags"][3]) == ("a/one", "upcycled")
    model.receipt = {"source": {"name_or_path": "a/two", "revision": "1"}}
    assert metadata_of(refreshed(model, one))["base_model"] == "a/two"
    told = refreshed(model, one, base_model="mine/base")
    assert metadata_of(refreshed(model, told))["base_model"] == "mine/base"
    model.receipt = {}
    assert "base_model" not in metadata_of(refreshed(model, one))


texts = st.text(st.sampled_from("# \n`-=|<>!a\r"), max_size=40)


@given(texts, texts)
@settings(max_examples=150, deadline=None)
def test_whatever_is_written_is_settled_after_one_rendering(above, below):
    fresh = join(REPO, "generated\n", {}, [])
    body = fresh.replace(START, f"{above}{START}") + below
    once = join(REPO, "generated\n", {}, [read_words(body)])
    assert join(REPO, "generated\n", {}, [read_words(once)]) == once
    assert above.strip() in once
    assert below.strip() in once
