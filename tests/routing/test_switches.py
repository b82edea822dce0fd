"""Switches of the routing do what they say, restore what they found, and refuse what makes no sense."""

import copy
import re

import pytest
import torch
import transformers as hf
from peft import get_peft_model

from hf_sparse_moe.adapters import expert_lora_config
from hf_sparse_moe.routing.switches import disable_experts, record_routing, replay_routing, use_top_k
from models.router_kinds import ROUTERS, pairs_with, routed_model
from monitored_training import STOCK, make_model
from routing.test_mixture_layers import build, inputs_of
from tiny_models import tiny_dense, tiny_inputs, tiny_sparse, without_dropout


NO_TOP_K = [kind for kind in ROUTERS if "expert choice" in kind or "hash" in kind]
TOP_K = [kind for kind in ROUTERS if kind not in NO_TOP_K]


def logits(model, **changes) -> torch.Tensor:
    with torch.no_grad():
        return model(**(tiny_inputs(model, labels=False, pads=2) | changes)).logits


def routing_of(model, **changes) -> list:
    """The `Routing` of each sparse layer."""
    with record_routing(model) as recorded:
        logits(model, **changes)
    (forward_pass,) = recorded
    return [forward_pass[place] for place in range(len(forward_pass))]


def same(first: list, second: list) -> bool:
    return all(torch.equal(a.top_k_index, b.top_k_index) for a, b in zip(first, second, strict=True))


# ---- top-k ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOP_K)
def test_top_k_is_that_of_a_model_made_with_it(kind):
    model = routed_model("llama", kind)  # one expert of two keeps the weight that two would share
    other = routed_model("llama", kind, num_experts_per_tok=1, norm_topk_prob=model.config.norm_topk_prob)
    other.load_state_dict(model.state_dict())
    before = logits(model)
    with use_top_k(model, 1):
        assert torch.equal(logits(model), logits(other))
        assert all(routing.top_k_index.shape[-1] == 1 for routing in routing_of(model))
    assert torch.equal(logits(model), before)
    assert not torch.equal(before, logits(other))


STOCK_FOLDERS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "llama4"]


@pytest.mark.parametrize("folder", STOCK_FOLDERS)
def test_top_k_of_stock_mixtures(folder):
    model = build(folder).eval()

    def sizes() -> set[int]:
        with record_routing(model) as recorded, torch.no_grad():
            model(**inputs_of(model))
        return {routing.top_k_index.shape[-1] for routing in recorded[0].values()}

    assert sizes() == {2}
    with use_top_k(model, 1):
        assert sizes() == {1}
    assert sizes() == {2}


def test_top_k_of_stock_mixtures_is_that_of_a_model_made_with_it():
    model = make_model("mixtral").eval()
    other = type(model)(type(STOCK["mixtral"])(**{**STOCK["mixtral"].to_dict(), "num_experts_per_tok": 1})).eval()
    other.load_state_dict(model.state_dict())
    with use_top_k(model, 1):
        assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("family", ["encoder", "decoder", "encoder_decoder", "mixtral"])
@pytest.mark.parametrize(
    "fields", [{}, {"capacity_factor": 0.8, "balance_scope": "sequence"}], ids=["plain", "limits"]
)
def test_training_with_another_top_k_is_that_of_a_model_made_with_it(family, fields):
    """Loss and gradients, the balance loss among them."""
    if family == "mixtral":
        configs = [copy.deepcopy(STOCK["mixtral"]) for _ in range(2)]
        for config, top_k in zip(configs, (2, 1), strict=True):
            config.update({"num_experts_per_tok": top_k, "output_router_logits": True, "router_aux_loss_coef": 1.0})
        model, other = (hf.AutoModelForCausalLM.from_config(config).train() for config in configs)
    else:
        fields = {
            **fields,
            "num_experts": 4,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 1.0,
            "router_z_loss_coef": 0.1,
        }
        models = (tiny_sparse(family, num_experts_per_tok=top_k, **fields) for top_k in (2, 1))
        model, other = (without_dropout(model).train() for model in models)
    other.load_state_dict(model.state_dict())
    inputs = tiny_inputs(model, pads=2)
    with use_top_k(model, 1):
        model(**inputs).loss.backward()
    other(**inputs).loss.backward()
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad)


