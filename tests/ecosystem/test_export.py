"""A mixture as a graph without the loop of `eager`: torch.export, torch.onnx and transformers' own exporter."""

import onnxruntime
import pytest
import torch
import transformers as hf

from tiny_models import tiny_inputs, tiny_sparse


HEADS = {
    "bert": hf.AutoModelForSequenceClassification,
    "modernbert": hf.AutoModelForSequenceClassification,
    "llama": hf.AutoModelForCausalLM,
    "gpt2": hf.AutoModelForCausalLM,
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def mixture(name, auto_class=None, **fields):
    return tiny_sparse(name, auto_class or HEADS[name], dense_fields={"use_cache": False}, **fields)


class MeanOfTokens(torch.nn.Module):
    """Embeddings as sentence-transformers makes them."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def example(model):
    return tiny_inputs(model, labels=False, batch=3, length=9, pads=2)


def others(model):
    """Another batch and length, and other experts than those of the example."""
    return [
        tiny_inputs(model, labels=False, batch=batch, length=length, pads=pads, seed=length)
        for batch, length, pads in ((2, 13, 4), (1, 5, 0), (7, 40, 11))
    ]


def dynamic(inputs):
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}
    return dict.fromkeys(inputs, sizes)


@pytest.mark.parametrize("implementation", ["eager", "sparse_moe"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_torch_export_has_no_loop_over_the_experts_of_its_example(name, implementation):
    model = mixture(name)
    model.set_experts_implementation(implementation)
    inputs = example(model)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic(inputs)).module()
    for inputs in others(model):
        with torch.no_grad():
            torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("fields", [{"scoring_func": "sigmoid"}, {"scoring_func": "cosine"}, {"router_type": "hash"}])
def test_torch_export_of_other_routers(fields):
    model = mixture("llama", **fields)
    inputs = example(model)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic(inputs)).module()
    for inputs in others(model):
        with torch.no_grad():
            torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits)


def test_experts_that_no_grouped_product_takes_are_exported_too():
    model = tiny_sparse("llama", dense_fields={"intermediate_size": 49, "use_cache": False})
    model.set_experts_implementation("eager")
    inputs = example(model)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic(inputs)).module()
    for inputs in others(model):
        with torch.no_grad():
            torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits)


def run(session, inputs):
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", pytest.param("modernbert", marks=pytest.mark.conformance)])
def test_onnxruntime_computes_the_same_logits(name, tmp_path):
    model = mixture(name)
    model.set_experts_implementation("eager")
    inputs = example(model)
    torch.onnx.export(
        model, (), tmp_path / "model.onnx", kwargs=inputs, dynamo=True, dynamic_shapes=dynamic(inputs), verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for inputs in others(model):
        with torch.no_grad():
            torch.testing.assert_close(run(session, inputs), model(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_onnxruntime_computes_the_same_embeddings(tmp_path):
    encoder = mixture("bert", hf.AutoModel)
    model = MeanOfTokens(encoder).eval()
    inputs = example(encoder)
    torch.onnx.export(
        model, (), tmp_path / "model.onnx", kwargs=inputs, dynamo=True, dynamic_shapes=dynamic(inputs), verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for inputs in others(encoder):
        with torch.no_grad():
            torch.testing.assert_close(run(session, inputs), model(**inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.conformance
def test_the_exporter_of_transformers_keeps_one_product_an_expert(tmp_path):
    """`torch.onnx` alone gathers a copy of the weights for each token and expert."""
    exporters = pytest.importorskip("transformers.exporters", reason="transformers 5.20 has no exporters")
    model = mixture("bert")
    exported = exporters.OnnxExporter().export(model, example(model), exporters.OnnxConfig(dynamic=True))
    products = [node for node in exported.program.graph if node.op_type == "MatMul"]
    assert len(products) >= 2 * model.config.num_experts * model.config.num_hidden_layers
    exported.save_pretrained(tmp_path)
    exported = exporters.ExportedModel.from_pretrained(tmp_path)
    for inputs in others(model):
        with torch.no_grad():
            torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-4)
