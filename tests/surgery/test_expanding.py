"""A mixture with more experts, or with another number of them a token: in memory, on disk, measured and verified."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe import expand, use_top_k
from hf_sparse_moe.checkpoints.loading import load_whole
from hf_sparse_moe.routing import record_routing
from hf_sparse_moe.surgery import measure_experts, prune_experts
from hf_sparse_moe.upcycling import verify
from hub_checkpoints import save_mixture
from models.router_kinds import ROUTERS, one_each, pairs_with, routed_model
from processes import in_processes, kill_at_file
from routing.test_mixture_layers import build
from tiny_models import enlarge_weights, tiny_inputs


def pairs() -> list:
    return [pair for pair in pairs_with("bert", "llama", "t5") if "hash" not in pair[1]]


def mixture(kind: str = "softmax", **fields):
    return enlarge_weights(routed_model("llama", kind, **fields))


def text_of(model) -> dict:
    return tiny_inputs(model, batch=16, length=24, labels=False)


def measured_on(model):
    return measure_experts(model, [text_of(model)])


@torch.no_grad()
def logits(model, inputs=None) -> torch.Tensor:
    return model(**(inputs or text_of(model)))[0]


def weights(model) -> torch.Tensor:
    """What each token's weights sum to in each layer."""
    with record_routing(model) as recorded, torch.no_grad():
        model(**text_of(model))
    return torch.stack([routing.top_k_weights.sum(-1) for routing in recorded[0].values()])


@pytest.mark.parametrize(("name", "kind"), one_each(pairs()))
def test_all_alike_keep_the_function_and_the_bits_on_disk(name, kind, tmp_path):
    model = enlarge_weights(routed_model(name, kind))
    inputs = tiny_inputs(model, labels=False, pads=2)
    larger = expand(model, 2, router_noise=0)
    torch.testing.assert_close(logits(larger, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)
    assert larger.receipt["expanded"]["exact"]
    model.save_pretrained(tmp_path / "mixture")
    expand(tmp_path / "mixture", 2, seed=3, output=tmp_path / "larger", max_shard_size="20KB")
    noisy, streamed = expand(model, 2, seed=3).state_dict(), load_whole(tmp_path / "larger").state_dict()
    assert noisy.keys() == streamed.keys()
    assert all(torch.equal(noisy[key], streamed[key]) for key in noisy)
    row = next(key for key in noisy if key.endswith("gate.weight"))
    half = len(noisy[row]) // 2
    assert 0 < (noisy[row][half:] - noisy[row][:half]).abs().max() < 0.1 * noisy[row].abs().max()


def needed(measured) -> list[list[int]]:
    """The expert whose copies carry the most each is copied next, said in another way than the code does."""
    every = []
    for layer in measured.layers:
        carried = (layer.reap * layer.tokens).tolist()
        offers = [(load / copies, expert) for expert, load in enumerate(carried) for copies in range(1, 5)]
        every.append(sorted(expert for _, expert in sorted(offers, reverse=True)[:4]))
    return every


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid, not normalised"])
def test_copies_of_a_sigmoid_router_sleep(kind):
    model = mixture(kind, num_experts=4)
    measured = measured_on(model)
    grown = expand(model, 2, by=measured)
    assert list(grown.receipt["expanded"]["copied"].values()) == needed(measured)
    assert (grown.config.num_experts, grown.config.num_experts_per_tok) == (8, 2)
    torch.testing.assert_close(logits(grown), logits(model), rtol=0, atol=1e-5)
    first, old = grown.sparse_blocks[0], model.sparse_blocks[0]
    assert torch.equal(first.experts.down_proj, old.experts.down_proj[[0, 1, 2, 3, *needed(measured)[0]]])
    with torch.no_grad():  # awake, they are chosen
        first.gate.e_score_correction_bias.zero_()
    with record_routing(grown) as after:
        logits(grown)
    assert (after[0][0].top_k_index >= 4).any()


@pytest.mark.parametrize("kind", ["softmax", "softmax, not normalised", "cosine", "capacity"])
def test_copies_of_a_softmax_router_are_chosen_at_once(kind):
    model = mixture(kind, num_experts=4)
    measured = measured_on(model)
    grown = expand(model, 2, by=measured, evaluation=([text_of(model)], None))
    told = grown.receipt["expanded"]
    assert list(told["copied"].values()) == needed(measured)
    assert not told["exact"]
    assert told["loss"]["all"]["after"] != told["loss"]["all"]["before"] == measured.losses["all"]["loss"]
    assert grown.config.num_experts_per_tok == 2
    with record_routing(grown) as after:
        logits(grown)
    assert (after[0][0].top_k_index >= 4).any()
    torch.testing.assert_close(weights(grown).mean(), weights(model).mean(), rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if "choice" not in kind])
