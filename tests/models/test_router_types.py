"""Every kind of router in whole models: backends, checkpointing, compiling, saving, upcycling, generating and more."""

import json
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

import hf_sparse_moe
from hf_sparse_moe import explain_export, upcycle
from hf_sparse_moe.adapters import expert_lora_config
from hf_sparse_moe.checkpoints.folder import write_checkpoint
from hf_sparse_moe.models.routing import active_record
from hf_sparse_moe.routing import find_mixture_layers, observe_routing, routing_statistics
from models.oracle import block_oracle
from models.router_kinds import ROUTERS, one_each, pairs_with, routed_model, routers_of, settle
from models.test_compile import SMALL
from models.test_gradient_checkpointing import KINDS, assert_same, gradients
from models.test_saving import assert_same_state, load
from tiny_models import tiny_config, tiny_dense, tiny_inputs, tiny_sparse, without_dropout
from upcycling.test_streaming import assert_same_checkpoint


FAMILY_PAIRS = pairs_with("bert", "llama", "t5")
WRITER_PAIRS = pairs_with("llama", "gpt2", "t5", "bart")


def recorded(model, run) -> list:
    """`(side, routing)` of each call of a sparse layer while `run()` runs."""
    calls = []
    with observe_routing(model, lambda layer, routing: calls.append((layer.block.side, routing))):
        run()
    return calls


# ---- forward and backward -------------------------------------------------------------------------------------


def with_oracle_blocks(model, inputs: dict[str, torch.Tensor]):
    """`model`, whose blocks compute the formula from the mask and the ids that the model was called with."""
    decoder_ids = inputs.get("decoder_input_ids")
    for block in model.sparse_blocks:
        source = block.side == "encoder" or not model.config.is_encoder_decoder
        mask, ids = (inputs["attention_mask"], inputs["input_ids"]) if source else (None, decoder_ids)

        def forward(hidden_states, block=block, mask=mask, ids=ids):
            return block_oracle(block, hidden_states, mask, ids).to(hidden_states.dtype)

        block.forward = forward
    return model


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("name", "kind"), one_each(FAMILY_PAIRS))
def test_a_model_on_every_backend_equals_the_formula(name, kind, training):
    """The mask, the ids and the sequences reach the routers as the model was given them."""
    model = without_dropout(routed_model(name, kind, router_aux_loss_coef=0.0)).train(training)
    inputs = tiny_inputs(model, labels=False, pads=3)
    actual = {}
    for backend in ("eager", "batched_mm", "grouped_mm", "sparse_moe"):
        model.set_experts_implementation(backend)
        actual[backend] = model(**inputs).logits
    expected = with_oracle_blocks(model, inputs)(**inputs).logits
    for backend, logits in actual.items():
        assert_close(logits, expected, rtol=0, atol=2e-4 * expected.abs().max().item(), msg=lambda m, b=backend: b + m)


@pytest.mark.parametrize("checkpointing", KINDS, ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize(("name", "kind"), one_each(FAMILY_PAIRS))
def test_gradient_checkpointing_changes_no_gradient(name, kind, checkpointing):
    model = routed_model(name, kind, router_aux_loss_coef=0.5, router_z_loss_coef=0.1, router_jitter_noise=0.1).train()
    if checkpointing["use_reentrant"]:
        model.enable_input_require_grads()
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize(("name", "kind"), one_each(FAMILY_PAIRS))
def test_half_precision_routes_in_float32(name, kind):
    model = routed_model(name, kind).to(torch.bfloat16)
    with torch.no_grad():
        calls = recorded(model, lambda: model(**tiny_inputs(model, labels=False, pads=2)))
    assert {routing.router_logits.dtype for _, routing in calls} == {torch.float32}
    assert {routing.top_k_weights.dtype for _, routing in calls} == {torch.float32}


# Each kind in one architecture that may have it; tracing takes seconds, so not all of them every time.
COMPILED = [
    ("t5", "hash"),
    ("bert", "expert choice, capacity"),
    ("llama", "capacity, sigmoid"),
    ("llama", "cosine"),
    ("llama", "groups by their best two"),
]
COMPILED += [
    pytest.param("bert" if "choice" in kind else "llama", kind, marks=pytest.mark.conformance)
    for kind in ROUTERS
    if kind not in {kind for _, kind in COMPILED}
]


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "training", [pytest.param(False, marks=pytest.mark.conformance), True], ids=["evaluation", "training"]
)
@pytest.mark.parametrize(("name", "kind"), COMPILED)
def test_one_graph(name, kind, training, fresh_compiler):
    """`fullgraph=True` of every router, also of those that drop or choose tokens: shapes depend on no value."""
    model = settle(without_dropout(tiny_sparse(name, dense_fields=SMALL[name], **ROUTERS[kind]))).train(training)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager" if training else "eager")
    for seed in range(2):
        inputs = tiny_inputs(model, pads=2, seed=seed)
        results = []
        for run in (model, forward):
            model.zero_grad()
            outputs = run(**inputs)
            if training:
                outputs.loss.backward()
            grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            results.append((outputs.loss.detach(), outputs.logits.detach(), *(grad.clone() for grad in grads)))
        for actual, expected in zip(results[1], results[0], strict=True):
            assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().clamp(min=1).item())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["capacity", "expert choice"])
