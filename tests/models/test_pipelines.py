"""The pipelines that transformers still has, with a tokenizer trained on the spot."""

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tiny_models import tiny_sparse


TEXTS = [
    "a mixture of experts sends each token to a few of its experts",
    "the router is a small matrix, and the experts are most of the weights",
    "an even load keeps all of the experts busy",
]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]  # the ids 0 to 4, as the tiny models have them


@pytest.fixture(scope="module")
def tokenizer() -> hf.PreTrainedTokenizerFast:
    model = Tokenizer(models.BPE(unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    model.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=96, special_tokens=SPECIAL, show_progress=False))
    model.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=60,
    )


def saved_pipeline(task: str, name: str, auto_class: type, tokenizer, folder):
    """By folder and task alone, as a user of the checkpoint would make it."""
    tiny_sparse(name, auto_class).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return hf.pipeline(task, model=str(folder))


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_fill_mask(name, tokenizer, tmp_path):
    pipe = saved_pipeline("fill-mask", name, hf.AutoModelForMaskedLM, tokenizer, tmp_path)
    guesses = pipe("the [MASK] is a small matrix", top_k=3)
    assert len(guesses) == 3
    assert guesses[0]["score"] >= guesses[1]["score"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_text_generation(name, tokenizer, tmp_path):
    pipe = saved_pipeline("text-generation", name, hf.AutoModelForCausalLM, tokenizer, tmp_path)
    (written,) = pipe("the router", max_new_tokens=5, do_sample=False)
    assert written["generated_text"].startswith("the router")
    batch = pipe(["the router", "an even load keeps all"], max_new_tokens=5, do_sample=False, batch_size=2)
    assert batch[0][0]["generated_text"] == written["generated_text"]  # the batch is padded


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_text_classification(name, tokenizer, tmp_path):
    pipe = saved_pipeline("text-classification", name, hf.AutoModelForSequenceClassification, tokenizer, tmp_path)
    results = pipe(TEXTS)
    assert {result["label"] for result in results} <= {"LABEL_0", "LABEL_1"}
    assert all(0.5 <= result["score"] <= 1.0 for result in results)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_token_classification(name, tokenizer, tmp_path):
    pipe = saved_pipeline("token-classification", name, hf.AutoModelForTokenClassification, tokenizer, tmp_path)
    entities = pipe(TEXTS[0], aggregation_strategy="simple")
    assert {entity["entity_group"] for entity in entities} <= {"LABEL_0", "LABEL_1"}
    assert entities[0]["start"] == 0


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_feature_extraction(name, tokenizer, tmp_path):
    pipe = saved_pipeline("feature-extraction", name, hf.AutoModel, tokenizer, tmp_path)
    features = torch.tensor(pipe(TEXTS[0]))
    assert features.shape == (1, len(tokenizer(TEXTS[0])["input_ids"]), 32)
    assert torch.isfinite(features).all()
