"""A byte-level tokenizer that can write anything, and a few texts in two groups."""

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from tiny_models import tiny_sparse


VOCAB_SIZE = 320
TEXTS = [
    "A law about the court and its clerks.",
    "def area(x): return x * x",
    "The court may order <script>alert(1)</script> to be struck out.",
    "for row in rows: print(row)",
    "Whoever breaks the law is fined.",
    "import os\nimport sys",
]
GROUPS = ["law", "code"] * 3


@pytest.fixture(scope="session")
def tokenizer():
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(
        TEXTS, VOCAB_SIZE, min_frequency=1, show_progress=False, special_tokens=["<pad>", "<s>", "</s>", "<mask>"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


@pytest.fixture
def mixture():
    """`mixture("llama")`: a tiny mixture with the tokenizer's vocabulary."""

    def make(name, **fields):
        return tiny_sparse(name, dense_fields={"vocab_size": VOCAB_SIZE}, **fields)

    torch.manual_seed(0)
    return make