def test_one_graph_for_every_length(kind, fresh_compiler):
    name = "bert"
    model = tiny_sparse(name, dense_fields=SMALL[name], **ROUTERS[kind], router_aux_loss_coef=0.0)
    model = without_dropout(model).train()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    forward = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    for length in (5, 9, 12, 17):
        inputs = tiny_inputs(model, length=length, pads=2)
        assert_close(forward(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert len(graphs) <= 2


# ---- saving ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), one_each(FAMILY_PAIRS))
def test_save_and_load(name, kind, tmp_path):
    model = routed_model(name, kind)
    model.save_pretrained(tmp_path)
    loaded = load(name, tmp_path)
    assert {key: getattr(loaded.config, key) for key in ROUTERS[kind]} == ROUTERS[kind]
    assert [type(block.gate) for block in loaded.sparse_blocks] == [type(block.gate) for block in model.sparse_blocks]
    assert_same_state(loaded, model)
    inputs = tiny_inputs(model, labels=False)
    with torch.no_grad():
        assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind, fields in ROUTERS.items() if fields.get("scoring_func") == "sigmoid"])
def test_the_selection_bias_stays_float32_in_bfloat16(kind, tmp_path):
    model = routed_model("llama", kind)
    biases = [block.gate.e_score_correction_bias for block in model.sparse_blocks]
    assert not any(torch.equal(bias, bias.bfloat16().float()) for bias in biases)
    model.save_pretrained(tmp_path / "float32")
    half = load("llama", tmp_path / "float32", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "bfloat16")
    for loaded in (half, load("llama", tmp_path / "bfloat16")):
        for block, bias in zip(loaded.sparse_blocks, biases, strict=True):
            assert block.gate.weight.dtype == torch.bfloat16
            assert torch.equal(block.gate.e_score_correction_bias, bias)


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_fresh_router_is_initialised(kind):
    model = type(tiny_sparse("bert"))(tiny_config("bert", **ROUTERS[kind]))
    for block in model.sparse_blocks:
        for name, tensor in (*block.gate.named_parameters(), *block.gate.named_buffers()):
            assert tensor.isfinite().all(), name
    model(**tiny_inputs(model)).loss.backward()


REMOTE = """
import sys, torch
from transformers import AutoModelForMaskedLM
for folder in sys.argv[1:]:
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        torch.save(model(**torch.load(f"{folder}/inputs.pt")).logits, f"{folder}/logits.pt")
    print(type(model.sparse_blocks[0].gate).__name__)
assert "hf_sparse_moe" not in sys.modules
"""


