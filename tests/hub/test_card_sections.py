"""What a person wrote in a card survives every rendering, byte for byte."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_moe.hub import render_model_card
from hf_sparse_moe.hub.card_sections import keep_free_sections, split_front_matter, split_sections
from tiny_models import tiny_sparse


REPO = "tester/card"
FREE_SECTIONS = ("summary", "intended-use", "limits", "notes")


@pytest.fixture(scope="module")
def model():
    return tiny_sparse("bert")


@pytest.fixture(scope="module")
def card(model) -> str:
    return render_model_card(model, REPO)


def refreshed(model, present: str, **arguments) -> str:
    return render_model_card(model, REPO, previous=[present], **arguments)


def write_free(card: str, name: str, text: str) -> str:
    start, end = f"<!-- free: {name} -->", f"<!-- /free: {name} -->"
    before, _, rest = card.partition(start)
    return before + start + text + end + rest.partition(end)[2]


def test_a_card_that_nobody_edited_is_rendered_the_same(model, card):
    assert refreshed(model, card) == card


@pytest.mark.parametrize("name", FREE_SECTIONS)
@pytest.mark.parametrize(
    "text",
    [
        "\nMy words.\n",
        "",
        "\r\nFrom another\r\nsystem.\r\n",
        "\n## How to load\n\n```python\n# open\n",
        "\n{{ 7 * 7 }} \t\n",
    ],
)
def test_free_sections_keep_their_bytes(model, card, name, text):
    edited = write_free(card, name, text)
    assert refreshed(model, edited) == edited


def test_generated_text_is_rendered_anew(model, card):
    edited = card.replace("| Variant | encoder |", "| Variant | decoder |").replace(
        "## Export\n", "## Export\n\nA lie.\n"
    )
    assert refreshed(model, edited) == card


THEIR_SECTIONS = [
    "## Thanks\n\nTo all.\n\n",
    "## Thanks ##\n\n```bash\n## Export\n```\n\n",
    "# A chapter\n\n### With a part\n\n- and  a\tlist\n\n",
    "Underlined\n----------\n\nText.\n\n",
    "## Mine\r\n\r\nFrom another system.\r\n\r\n",
]


@pytest.mark.parametrize("text", THEIR_SECTIONS)
@pytest.mark.parametrize("before", ["## Intended use\n", "## Evaluation\n", "## Notes\n"])
def test_sections_of_their_own_stay_where_they_are(model, card, text, before):
    edited = card.replace(before, text + before)
    assert refreshed(model, edited) == edited


@pytest.mark.parametrize("text", THEIR_SECTIONS)
def test_a_section_at_the_end_stays(model, card, text):
    assert refreshed(model, card + text) == card + text
    cut = text.rstrip()
    once = refreshed(model, card + cut)
    assert once.rstrip() == card + cut
    assert refreshed(model, once) == once


def test_a_free_section_of_their_own_stays(model, card):
    own = "<!-- free: mine -->\nWords.\n<!-- /free: mine -->\n"
    once = refreshed(model, card.replace("## Export\n", f"## Export\n\n{own}"))
    assert once == card + own
    assert refreshed(model, once) == once


def test_another_repository_s_title_goes_and_its_words_stay(model, card):
    edited = write_free(card, "notes", "\nMine.\n")
    moved = render_model_card(model, "other/name", previous=[edited])
    assert "tester" not in moved
    assert moved == write_free(render_model_card(model, "other/name"), "notes", "\nMine.\n")


def test_the_first_card_that_has_something_wins(model, card):
    local = write_free(card, "notes", "\nlocal\n")
    remote = write_free(write_free(card, "notes", "\nremote\n"), "limits", "\nremote\n") + "## Thanks\n\nTo all.\n"
    both = render_model_card(model, REPO, previous=[local, remote])
    assert both == write_free(local, "limits", "\nremote\n") + "## Thanks\n\nTo all.\n"


@pytest.mark.parametrize("body", ["# By hand\n\n## Evaluation\n\nVery good.\n", "No heading, no end of line"])
def test_a_card_written_by_hand_is_kept_whole(model, card, body):
    metadata = "---\nlicense: mit\n---\n"
    once = refreshed(model, metadata + body)
    assert body in once.partition("<!-- free: notes -->")[2].partition("<!-- /free: notes -->")[0]
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
        (("<!-- /free: notes -->", ""), "`<!-- free: notes -->` without its counterpart"),
        (("<!-- free: notes -->", ""), "`<!-- /free: notes -->` without its counterpart"),
        (("<!-- free: limits -->", "<!-- free: limits --><!-- free: notes -->"), "without its counterpart"),
        (
            ("<!-- free: limits -->", "<!-- free: notes --><!-- /free: notes --><!-- free: limits -->"),
            "two free sections",
        ),
        (("<!-- /free: notes -->", "<!-- /free: notes -->\n\n```python\n"), "never closed"),
        (("tags:\n", "tags: [\n"), "no YAML"),
    ],
)
def test_a_damaged_card_is_refused_before_anything_is_lost(model, card, damage, words):
    assert damage[0] in card
    with pytest.raises(ValueError, match=words):
        refreshed(model, card.replace(*damage, 1))


def test_metadata_of_a_person_stays(model, card):
    edited = card.replace("---\n", "---\nwidget:\n- text: Hello\nlicense: mit\nlanguage: en\nthumbnail: a.png\n", 1)
    edited = edited.replace("tags:\n", "tags:\n- mine\n- upcycled\n", 1).replace("fill-mask", "text-generation", 1)
    once = refreshed(model, edited)
    metadata, _ = split_front_matter(once)
    assert metadata["widget"] == [{"text": "Hello"}]
    assert (metadata["license"], metadata["thumbnail"], metadata["language"]) == ("mit", "a.png", ["en"])
    assert metadata["tags"] == ["moe", "sparse-moe", "encoder", "mine"]  # nothing says that it was upcycled
    assert metadata["pipeline_tag"] == "fill-mask"
    assert "| Licence | mit |" in once
    assert refreshed(model, once) == once
    assert split_front_matter(refreshed(model, once, license="apache-2.0"))[0]["license"] == "apache-2.0"


headings = ["# one", "## two", "## Export", "### three", "    ## code", "## two ##"]
blocks = ["<!-- free: a -->x<!-- /free: a -->", "````", "~~~\n## in code\n~~~"]
lines = st.sampled_from(["", "text", "---", "===", "- item", "| a | b |", *headings, *blocks])


@given(st.lists(lines, max_size=12), st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=150, deadline=None)
def test_sections_add_up_to_the_body(texts, end):
    body = end.join(texts)
    try:
        sections = split_sections(body)
    except ValueError:  # a code block without an end
        assert body.count("````") % 2 == 1
        return
    assert "".join(section.text for section in sections) == body


@given(st.lists(lines.filter(lambda line: "free" not in line and "````" not in line), max_size=8), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_whatever_is_written_is_settled_after_one_rendering(card, texts, place):
    _, body = split_front_matter(card)
    theirs = "\n\n## Theirs\n\n" + "\n".join(texts) + "\n\n"
    sections = [section.text for section in split_sections(body)]
    place = min(max(place, 2), len(sections))
    edited = "".join(sections[:place]) + theirs + "".join(sections[place:])
    once = keep_free_sections(body, edited)
    assert keep_free_sections(body, once) == once
    assert "## Theirs" in once
