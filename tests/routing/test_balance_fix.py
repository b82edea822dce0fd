"""`fix_balance` makes the balance loss of stock mixtures per layer, blind to pads, and the same on every split."""

import copy

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from hf_sparse_moe.routing import find_mixture_layers, fix_balance, observe_routing
from processes import in_processes
from routing.balance_worker import (
    CASES,
    SEQUENCES,
    examples,
    fixed_gradient,
    gradients_of_a_rank,
    router_gradient,
    tiny_mixtral,
)
from tiny_models import tiny_dense, tiny_sparse


SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
LAYERS, EXPERTS = 4, 4
_TOKENS = {"vocab_size": 50, "pad_token_id": 0, "router_aux_loss_coef": 1.0, "output_router_logits": True}
_DECODER = _TOKENS | {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "num_hidden_layers": LAYERS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
_DEEPSEEK = _DECODER | {
    "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
_SWITCH = _TOKENS | {
    "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": LAYERS, "num_decoder_layers": LAYERS,
    "num_sparse_encoder_layers": LAYERS // 2, "num_sparse_decoder_layers": LAYERS // 2, "dropout_rate": 0.0,
    "router_jitter_noise": 0.0, "router_z_loss_coef": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
STOCK = {
    "Mixtral": (hf.MixtralConfig, "num_local_experts", _DECODER),
    "Qwen2-MoE": (hf.Qwen2MoeConfig, "num_experts", _DECODER),
    "Qwen3-MoE": (hf.Qwen3MoeConfig, "num_experts", _DECODER),
    "OLMoE": (hf.OlmoeConfig, "num_experts", _DECODER),
    "DeepSeek-V3": (hf.DeepseekV3Config, "n_routed_experts", _DEEPSEEK),
    "GPT-OSS": (hf.GptOssConfig, "num_local_experts", _DECODER),
    "GraniteMoE": (hf.GraniteMoeConfig, "num_local_experts", _DECODER),
    "Switch": (hf.SwitchTransformersConfig, "num_experts", _SWITCH),
}
WITHOUT_STOCK_LOSS = {
    "DeepSeek-V3": "transformers has no balance loss for it",
    "Switch": "its forward adds the loss where the call asks for it, never by the config",
}


def stock(name, top_k=2, **fields):
    torch.manual_seed(0)
    config_class, experts, defaults = STOCK[name]
    config = config_class(**{**defaults, experts: EXPERTS, "num_experts_per_tok": top_k, **fields})
    auto_class = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    return auto_class.from_config(config)


def batch(rows=2, pads=0):
    """Sequences of 7 tokens, and with `pads` the same ones with that many pads behind."""
    ids = torch.randint(2, 50, (rows, 7), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 1  # the end
    tail = torch.zeros(rows, pads, dtype=torch.long)
    mask = torch.cat([torch.ones_like(ids), tail], dim=1)
    ids = torch.cat([ids, tail], dim=1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def ratios(gradients):
    return [(gradient.norm() / gradients[0].norm()).item() for gradient in gradients]


def show(capsys, title, gradients):
    with capsys.disabled():
        print(f"\n{title}: router gradient over that of 8 x 1:", *(f"{ratio:.6f}" for ratio in ratios(gradients)))


@pytest.mark.parametrize("name", STOCK)
def test_router_gradient_is_the_same_for_every_split(name, tmp_path, capsys):
    def gradient(split):
        model = stock(name)
        with fix_balance(model, router_aux_loss_coef=1.0, router_z_loss_coef=0.1):
            return router_gradient(model, examples(identical=True), *split, str(tmp_path))

    gradients = [gradient(split) for split in SPLITS]
    show(capsys, f"{name}, fixed", gradients)
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("name", [name for name in STOCK if name not in WITHOUT_STOCK_LOSS])
def test_without_it_the_gradient_grows_with_the_micro_batches(name, tmp_path, capsys):
    ends = (SPLITS[0], SPLITS[-1])
    gradients = [router_gradient(stock(name), examples(identical=True), *split, str(tmp_path)) for split in ends]
    show(capsys, f"{name}, stock, 1 x 8", gradients)
    assert ratios(gradients)[-1] > 4


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The routers' gradients of two gloo processes, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    out = folder / "gradients.pt"
    assert in_processes(2, gradients_of_a_rank, out) == [0, 0]
    saved = torch.load(out)
    assert saved["world_size"] == 2
    return saved["gradients"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_have_the_gradient_of_one(case, two_processes, tmp_path, capsys):
    scope, kind, _ = case
    gradients = [fixed_gradient(scope, kind, SEQUENCES, 1, str(tmp_path)), two_processes[case]]
    show(capsys, f"2 processes, {scope}, {kind} sequences", gradients)
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert difference > 1 if scope == "stock" else difference <= 1e-5


def test_the_global_batch_sees_the_micro_batches_of_its_step_and_no_others():
    """The counts of the second micro-batch are those of both; the next step begins anew."""
    model = tiny_mixtral().train()
    halves = [{name: value[part] for name, value in batch(rows=4).items()} for part in (slice(2), slice(2, 4))]

    def losses():
        results = []
        fix.start_optimizer_step()
        for half in halves:
            outputs = model(**half)
            outputs.loss.backward()
            results.append(outputs.aux_loss.item())
        model.zero_grad()
        return results

    with fix_balance(model, balance_scope="global_batch") as fix:
        first, second = losses(), losses()
    with fix_balance(model) as fix:
        alone = losses()
    assert first == pytest.approx(second)
    assert first[0] == pytest.approx(alone[0])
    assert first[1] != pytest.approx(alone[1])


@pytest.mark.parametrize("name", STOCK)
def test_collapsed_layers_score_the_number_of_experts(name):
    model = stock(name, top_k=1)
    layers = find_mixture_layers(model)
    assert len(layers) == LAYERS
    for number, layer in enumerate(layers):  # each sends every token to an expert of its own
        weight = next(parameter for parameter in layer.router.parameters() if parameter.dim() == 2)
        with torch.no_grad():
            weight.fill_(-5.0)[number % EXPERTS] = 5.0
        layer.router.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]), *args[1:]))
    stock_outputs = model(**batch(), output_router_logits=True)
    if stock_outputs.get("aux_loss") is not None:
        assert stock_outputs.aux_loss.item() == pytest.approx(1.0)  # what it gives an even load
    with fix_balance(model, router_aux_loss_coef=1.0):
        outputs = model.train()(**batch())
    losses = [outputs[field].item() for field in outputs if field.endswith("aux_loss")]
    for loss in losses:
        assert loss == pytest.approx(EXPERTS, rel=1e-4)
    assert losses or name == "DeepSeek-V3"  # whose output class has no such field


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("name", STOCK)
def test_pads_change_nothing(name, scope):
    model = stock(name).train()
    with fix_balance(model, router_aux_loss_coef=1.0, router_z_loss_coef=0.1, balance_scope=scope):
        losses = []
        for pads in (0, 5):
            losses.append(model(**batch(pads=pads)).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", STOCK)
def test_the_loss_is_that_of_the_formula(name):
    """E sum_e f_e P_e for each layer from the routing as observed, written out."""
    model = stock(name).train()
    routings = []
    with observe_routing(model, lambda *call: routings.append(call)), fix_balance(model, router_aux_loss_coef=0.5):
        loss = model(**batch()).loss
    task_loss = model.eval()(**batch(), output_router_logits=False).loss
    expected = []
    for layer, routing in routings:
        probabilities = layer.probabilities(routing.router_logits)
        tokens, experts = probabilities.shape
        share = [(routing.top_k_index == expert).sum() / (tokens * layer.top_k) for expert in range(experts)]
        expected.append(experts * sum(f * p for f, p in zip(share, probabilities.mean(0), strict=True)))
    torch.testing.assert_close(loss, task_loss + 0.5 * torch.stack(expected).mean())


@pytest.mark.parametrize("name", STOCK)
def test_restore_restores(name):
    model = stock(name).train()

    def state():
        """The names of all that each module holds, and what is in its dictionaries: hooks among them."""
        held = [
            {key: list(value) if isinstance(value, dict) else None for key, value in vars(module).items()}
            for module in model.modules()
        ]
        return held, model.config.to_dict()

    model(**batch()).loss.backward()  # which itself leaves attributes behind
    outputs, before = model(**batch()), state()
    fix = fix_balance(model, router_aux_loss_coef=1.0)
    assert state() != before
    model(**batch()).loss.backward()
    fix.restore()
    fix.restore()
    assert state() == before
    model.zero_grad()
    again = model(**batch())
    assert outputs.keys() == again.keys()
    assert torch.equal(outputs.loss, again.loss)
    with pytest.raises(KeyboardInterrupt), fix_balance(model, router_aux_loss_coef=1.0):
        raise KeyboardInterrupt
    assert state() == before


@pytest.mark.parametrize("asked", ["config", "call", "nobody"])
def test_evaluation_is_the_task_loss_alone(asked):
    """With `output_router_logits`, of the config or the call, logits and balance loss are there, but no part of it."""
    model = tiny_mixtral().eval()
    model.config.output_router_logits = asked == "config"
    inputs = batch() | ({"output_router_logits": True} if asked == "call" else {})
    recorded = model(**batch(), output_router_logits=True).router_logits
    task_loss = model(**batch(), output_router_logits=False).loss
    with fix_balance(model):
        outputs, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert torch.equal(outputs.loss, task_loss)
    assert torch.equal(as_tuple[0], task_loss)
    assert (outputs.aux_loss is None) == (asked == "nobody")
    if asked != "nobody":
        torch.testing.assert_close(outputs.router_logits, recorded)


def test_a_tuple_gets_the_loss_too():
    model = tiny_mixtral().train()
    with fix_balance(model):
        as_tuple, outputs = model(**batch(), return_dict=False), model(**batch())
    assert torch.equal(as_tuple[0], outputs.loss)


def test_positional_arguments():
    model = tiny_mixtral().train()
    inputs = batch(pads=2)
    names = ["input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache"]
    with fix_balance(model):
        positional = model(*[inputs.get(name) for name in names], True)  # output_router_logits
        assert torch.equal(positional.loss, model(**inputs).loss)
        assert len(positional.router_logits) == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS", "Switch"])
def test_gradient_checkpointing_gives_the_same_gradient(name, reentrant, tmp_path):
    def gradient(**checkpointing):
        model = stock(name)
        with fix_balance(model, router_aux_loss_coef=1.0, router_z_loss_coef=0.1):
            return router_gradient(model, examples(identical=False), 4, 2, str(tmp_path), **checkpointing)

    kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found = gradient(gradient_checkpointing=True, **kwargs)
    torch.testing.assert_close(found, gradient(), rtol=1e-5, atol=1e-6)


def test_under_peft(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])
    model = get_peft_model(tiny_mixtral(), config)
    inputs = batch()
    with fix_balance(model):
        outputs = model.train()(**inputs)
    with fix_balance(bare := tiny_mixtral().train()):
        torch.testing.assert_close(outputs.loss, bare(**inputs).loss)
    outputs.loss.backward()
    gate = model.base_model.model.model.layers[0].mlp.gate.modules_to_save["default"]
    assert gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("accumulation", [1, 8])
def test_a_classification_head(accumulation, tmp_path):
    """Its mean loss ignores `num_items_in_batch`, so it needs the share of the step as much as the balance loss."""
    torch.manual_seed(0)
    config = tiny_mixtral().config
    config.num_labels, config.pad_token_id = 3, 0
    state = hf.MixtralForSequenceClassification(config).state_dict()
    rows = [row | {"labels": torch.tensor(1)} for row in examples(identical=True)]

    def gradient(*split):
        model = hf.MixtralForSequenceClassification(config)
        model.load_state_dict(state)
        with fix_balance(model):
            return router_gradient(model, rows, *split, str(tmp_path))

    whole, split = gradient(8, 1), gradient(SEQUENCES // accumulation, accumulation)
    assert (split - whole).norm() <= 1e-5 * whole.norm()


def router_gradient_of(model, loss):
    loss.backward()
    gradient = torch.cat([layer.router.weight.grad.flatten() for layer in find_mixture_layers(model)])
    model.zero_grad()
    return gradient


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("has_labels", [False, True])
def test_a_loss_from_elsewhere_carries_it(has_labels, compiled):
    model = tiny_mixtral().train()
    inputs = batch(pads=2)
    if not has_labels:
        del inputs["labels"]
    task = router_gradient_of(model, model(**inputs).logits.square().mean())
    with fix_balance(model, router_aux_loss_coef=0.5, router_z_loss_coef=0.1) as fix:
        outputs = model(**batch(pads=2))
        both = router_gradient_of(model, outputs.loss)
        fix.router_aux_loss_coef = fix.router_z_loss_coef = 0.0
        balance = both - router_gradient_of(model, model(**batch(pads=2)).loss)
        fix.router_aux_loss_coef, fix.router_z_loss_coef = 0.5, 0.1
        forward = torch.compile(model, backend="eager") if compiled else model
        outputs = forward(**inputs)
        assert not outputs.aux_loss.requires_grad
        gradient = router_gradient_of(model, outputs.logits.square().mean())
    torch.testing.assert_close(gradient, task + balance, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_the_models_own_loss_carries_it_once():
    model = tiny_mixtral().train()
    with fix_balance(model, router_aux_loss_coef=0.5):
        expected = router_gradient_of(model, model(**batch()).loss)
        compiled = router_gradient_of(model, torch.compile(model, backend="eager")(**batch()).loss)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-6)


def test_the_body_run_by_itself_carries_it():
    model = tiny_mixtral().train()
    inputs = {"input_ids": batch()["input_ids"]}
    task = router_gradient_of(model, model.model(**inputs).last_hidden_state.square().mean())
    with fix_balance(model, router_aux_loss_coef=0.5):
        gradient = router_gradient_of(model, model.model(**inputs).last_hidden_state.square().mean())
    assert (gradient - task).norm() > 0.01 * task.norm()


@pytest.mark.parametrize("split", SPLITS[1:])
def test_label_smoothing_has_the_same_gradient_for_every_split(split, tmp_path):
    def gradient(*split):
        model = tiny_mixtral()
        with fix_balance(model, router_aux_loss_coef=1.0):
            return router_gradient(model, examples(identical=True), *split, str(tmp_path), label_smoothing_factor=0.1)

    whole = gradient(*SPLITS[0])
    assert (gradient(*split) - whole).norm() <= 1e-5 * whole.norm()


def test_coefficients_of_zero_leave_the_task_loss():
    model = tiny_mixtral().train()
    model.config.output_router_logits = False
    task_loss = model(**batch()).loss
    with fix_balance(model, router_aux_loss_coef=0.0):
        outputs = model(**batch())
    assert torch.equal(outputs.loss, task_loss)
    assert outputs.aux_loss is None


def test_a_micro_batch_of_pads_alone_adds_nothing_and_no_nan():
    model = tiny_mixtral().train()
    inputs = batch()
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with fix_balance(model, router_z_loss_coef=0.1):
        outputs = model(**inputs, num_items_in_batch=torch.tensor(10))
    outputs.loss.backward()
    assert outputs.loss.item() == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef"),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef"),
        ({"router_z_loss_coef": float("inf")}, "router_z_loss_coef"),
        ({"balance_scope": "batch"}, "balance_scope"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fix_balance(tiny_mixtral(), **arguments)


def test_a_copy_of_a_fixed_model_is_refused_in_training():
    model = tiny_mixtral().train()
    with fix_balance(model):
        copied = copy.deepcopy(model)
        with pytest.raises(ValueError, match="fix the copy"):
            copied(**batch())
        copied.eval()(**batch())
        assert model(**batch()).aux_loss is not None


def test_what_it_cannot_fix_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        fix_balance(tiny_dense("llama"))
    with pytest.raises(ValueError, match="balances itself"):
        fix_balance(tiny_sparse("decoder"))
    with pytest.raises(ValueError, match="without a head"):
        fix_balance(tiny_mixtral().model)
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        fix_balance(stock("DeepSeek-V3", router_aux_loss_coef=None))
    model = tiny_mixtral()
    with fix_balance(model), pytest.raises(ValueError, match="restore"):
        fix_balance(model)


def test_a_mask_that_does_not_tell_the_pads_is_refused():
    model = stock("GPT-OSS").train()
    pairs = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    masks = {"full_attention": pairs, "sliding_attention": pairs}
    with fix_balance(model), pytest.raises(ValueError, match="does not tell the pads"):
        model(**batch() | {"attention_mask": masks})


@pytest.mark.parametrize(
    ("name", "top_k", "fields", "warns"),
    [
        ("Mixtral", 1, {}, True),
        ("Mixtral", 2, {}, False),
        ("GPT-OSS", 1, {}, True),
        ("Qwen3-MoE", 1, {"norm_topk_prob": True}, True),
        ("Qwen3-MoE", 1, {"norm_topk_prob": False}, False),
        ("Switch", 1, {}, False),
    ],
)
def test_a_router_that_the_task_never_trains_is_reported_once(name, top_k, fields, warns, warnings_of_ours):
    model = stock(name, top_k=top_k, **fields).train()
    with fix_balance(model, router_aux_loss_coef=0.0, router_z_loss_coef=1e-12):
        model(**batch()).loss.backward()
        model(**batch()).loss.backward()
    told = [message for message in warnings_of_ours() if "never trains the router" in message]
    assert len(told) == warns
    if name != "Switch":  # whose weights scale little
        gradients = [next(layer.router.parameters()).grad.norm() for layer in find_mixture_layers(model)]
        assert all((gradient < 1e-6) == warns for gradient in gradients)