@pytest.mark.slow
def test_without_the_package(tmp_path):
    """The code that travels beside the weights holds every router."""
    models = {}
    for number, kind in enumerate(("cosine", "expert choice", "hash", "groups by their best two")):
        folder = tmp_path / str(number)
        models[folder] = model = routed_model("bert", kind)
        model.save_pretrained(folder)
        torch.save(tiny_inputs(model, labels=False, pads=2), folder / "inputs.pt")
    run = subprocess.run([sys.executable, "-c", REMOTE, *models], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for (folder, model), router in zip(models.items(), run.stdout.split(), strict=True):
        assert router == type(model.sparse_blocks[0].gate).__name__
        with torch.no_grad():
            expected = model(**torch.load(folder / "inputs.pt")).logits
        assert_close(torch.load(folder / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


# ---- upcycling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), one_each(FAMILY_PAIRS))
def test_upcycling_in_memory_and_streaming_give_the_same_bits(name, kind, tmp_path):
    tiny_dense(name).save_pretrained(tmp_path / "dense")
    arguments = {"method": "noise", "num_experts": 4, "num_experts_per_tok": 2, **ROUTERS[kind]}
    arguments["num_shared_experts"] = 0  # `graft` and `partition` alone fill shared experts
    upcycle(tmp_path / "dense", output=tmp_path / "streamed", max_shard_size="20KB", **arguments)
    sparse = upcycle(str(tmp_path / "dense"), **arguments)
    write_checkpoint(sparse, tmp_path / "saved", tmp_path / "dense", max_shard_size="20KB")
    assert_same_checkpoint(tmp_path / "streamed", tmp_path / "saved")
    for block in sparse.sparse_blocks:
        for tensor in block.gate.state_dict().values():
            assert tensor.isfinite().all()
    assert_same_state(load(name, tmp_path / "streamed"), sparse)


CONSTANT = [kind for kind, fields in ROUTERS.items() if "choice" not in kind and fields.get("norm_topk_prob", True)]


@pytest.mark.parametrize(("name", "kind"), one_each([pair for pair in FAMILY_PAIRS if pair[1] in CONSTANT]))
def test_copies_compute_what_the_dense_model_computes(name, kind):
    fields = {"num_experts": 4, **ROUTERS[kind], "num_shared_experts": 0}
    sparse = upcycle(tiny_dense(name), **fields)
    equality = sparse.receipt["equality"]
    assert equality["max_abs_difference"] <= 1e-5 * max(1.0, equality["max_abs_output"])


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind not in CONSTANT])
def test_copies_are_near_where_the_weights_are_no_constant(kind):
    dense = tiny_dense("bert")
    fields = {"num_experts": 4, **ROUTERS[kind], "num_shared_experts": 0}
    sparse = upcycle(dense, **fields)
    assert sparse.receipt["equality"]["max_abs_difference"] > 1e-5
    inputs = tiny_inputs(dense, labels=False)
    with torch.no_grad():
        first, second = (model(**inputs).logits.flatten() for model in (dense, sparse))
    assert torch.corrcoef(torch.stack([first, second]))[0, 1] > 0.8


# ---- generating -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), one_each(WRITER_PAIRS))
def test_a_cached_step_routes_as_the_full_forward(name, kind):
    model = routed_model(name, kind)
    inputs = {key: tiny_inputs(model, labels=False, pads=2)[key] for key in ("input_ids", "attention_mask")}
    if not model.config.is_encoder_decoder:  # a prompt is padded on the left
        inputs = {key: value.flip(1) for key, value in inputs.items()}
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    written = []
    steps = recorded(model, lambda: written.append(model.generate(**inputs, **arguments)))
    if model.config.is_encoder_decoder:
        whole = inputs | {"decoder_input_ids": written[0][:, :-1]}
    else:
        ids = written[0][:, :-1]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, inputs["input_ids"].shape[1] :])], dim=1)
        whole = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    full = recorded(model, lambda: model(**whole))
    layers = find_mixture_layers(model)
    sides = [layer.block.side for layer in layers]
    count = sides.count("decoder")
    of_decoder = [routing for side, routing in steps if side == "decoder"]
    for place, expected in enumerate(routing for side, routing in full if side == "decoder"):
        index = torch.cat([routing.top_k_index.unflatten(0, (2, -1)) for routing in of_decoder[place::count]], dim=1)
        wanted = expected.top_k_index.unflatten(0, (2, -1))
        assert index.shape == wanted.shape
        real = torch.ones(wanted.shape[:2], dtype=torch.bool)
        if not model.config.is_encoder_decoder:
            real = whole["attention_mask"].bool()
        assert torch.equal(index[real], wanted[real])
    for (_, step), (_, expected) in zip(
        [call for call in steps if call[0] == "encoder"], [call for call in full if call[0] == "encoder"], strict=True
    ):
        assert_close(step.top_k_weights, expected.top_k_weights, rtol=1e-4, atol=1e-5)
        assert torch.equal(step.top_k_index, expected.top_k_index)