def test_a_fixed_top_k_is_refused():
    with pytest.raises(ValueError, match="always takes 1"), use_top_k(build("switch_transformers"), 2):
        pass
    with pytest.raises(ValueError, match="always takes 2"), use_top_k(build("jetmoe"), 1):  # of its attention heads
        pass


@pytest.mark.parametrize("kind", NO_TOP_K)
def test_top_k_is_refused_where_tokens_do_not_choose(kind):
    model = routed_model("bert", kind)
    with pytest.raises(ValueError, match="do not choose their best experts"), use_top_k(model, 1):
        pass


@pytest.mark.parametrize("top_k", [0, -1, 5, 1.0, True, None])
def test_a_top_k_without_sense_is_refused(top_k):
    model = tiny_sparse("llama")
    with pytest.raises(ValueError, match=f"`top_k={top_k}` is not allowed"), use_top_k(model, top_k):
        pass
    assert {block.gate.top_k for block in model.sparse_blocks} == {2}


def test_top_k_stays_within_the_groups_of_a_token():
    for model in (routed_model("llama", "groups by their best"), make_model("deepseek_v3")):
        limit = 4  # 8 experts in 4 groups, two of which are chosen; or in 2, one of which is
        with use_top_k(model, limit):
            logits(model)
        with pytest.raises(ValueError, match=r"takes 5 experts.* of 4 enabled"), use_top_k(model, limit + 1):
            pass


# ---- disabled experts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [pair for pair in pairs_with("llama", "t5") if pair[1] != "hash"])
def test_no_token_reaches_a_disabled_expert(name, kind):
    model = routed_model(name, kind, num_experts=16)
    before, whole = routing_of(model), logits(model)
    first, second = torch.cat([routing.top_k_index.flatten() for routing in before]).bincount().argsort()[-2:].tolist()
    with disable_experts(model, [first, second]):
        for routing in routing_of(model):
            used = routing.top_k_index if routing.kept is None else routing.top_k_index[routing.kept]
            assert not torch.isin(used, torch.tensor([first, second])).any()
            assert routing.top_k_weights.isfinite().all()
        expected = logits(model)
        with torch.no_grad():  # what the experts hold matters no more
            for block in model.sparse_blocks:
                block.experts.down_proj[[first, second]] += 1
        assert torch.equal(logits(model), expected)
        with torch.no_grad():
            for block in model.sparse_blocks:
                block.experts.down_proj[[first, second]] -= 1
    assert same(routing_of(model), before)
    torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-4)


def test_experts_of_one_layer():
    model = tiny_sparse("llama")
    first, second = routing_of(model)
    with disable_experts(model, {1: [0, 3]}):
        assert same(routing_of(model)[:1], [first])
        assert set(routing_of(model)[1].top_k_index.unique().tolist()) == {1, 2}
    assert same(routing_of(model), [first, second])


def test_the_next_best_take_the_place_with_weights_that_sum_up():
    model = tiny_sparse("llama")
    with disable_experts(model, [2]):
        routing = routing_of(model)[0]
    enabled = routing.router_logits.clone()
    enabled[:, 2] = -torch.inf
    assert torch.equal(routing.top_k_index, enabled.topk(2).indices)
    torch.testing.assert_close(routing.top_k_weights.sum(-1), torch.ones(len(enabled)))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([4], "names expert 4 of layer 0, whose experts are 0 to 3"),
        ([-1], "names expert -1"),
        ([True], "names expert True"),
        ({2: [0]}, "names layer 2; the sparse layers are 0 to 1"),
        ({"0": [0]}, "names layer '0'"),
        ([0, 1, 2, 3], "takes 2 experts for each token, of 0 enabled"),
        ({1: [0, 1, 2]}, "layer 1 takes 2 experts for each token, of 1 enabled"),
    ],
    ids=str,
)
def test_disabling_without_sense_is_refused(experts, message):
    model = tiny_sparse("llama")
    with pytest.raises(ValueError, match=re.escape(message)), disable_experts(model, experts):
        pass
    assert all(block.gate.disabled_experts is None for block in model.sparse_blocks)


def test_a_group_must_keep_enough_experts():
    model = routed_model("llama", "groups by their best", num_experts_per_tok=3)
    message = "of 2 enabled, whichever 2 of its 4 groups a token takes"
    with pytest.raises(ValueError, match=message), disable_experts(model, [0, 1]):
        pass
    with disable_experts(model, [0]):
        assert not any((routing.top_k_index == 0).any() for routing in routing_of(model))


