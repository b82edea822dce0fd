"""A tiny dense model of sentence-transformers in a folder."""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny_models import VOCAB_SIZE, tiny_dense


TEXTS = ["word3 word5 word7", "word9", "word2 word2 word8 word4 word6 word11 word1"]


def save_dense_encoder(folder: Path) -> Path:
    """With the first token's state as pooling, which is not the default, and a projection with weights of its own."""
    torch.manual_seed(0)
    dense = tiny_dense("bert")
    dense.base_model.save_pretrained(folder / "plain")
    save_word_tokenizer(folder / "plain", model_max_length=16)
    size = dense.config.hidden_size
    pooled = [Transformer(str(folder / "plain")), Pooling(size, pooling_mode="cls"), Dense(size, 8), Normalize()]
    SentenceTransformer(modules=pooled, device="cpu", prompts={"query": "word5 "}).save(str(folder / "dense"))
    return folder / "dense"


def save_word_tokenizer(folder: Path, **options) -> None:
    """`word7` is token 7."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"word{i}": i for i in range(1, VOCAB_SIZE)}}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]", **options)
    tokenizer.save_pretrained(folder)