@pytest.mark.parametrize("kind", ["expert choice", "hash"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_called_by_itself_routes_as_within_its_model(name, kind):
    model = routed_model(name, kind)
    inputs = tiny_inputs(model, labels=False, pads=3)
    source = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    within = recorded(model, lambda: model(**inputs))
    alone = recorded(model, lambda: model.get_encoder()(**source))
    for (_, actual), (_, expected) in zip(alone, within, strict=False):
        assert torch.equal(actual.top_k_index, expected.top_k_index)
        assert_close(actual.top_k_weights, expected.top_k_weights)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        model.get_encoder()(input_ids=torch.zeros(2, 3, 4, 5, dtype=torch.long))
    assert active_record() is None  # after an error too


@pytest.mark.parametrize(("name", "kind"), one_each(FAMILY_PAIRS))
def test_a_batch_of_pads_or_of_one_token_trains(name, kind):
    model = without_dropout(routed_model(name, kind, router_z_loss_coef=0.1)).train()
    one_token = {key: value[:1, :1] for key, value in tiny_inputs(model).items()}
    pads = tiny_inputs(model, batch=2, length=4)
    pads["attention_mask"][:] = 0
    pads["labels"][:] = -100
    for inputs in (one_token, pads):
        model.zero_grad()
        outputs = model(**inputs, num_items_in_batch=torch.tensor(8))
        outputs.loss.backward()
        assert outputs.loss.isfinite()
        assert outputs.aux_loss is None if kind == "hash" else outputs.aux_loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


# ---- beside the model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("name", ["bert", "llama", "t5_gated"])
def test_export_says_what_stands_in_the_way(name, kind):
    if kind not in routers_of(name):
        pytest.skip("refused by the config")
    report = explain_export(tiny_config(name, **ROUTERS[kind]))
    for reason, field in (("cosine", "scoring_func"), ("hash", "router_type"), ("choice", "router_type")):
        if reason in kind:
            assert report.possible == []
            said = [f"`{field}=" in str(entry.obstacles) for entry in report.targets]
            assert any(said) or name == "bert"  # which has no sparse sibling at all
    assert str(report)


@pytest.mark.parametrize(("name", "kind"), one_each(FAMILY_PAIRS))
def test_routing_statistics_count_what_serves(name, kind):
    model = routed_model(name, kind)
    inputs = tiny_inputs(model, labels=False, batch=3, pads=3)
    statistics = routing_statistics(model, [inputs])
    calls = recorded(model, lambda: model(**inputs))
    for layer, (side, routing) in zip(statistics.layers, calls, strict=True):
        assert layer.side == side
        source = side == "encoder" or not model.config.is_encoder_decoder
        if routing.token_index is not None:
            expected = routing.top_k_index[routing.kept].bincount(minlength=model.config.num_experts)
            assert len(set(expected.tolist())) == 1  # of expert choice the load is even
        else:
            mask = inputs["attention_mask"] if source else torch.ones_like(inputs["decoder_input_ids"])
            expected = (
                routing.top_k_index[mask.flatten().bool()].flatten().bincount(minlength=model.config.num_experts)
            )
        assert layer.counts.sum(0).tolist() == expected.tolist()


@pytest.mark.parametrize(("name", "kind"), one_each(FAMILY_PAIRS))
def test_expert_lora(name, kind):
    model = routed_model(name, kind)
    inputs = tiny_inputs(model, pads=2)
    expected = model(**inputs).logits
    adapted = get_peft_model(model, expert_lora_config(model, r=2))
    assert_close(adapted(**inputs).logits, expected, rtol=1e-4, atol=1e-4)  # B begins as zeros
    adapted.train()
    adapted(**inputs).loss.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    assert any(parameter.grad.abs().max() > 0 for parameter in trained)


def test_the_config_keeps_every_field(tmp_path):
    for kind in ROUTERS:
        tiny_config("bert", **ROUTERS[kind]).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert {key: stored[key] for key in ROUTERS[kind]} == ROUTERS[kind]
        assert (
            hf_sparse_moe.SparseMoeEncoderConfig.from_pretrained(tmp_path).to_dict().items() >= ROUTERS[kind].items()
        )