def test_experts_of_a_hash_mixture_cannot_be_disabled():
    model = routed_model("llama", "hash")
    with pytest.raises(ValueError, match="the token's id decides"), disable_experts(model, [0]):
        pass


def test_all_experts_that_choose_cannot_be_disabled():
    model = routed_model("bert", "expert choice")
    with disable_experts(model, [0, 1, 2]):
        for routing in routing_of(model):
            assert routing.top_k_index[routing.kept].unique().tolist() == [3]
    with pytest.raises(ValueError, match="of 0 enabled"), disable_experts(model, [0, 1, 2, 3]):
        pass


# ---- all of them ----------------------------------------------------------------------------------------------


def test_nested_switches_restore_in_turn_also_after_an_error():
    model = tiny_sparse("llama")
    before = routing_of(model)
    with disable_experts(model, [0]):
        outer = routing_of(model)
        with use_top_k(model, 1), disable_experts(model, [1]):
            used = torch.cat([routing.top_k_index for routing in routing_of(model)])
            assert used.shape[-1] == 1
            assert set(used.unique().tolist()) <= {2, 3}
        assert same(routing_of(model), outer)
        with pytest.raises(RuntimeError, match="in between"), use_top_k(model, 1), disable_experts(model, [1]):
            raise RuntimeError("in between")
        assert same(routing_of(model), outer)
        with pytest.raises(ValueError, match="of 3 enabled"), use_top_k(model, 4):
            pass
        with use_top_k(model, 3), pytest.raises(ValueError, match="takes 3 experts"), disable_experts(model, [1]):
            pass
        assert same(routing_of(model), outer)
    assert same(routing_of(model), before)
    assert all(block.gate.disabled_experts is None for block in model.sparse_blocks)


def test_nothing_stays_on_the_model():
    model = tiny_sparse("llama")
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    with record_routing(model) as recorded:
        logits(model)
    with pytest.raises(ValueError, match="`recorded` has 14 tokens"), replay_routing(model, recorded):
        logits(model, **tiny_inputs(model, labels=False, length=3))
    with pytest.raises(RuntimeError), use_top_k(model, 1):
        raise RuntimeError
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


@pytest.mark.parametrize("router", [False, True], ids=["frozen router", "trained router"])
def test_inside_peft(router):
    bare = tiny_sparse("llama")
    model = get_peft_model(bare, expert_lora_config(bare, r=2, router=router)).eval()
    with use_top_k(model, 1), disable_experts(model, [0]):
        for routing in routing_of(model):
            assert routing.top_k_index.shape[-1] == 1
            assert not (routing.top_k_index == 0).any()
    with record_routing(tiny_sparse("llama", num_experts=4)) as recorded:
        logits(tiny_sparse("llama"))
    assert not recorded  # another model ran
    forced = [dict(enumerate(routing_of(tiny_sparse("llama"))))]
    with torch.no_grad():
        for block in bare.sparse_blocks:
            for parameter in block.gate.parameters():
                parameter.mul_(-1)
    with replay_routing(model, forced):
        assert same(routing_of(model), list(forced[0].values()))
    assert not same(routing_of(model), list(forced[0].values()))


# ---- record and replay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), pairs_with("llama", "t5"))
def test_a_replay_on_the_same_model_changes_nothing(name, kind):
    model = routed_model(name, kind)
    with record_routing(model) as recorded:
        expected = logits(model)
    for with_weights in (False, True):
        with replay_routing(model, recorded, with_weights):
            assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("name", "kind"), pairs_with("llama", "t5"))
def test_a_replay_forces_the_experts_and_weighs_them_by_its_own_scores(name, kind):
    model = routed_model(name, kind)
    with record_routing(model) as recorded:
        first = logits(model)
    with torch.no_grad():
        for block in model.sparse_blocks:
            for parameter in block.gate.parameters():
                if parameter.dim() > 1:
                    parameter.neg_()
                    break
    with replay_routing(model, recorded, with_weights=True):
        torch.testing.assert_close(logits(model), first)
    wanted = list(recorded[0].values())
    with replay_routing(model, recorded):
        own = routing_of(model)
    assert same(own, wanted)
    if "hash" not in kind:
        assert not same(routing_of(model), wanted)
        assert not any(torch.equal(a.top_k_weights, b.top_k_weights) for a, b in zip(own, wanted, strict=True))


