"""What the monitor logs: equal to a count by hand, however a batch is split, and where it goes."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from adapted_models import stock_mixture
from hf_sparse_moe.routing import RoutingMonitor, SelectionBiasCallback, find_mixture_layers
from hf_sparse_moe.routing.routing_monitor import _balance_remedy, layer_labels
from hf_sparse_moe.routing.training_events import TrainingEvents
from monitored_training import make_model, make_rows, make_trainer
from tiny_models import FAMILIES, tiny_dense, tiny_sparse


def routed_by_hand(model, rows):
    """For each sparse layer the (logits, experts) of every token that counts, from one row at a time."""
    layers = find_mixture_layers(model)
    logits, chosen, tokens = ([[] for _ in layers] for _ in range(3))
    handles = []
    for place, layer in enumerate(layers):
        # What the experts are called with is what happened.
        handles += [
            layer.router.register_forward_hook(lambda m, args, out, place=place: logits[place].append(out[0])),
            layer.experts.register_forward_pre_hook(lambda m, args, place=place: chosen[place].append(args[1])),
        ]
    model.eval()
    with torch.no_grad():
        for row in rows:
            model(**{name: value[None] for name, value in row.items()})
            for place, layer in enumerate(layers):
                in_decoder = model.config.is_encoder_decoder and ".decoder." in layer.name
                counts = row["labels"] != -100 if in_decoder else row["attention_mask"] == 1
                for token in counts.nonzero().flatten().tolist():
                    tokens[place].append((logits[place][-1][token].double(), chosen[place][-1][token].tolist()))
    for handle in handles:
        handle.remove()
    return tokens


def health_by_hand(tokens, sigmoid=False):
    experts = len(tokens[0][0])
    counts = [sum(chosen.count(expert) for _, chosen in tokens) for expert in range(experts)]
    load = [count / sum(counts) for count in counts]
    confidence = z_loss = 0.0
    for logits, _ in tokens:
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        confidence += (scores / scores.sum()).max().item() / len(tokens)
        z_loss += logits.exp().sum().log().item() ** 2 / len(tokens)
    return {
        "load_max": max(load),
        "load_min": min(load),
        "max_violation": max(load) * experts - 1,
        "entropy": -sum(share * math.log(share) for share in load if share) / math.log(experts),
        "dead_experts": counts.count(0),
        "confidence": confidence,
        "dropped": 0.0,
        "z_loss": z_loss,
        "non_finite": 0,
    }


def expected_logs(model, rows, sigmoid=False):
    layers = [health_by_hand(tokens, sigmoid) for tokens in routed_by_hand(model, rows)]
    logs = {
        f"router/{label}/{name}": value
        for label, layer in zip(layer_labels(find_mixture_layers(model)), layers, strict=True)
        for name, value in layer.items()
    }
    for name in layers[0]:
        values = [layer[name] for layer in layers]
        together = {"load_max": max, "load_min": min, "dead_experts": sum, "non_finite": sum}.get(
            name, lambda v: sum(v) / len(v)
        )
        logs[f"router/{name}"] = together(values)
    return logs


def router_part(log):
    return {name: value for name, value in log.items() if name.startswith("router/")}


def train_once_over(model, folder, batch_size=4, accumulation=1, **arguments):
    """All 16 rows in one log."""
    steps = 16 // (batch_size * accumulation)
    arguments |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    monitor = RoutingMonitor(log_layers=True)
    trainer = make_trainer(
        model, folder, make_rows(model), monitor=monitor, max_steps=steps, logging_steps=steps, **arguments
    )
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "deepseek_v3"])
def test_logs_equal_a_count_by_hand_on_every_split(family, batch_size, accumulation, tmp_path):
    model = make_model(family)
    expected = expected_logs(model, make_rows(model), sigmoid=family == "deepseek_v3")
    log = train_once_over(model, tmp_path, batch_size, accumulation)
    assert router_part(log) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not math.isclose(expected["router/max_violation"], 0, abs_tol=0.05)  # the count has something to miss


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["decoder", "mixtral"])
def test_the_second_pass_of_gradient_checkpointing_does_not_count(family, reentrant, tmp_path):
    plain = train_once_over(make_model(family), tmp_path)
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model = make_model(family)
    monitor = RoutingMonitor(log_layers=True)
    trainer = make_trainer(model, tmp_path, make_rows(model), monitor=monitor, logging_steps=4, **arguments)
    tokens = []
    trainer.add_callback(Spy(lambda: tokens.append(monitor._sums[:, 0].tolist())))
    trainer.train()
    assert router_part(trainer.state.log_history[0]) == pytest.approx(router_part(plain), rel=1e-5)
    counted = [sum(int(row["attention_mask"].sum()) for row in make_rows(model)[:4])] * 2
    assert tokens[0] == counted


class Spy(TrainerCallback):
    def __init__(self, at_step_end):
        self.at_step_end = at_step_end

    def on_step_end(self, args, state, control, **kwargs):
        self.at_step_end()


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_two_ranks_log_what_one_does(family, tmp_path, train_on_two_ranks):
    fields = {"router_z_loss_coef": 0.1}
    one = train_once_over(make_model(family, **fields), tmp_path, 8, 1)
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    two = train_on_two_ranks(family, fields, max_steps=2, logging_steps=2, **arguments)["log_history"][0]
    assert router_part(two) == pytest.approx(router_part(one), rel=1e-5)
    assert two["task_loss"] == pytest.approx(one["task_loss"], rel=1e-5)


def test_pads_do_not_count_whatever_their_logits(tmp_path):
    def log(pad_id):
        model = make_model("decoder")
        rows = make_rows(model)
        for row in rows:
            row["input_ids"] = torch.where(row["attention_mask"] == 1, row["input_ids"], pad_id)
        trainer = make_trainer(model, tmp_path, rows, monitor=RoutingMonitor(log_layers=True))
        trainer.train()
        return router_part(trainer.state.log_history[0])

    assert log(0) == pytest.approx(log(40), rel=1e-5)


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_dropped_share_is_that_of_the_routers(family, tmp_path):
    model = make_model(family, capacity_factor=0.75)
    lost = offered = 0
    blocks = model.sparse_blocks

    def count(block, args, output):
        nonlocal lost, offered
        mask = masks[block.side][current[0]].reshape(-1)
        lost += (~output.kept[mask]).sum().item()
        offered += mask.sum().item() * 2

    rows = make_rows(model)
    batches = [{name: torch.stack([row[name] for row in rows[at : at + 4]]) for name in rows[0]} for at in (0, 4)]
    of_labels = "labels" if family == "encoder_decoder" else None
    masks = {
        "encoder": [batch["attention_mask"] == 1 for batch in batches],
        "decoder": [batch["labels"] != -100 if of_labels else batch["attention_mask"] == 1 for batch in batches],
    }
    current = [0]
    handles = []
    for block in blocks:
        handles.append(block.gate.register_forward_hook(lambda m, a, o, block=block: count(block, a, o)))
    model.train()
    for current[0], batch in enumerate(batches):
        model(**batch)
    for handle in handles:
        handle.remove()
    trainer = make_trainer(model, tmp_path, rows, monitor=RoutingMonitor(log_layers=True))
    trainer.train()
    log = trainer.state.log_history[0]
    if family == "decoder":  # both layers see the same tokens, so that the mean over the layers is that over all
        assert log["router/dropped"] == pytest.approx(lost / offered, rel=1e-6)
    assert 0.1 < lost / offered < 0.5
    assert log["router/dropped"] == pytest.approx(lost / offered, rel=0.1)


def test_expert_choice_counts_what_the_experts_took(tmp_path):
    model = make_model("encoder", router_type="expert_choice", capacity_factor=1.0)
    reached, tokens = [], []
    rows = make_rows(model)
    model.train()
    for at in (0, 4):
        batch = {name: torch.stack([row[name] for row in rows[at : at + 4]]) for name in rows[0]}
        counts = batch["attention_mask"].reshape(-1) == 1
        found = []
        handles = [
            block.gate.register_forward_hook(lambda m, a, o, found=found: found.append(o))
            for block in model.sparse_blocks
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
        for routing in found:
            taken = set(routing.token_index[routing.kept.flatten()].tolist())
            reached.append(len(taken & set(counts.nonzero().flatten().tolist())))
            tokens.append(int(counts.sum()))
    trainer = make_trainer(model, tmp_path, rows, monitor=RoutingMonitor())
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["router/max_violation"] == pytest.approx(0.0, abs=1e-6)
    assert log["router/dropped"] == pytest.approx(1 - sum(reached) / sum(tokens), rel=1e-5)


def test_large_layers_are_counted_at_once(tmp_path, monkeypatch):
    together = train_once_over(make_model("encoder_decoder"), tmp_path)
    monkeypatch.setattr("hf_sparse_moe.routing.training_events.MAX_PENDING_LOGITS", 1)
    assert router_part(train_once_over(make_model("encoder_decoder"), tmp_path)) == pytest.approx(
        router_part(together), rel=1e-6
    )


class Reporter(TrainerCallback):
    """Stands where the integrations of `report_to` stand: before the callbacks that a user adds."""

    def __init__(self):
        self.received = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.received.append(dict(logs))


@pytest.mark.parametrize("log_layers", [True, False])
def test_integrations_and_history_get_the_numbers_and_evaluations_do_not(log_layers, tmp_path):
    model = make_model("encoder", output_router_logits=True)  # in evaluation too
    rows = make_rows(model)
    reporter, monitor = Reporter(), RoutingMonitor(log_layers=log_layers)
    trainer = make_trainer(model, tmp_path, rows, [reporter], monitor, eval_strategy="steps", eval_steps=2)
    trainer.train()
    for logs in (reporter.received, trainer.state.log_history):
        ours = ["router/entropy" in log and "task_loss" in log for log in logs]
        assert ours == ["loss" in log for log in logs]
        assert ["router/layer_1/entropy" in log for log in logs] == [log_layers and "loss" in log for log in logs]
    # The evaluation between the two logs counts for neither.
    second = [log for log in trainer.state.log_history if "loss" in log][1]
    assert second["router/entropy"] == pytest.approx(expected_logs(model, rows[8:])["router/entropy"], rel=1e-5)


def test_forward_passes_without_gradient_do_not_count(tmp_path):
    model = make_model("decoder")
    rows = make_rows(model)

    class Reference(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            with torch.no_grad():
                model.train()(**{name: value[None] for name, value in rows[0].items()})

    trainer = make_trainer(model, tmp_path, rows, [Reference()], RoutingMonitor(log_layers=True))
    trainer.train()
    expected = expected_logs(make_model("decoder"), rows[:8])
    assert router_part(trainer.state.log_history[0]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", ["decoder", "mixtral"])
def test_the_mixture_is_found_inside_peft(family, tmp_path):
    rows = make_rows(make_model(family))
    model = get_peft_model(make_model(family), LoraConfig(target_modules=["q_proj"]))
    monitor = RoutingMonitor(log_layers=True)
    trainer = make_trainer(model, tmp_path, rows, monitor=monitor, logging_steps=4, label_names=["labels"])
    trainer.train()
    expected = expected_logs(make_model(family), rows)
    assert router_part(trainer.state.log_history[0]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_compiled_model_logs_the_same(tmp_path):
    plain = train_once_over(make_model("decoder"), tmp_path)
    compiled = train_once_over(make_model("decoder"), tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert router_part(compiled) == pytest.approx(router_part(plain), rel=1e-4)
    assert compiled["task_loss"] == pytest.approx(plain["task_loss"], rel=1e-4)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_stays_on_the_model(tmp_path):
    model = make_model("decoder")
    before = hooks_of(model)
    rows = make_rows(model)
    trainer = make_trainer(model, tmp_path, rows, monitor=RoutingMonitor(log_layers=True))
    trainer.train()
    assert hooks_of(model) == before

    class Failure(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer.add_callback(Failure())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Failure)
    trainer.train()  # the interrupted training's hooks are gone, and count nothing twice
    assert hooks_of(model) == before
    expected = expected_logs(make_model("decoder"), rows[:8])
    assert router_part(trainer.state.log_history[0]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_dense_model_is_refused(tmp_path):
    model = tiny_dense("decoder")
    trainer = make_trainer(model, tmp_path, make_rows(model), monitor=RoutingMonitor())
    with pytest.raises(ValueError, match="no sparse layer"):
        trainer.train()


@pytest.mark.parametrize("argument", [{"starvation": -0.1}, {"patience": 0}, {"min_evenness": math.nan}])
def test_thresholds_that_make_no_sense_are_refused(argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        RoutingMonitor(**argument)


def test_layers_are_numbered_as_in_the_model():
    model = tiny_sparse("decoder", mlp_layer_types=["dense", "sparse"])
    assert layer_labels(find_mixture_layers(model)) == ["layer_1"]
    model = tiny_sparse("bart", encoder_mlp_layer_types=["dense", "sparse"])
    labels = layer_labels(find_mixture_layers(model))
    assert labels == ["encoder_layer_1", "decoder_layer_0", "decoder_layer_1"]


def test_tensorboard_holds_every_key(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model = make_model("decoder", router_z_loss_coef=0.1)
    trainer = make_trainer(model, tmp_path, make_rows(model), monitor=RoutingMonitor(), report_to=["tensorboard"])
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    log = trainer.state.log_history[0]
    assert {"task_loss", "aux_loss", "z_loss", "router/max_violation", "router/layer_1/entropy"} <= set(log)
    for name in ("task_loss", "aux_loss", "z_loss", *router_part(log)):
        first = events.Scalars(f"train/{name}")[0]
        assert (first.step, first.value) == (2, pytest.approx(log[name]))


def test_trackio_holds_the_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    model = make_model("decoder")
    arguments = {"report_to": ["trackio"], "project": "monitor", "run_name": "tiny"}
    trainer = make_trainer(model, tmp_path, make_rows(model), monitor=RoutingMonitor(), **arguments)
    trainer.train()
    logged = [row for row in SQLiteStorage.get_logs("monitor", "tiny") if "train/loss" in row]
    log = trainer.state.log_history[0]
    for name in ("task_loss", "aux_loss", *router_part(log)):
        assert logged[0][f"train/{name}"] == pytest.approx(log[name])


def test_a_bias_that_nothing_moves_is_noticed(tmp_path, warnings_of_ours):
    def train(*callbacks):
        model = make_model("decoder", scoring_func="sigmoid", router_bias_update_speed=0.01)
        make_trainer(model, tmp_path, make_rows(model), callbacks, RoutingMonitor()).train()
        return [message for message in warnings_of_ours() if "router_bias_update_speed" in message]

    (message,) = train()
    assert "SelectionBiasCallback" in message
    assert train(SelectionBiasCallback()) == []


@pytest.mark.parametrize("family", ["decoder", "mixtral"])
def test_a_collapsed_router_is_named_with_its_remedy(family, tmp_path, warnings_of_ours):
    model = make_model(family)
    block = find_mixture_layers(model)[1].block

    def one_direction(module, args):
        return (torch.ones_like(args[0]) + 0.001 * args[0],)

    block.register_forward_pre_hook(one_direction)  # every token looks the same to this layer
    # 30 tokens a step are few: a window gathers enough of them, whatever `patience` allows.
    rows = make_rows(model) * 8
    make_trainer(model, tmp_path, rows, monitor=RoutingMonitor(patience=4), max_steps=32).train()
    messages = warnings_of_ours()
    collapsed = [message for message in messages if "collapse" in message]
    assert len(collapsed) == 1  # once, though both logs saw it
    assert "layer_1" in collapsed[0]
    assert "Expert" in collapsed[0]
    assert "router_aux_loss_coef" in collapsed[0]


def test_a_forward_pass_that_fails_counts_for_nothing():
    model = make_model("decoder").train()
    inputs = {name: value[None] for name, value in make_rows(model)[0].items()}
    calls = []
    routing = TrainingEvents(model, find_mixture_layers(model), calls.extend)
    with pytest.raises(ValueError, match="batch_size"):
        model(**{**inputs, "labels": inputs["labels"].repeat(2, 1)})  # the layers have run by then
    model(**inputs)
    routing.remove()
    model(**inputs)
    assert [event.layer.name for event in calls] == ["dense.model.layers.0.mlp", "dense.model.layers.1.mlp"]


@pytest.mark.parametrize("family", ["decoder", "mixtral"])
def test_router_logits_that_are_not_finite_are_counted_and_told(family, tmp_path, warnings_of_ours):
    model = make_model(family)
    block = find_mixture_layers(model)[1].block

    def spoil(module, args):
        spoilt = args[0].clone()
        spoilt.view(-1, spoilt.shape[-1])[:3] = math.nan  # of the first three tokens of each micro-batch
        return (spoilt,)

    block.register_forward_pre_hook(spoil)
    monitor, steps = RoutingMonitor(log_layers=True), {"max_steps": 1, "logging_steps": 1}
    trainer = make_trainer(model, tmp_path, make_rows(model), monitor=monitor, **steps)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["router/non_finite"] == log["router/layer_1/non_finite"] == 3
    assert log["router/layer_0/non_finite"] == 0
    told = [message for message in warnings_of_ours() if "layer_1" in message]
    assert len(told) == 1  # not of a collapse, whose remedy would be a higher coefficient
    assert "NaN or infinity for 3 tokens" in told[0]


def test_the_remedy_for_a_stock_mixture_is_one_that_it_has():
    ours, stock = tiny_sparse("llama"), stock_mixture("mixtral")
    said = _balance_remedy(find_mixture_layers(ours), ours.config)
    assert said == f"Raise `router_aux_loss_coef` ({ours.config.router_aux_loss_coef} now)."
    said = _balance_remedy(find_mixture_layers(stock), stock.config)
    assert "`fix_balance(model, router_aux_loss_coef=0.01)`, or `import_stock`" in said
    assert "Raise" not in said


def test_of_a_hash_nothing_is_logged_that_says_nothing(tmp_path):
    model = tiny_sparse("llama", router_type="hash", router_aux_loss_coef=0.01, router_z_loss_coef=0.1)
    assert "router_aux_loss_coef" not in _balance_remedy(find_mixture_layers(model), model.config)
    trainer = make_trainer(model, tmp_path, make_rows(model), monitor=RoutingMonitor(), max_steps=2, logging_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["task_loss"])
    assert not {"aux_loss", "z_loss", "router/confidence", "router/z_loss"} & log.keys()
    assert {"router/entropy", "router/max_violation", "router/dead_experts"} <= log.keys()