@pytest.mark.parametrize("top_k", [1, 3])
def test_another_number_of_experts_a_token(kind, top_k):
    """The same choice as under `use_top_k`; the weights sum to what they summed to."""
    fields = {"num_experts": 8} if "group" in kind else {}
    model = mixture(kind, **fields)
    normalised = model.config.norm_topk_prob
    by = None if normalised else measured_on(model)
    changed = expand(model, 1, by=by, num_experts_per_tok=top_k)
    assert changed.config.num_experts_per_tok == top_k
    assert changed.state_dict().keys() == model.state_dict().keys()
    before, after = weights(model), weights(changed)
    if normalised:
        torch.testing.assert_close(after, before)
    else:
        torch.testing.assert_close(after.mean(), before.mean(), rtol=0.02, atol=0)
    if normalised and kind != "hash":
        with use_top_k(model, top_k):
            expected = logits(model)
        assert torch.equal(logits(changed), expected)
    reloaded = type(model)(changed.config)
    reloaded.load_state_dict(changed.state_dict())
    assert torch.equal(logits(reloaded.eval()), logits(changed))


def expand_until_killed(source, target, kill_at=None, **arguments):
    """To run in a process of its own, killed at the `kill_at`-th file in the folder where it works."""
    if kill_at is not None:
        kill_at_file(target.with_name(f".{target.name}."), kill_at)
    expand(source, 2, output=target, max_shard_size="4KB", **arguments)


def test_killed_and_resumed(tmp_path):
    source, target, whole, by = (tmp_path / name for name in ("mixture", "out", "whole", "measured"))
    mixture().save_pretrained(source)
    measured_on(load_whole(source)).save(by)
    expand_until_killed(source, whole, by=by)
    for kill_at in (20, 60):
        assert in_processes(1, expand_until_killed, source, target, kill_at, resume=True, by=by) == [-signal.SIGKILL]
        assert not target.exists()
    with pytest.raises(ValueError, match=r"cannot be resumed: .*`seed` was 0 and is 1"):
        expand_until_killed(source, target, resume=True, by=by, seed=1)
    expand_until_killed(source, target, resume=True, by=by)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_uneven_layers_grow_alike():
    model = prune_experts(mixture(), drop={0: [1]})
    larger = expand(model, 2, router_noise=0)
    assert larger.config.num_experts_per_layer == [6, 8]
    torch.testing.assert_close(logits(larger), logits(model), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("expanding")
    save_mixture(root / "mixture")
    (root / "law.txt").write_text("\n\n".join(["word7 word8 word9 " * 5] * 4))
    assert run_cli("measure", root / "mixture", "--data", root / "law.txt", "-o", root / "measured").code == 0
    return root


def test_command_and_verify(folder, tmp_path):
    chosen = ["--by", folder / "measured", "--data", folder / "law.txt", "--json"]
    finished = run_cli("expand", folder / "mixture", tmp_path / "larger", *chosen)
    assert finished.code == 0, finished
    told = json.loads(finished.out)["receipt"]["expanded"]
    assert told["loss"]["law"]["after"] != told["loss"]["law"]["before"]
    assert (tmp_path / "larger" / "tokenizer.json").is_file()
    finished = run_cli("expand", folder / "mixture", tmp_path / "top1", "--factor", 1, "--num-experts-per-tok", 1)
    assert finished.code == 0, finished
    assert "experts a token" in finished.out
    for name in ("larger", "top1"):
        finished = run_cli("verify", tmp_path / name, "--against", folder / "mixture")
        assert finished.code == 0, finished
        assert "does not promise the same" in finished.out
        assert "expanded" in run_cli("info", tmp_path / name).out
    assert run_cli("card", tmp_path / "larger").code == 0
    assert "## Expansion" in (tmp_path / "larger" / "README.md").read_text()
    expand(folder / "mixture", 2, router_noise=0, output=tmp_path / "exact")
    report = verify(tmp_path / "exact", folder / "mixture")
    assert report.passed, report.findings
    assert report.promised
    path = tmp_path / "exact" / "model.safetensors"
    state = load_file(path)
    for part in ("experts.down_proj", "gate.weight", "embeddings"):
        key = next(name for name in state if part in name)
        save_file({**state, key: state[key] + 1}, path, {"format": "pt"})
        assert not verify(tmp_path / "exact", folder / "mixture").passed


BAD = {
    "a dense model": (lambda: expand(build("mixtral"), 2), "not a mixture of this package"),
    "hash": (lambda: expand(routed_model("llama", "hash"), 2), "gives the ids to other experts"),
    "groups by need": (
        lambda: expand(grouped := mixture("groups by their best"), 2, by=measured_on(grouped)),
        "one group",
    ),
    "experts that choose": (
        lambda: expand(routed_model("bert", "expert choice"), 1, num_experts_per_tok=1),
        'with `router_type="expert_choice"` experts choose',
    ),
    "another model": (lambda: expand(mixture(), 2, by=measured_on(mixture(num_experts=5))), "of another model"),
    "too many": (lambda: expand(mixture(), 1, num_experts_per_tok=5), "has 4 experts to choose from"),
    "too many for the groups": (
        lambda: expand(mixture("groups by their best"), 1, num_experts_per_tok=5),
        "has 4 experts to choose from",
    ),
    "not normalised": (
        lambda: expand(mixture("softmax, not normalised"), 1, num_experts_per_tok=1),
        "not normalised.* Pass `by`",
    ),
    "nothing to do": (lambda: expand(mixture(), 1), "`factor=1` is not allowed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_input_writes_nothing(folder, tmp_path):
    finished = run_cli("expand", folder / "mixture", tmp_path / "out", "--factor", 1, "--num-experts-per-tok", 9)
    assert_one_sentence(finished, "experts to choose from")
    assert not list(tmp_path.iterdir())