def test_a_record_begun_before_the_replay_holds_what_is_replayed():
    model, other = (routed_model("bert", "expert choice") for _ in range(2))
    with torch.no_grad():
        for block in other.sparse_blocks:
            block.gate.weight.neg_()
    wanted = routing_of(model)
    with record_routing(other) as recorded, replay_routing(other, [dict(enumerate(wanted))]):
        logits(other)
    for place, routing in recorded[0].items():
        assert torch.equal(routing.token_index, wanted[place].token_index)
        assert torch.equal(routing.kept, wanted[place].kept)


def test_a_float32_routing_in_bfloat16():
    model = tiny_sparse("llama", num_experts=16, dense_fields={"num_hidden_layers": 4})
    half = tiny_sparse("llama", num_experts=16, dense_fields={"num_hidden_layers": 4}).to(torch.bfloat16)
    inputs = tiny_inputs(model, labels=False, batch=8, length=32)
    with record_routing(model) as recorded:
        logits(model, **inputs)
    wanted = list(recorded[0].values())
    assert not same(routing_of(half, **inputs), wanted), "rounding alone changes no choice here: the test says nothing"
    with replay_routing(half, recorded):
        assert same(routing_of(half, **inputs), wanted)


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_record_and_replay_in_generate(name):
    model = tiny_sparse(name)
    inputs = {key: tiny_inputs(model, labels=False, pads=2)[key] for key in ("input_ids", "attention_mask")}
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with record_routing(model) as recorded:
        written = model.generate(**inputs, **arguments)
    assert len(recorded) == 5  # a step is a forward pass
    assert all(len(routing.router_logits) == 2 for step in recorded[1:] for routing in step.values())
    with replay_routing(model, recorded):
        assert torch.equal(model.generate(**inputs, **arguments), written)
        with pytest.raises(ValueError, match="and this is one more"):
            model.generate(**inputs, **arguments)


def test_a_replay_reaches_the_router_with_its_gradient():
    model = without_dropout(tiny_sparse("llama")).train()
    inputs = tiny_inputs(model)
    with record_routing(model) as recorded:
        model(**inputs).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(checkpointing)
        model.zero_grad()
        with replay_routing(model, recorded):
            model(**inputs).loss.backward()
        for parameter, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)


def test_recomputation_of_two_forward_passes_is_refused():
    model = tiny_sparse("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = tiny_inputs(model)
    with record_routing(model) as recorded:
        for _ in range(2):
            model(**inputs).loss.backward()
    with replay_routing(model, recorded):
        for _ in range(2):
            model(**inputs).loss.backward()
    assert len(recorded) == 2
    with replay_routing(model, recorded):
        loss = model(**inputs).loss + model(**inputs).loss
        with pytest.raises(ValueError, match="which of 2 forward passes is recomputed"):
            loss.backward()


def test_replays_without_sense_are_refused():
    model = tiny_sparse("bert")
    with record_routing(model) as recorded:
        logits(model)

    def refused(message, other=model, what=recorded):
        with pytest.raises(ValueError, match=message), replay_routing(other, what):
            logits(other)

    refused(r"`recorded` has the sparse layers \[\], but the model has 0 to 1", what=[])
    refused(r"has the sparse layers \[0, 1\], but", tiny_sparse("bert", dense_fields={"num_hidden_layers": 3}))
    refused("`recorded` has 4 experts in layer 0, the model 8", tiny_sparse("bert", num_experts=8))
    refused("another kind of router", routed_model("bert", "expert choice"))
    refused("`replay_routing` is for mixtures of this package", make_model("mixtral"))
    with disable_experts(model, [1]):
        refused("sends tokens to experts of layer [01] that are disabled")


def test_a_dense_model_is_refused():
    for switch, *arguments in ((use_top_k, 1), (disable_experts, [0]), (record_routing,), (replay_routing, [])):
        with pytest.raises(ValueError, match="no sparse layer"), switch(tiny_dense("llama"), *arguments):
            pass


def test_stock_routing_is_recorded():
    model = make_model("mixtral").eval()
    with record_routing(model) as recorded:
        outputs = model(**tiny_inputs(model, labels=False), output_router_logits=True)
    (forward_pass,) = recorded
    for place, wanted in enumerate(outputs.router_logits):
        torch.testing.assert_close(forward_pass[place].router_logits, wanted)
        assert not forward_pass[place].router_logits.requires_grad
