"""What lies beside the weights works for the mixture as for its source, however little the source says."""

import json
import shutil

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer

from hf_sparse_moe import export, import_stock, upcycle
from tiny_models import tiny_dense


TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Café au lait, ÜBER  alles: naïve façade",
    "  two  spaces, 3.14 and 2,000 ",
    "Быстрая лиса прыгает через ленивую собаку",
    "Привет, мир",
    "敏捷的棕色狐狸跳过懒狗",
    "こんにちは世界",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_pieces():
    letters = sorted({letter for text in TEXTS for letter in text.lower() if not letter.isspace()} | set("aeiouc"))
    return [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), "the", "quick", "fox", "cafe"]


def bert_json():
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(word_pieces())}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made.to_str()


def byte_pairs():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS * 9, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    return made.to_str()


def byte_pair_files(**first):
    spec = json.loads(byte_pairs())["model"]
    merges = "\n".join(" ".join(pair) if isinstance(pair, list) else pair for pair in spec["merges"])
    vocab = {name: i for i, name in enumerate([*first, *spec["vocab"]])}
    return {"vocab.json": json.dumps(vocab), "merges.txt": f"#version: 0.2\n{merges}\n"}


def pieces(folder):
    path = folder / "trained"
    (folder / "text").write_text("\n".join(TEXTS * 9))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(path), vocab_size=118, character_coverage=1.0, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    return path.with_suffix(".model").read_bytes()


def marian_files(folder):
    model = pieces(folder)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    words = [processor.id_to_piece(i) for i in range(len(processor))]
    vocab = json.dumps({word: i for i, word in enumerate(["</s>", "<unk>", "<pad>", *words[3:]])})
    return {"source.spm": model, "target.spm": model, "vocab.json": vocab}


VOCAB = "\n".join(word_pieces()) + "\n"
NO_CLASS = json.dumps({"model_max_length": 512})
ROBERTA = dict.fromkeys(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
# The architecture, and what lies in the folder beside its weights and config.
TOKENIZERS = {
    "bert, vocab.txt alone": ("bert", lambda folder: {"vocab.txt": VOCAB}),
    "bert, cased, no class": (
        "bert",
        lambda folder: {"vocab.txt": VOCAB, "tokenizer_config.json": '{"do_lower_case": false}'},
    ),
    "bert, tokenizer.json, no class": (
        "bert",
        lambda folder: {"tokenizer.json": bert_json(), "tokenizer_config.json": NO_CLASS},
    ),
    "gpt2, alone": ("gpt2", lambda folder: byte_pair_files(**{"<|endoftext|>": 0})),
    "gpt2, no class": (
        "gpt2",
        lambda folder: byte_pair_files(**{"<|endoftext|>": 0}) | {"tokenizer_config.json": NO_CLASS},
    ),
    "roberta, alone": ("roberta", lambda folder: byte_pair_files(**ROBERTA)),
    "t5, spiece.model alone": ("t5", lambda folder: {"spiece.model": pieces(folder)}),
    "marian": ("marian", marian_files),
    "llama, a class that is not its own": (
        "llama",
        lambda folder: {
            "tokenizer.json": byte_pairs(),
            "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}',
        },
    ),
}


def dense_with(kind, folder):
    architecture, files = TOKENIZERS[kind]
    (folder / "made").mkdir(parents=True)
    tiny_dense(architecture).save_pretrained(folder / "dense")
    for name, content in files(folder / "made").items():
        (folder / "dense" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.rmtree(folder / "made")
    return folder / "dense"


def assert_same_tokenizer(mine, other):
    ours, theirs = AutoTokenizer.from_pretrained(mine), AutoTokenizer.from_pretrained(other)
    assert type(ours) is type(theirs)
    assert dict(ours(TEXTS)) == dict(theirs(TEXTS))
    assert len({tuple(ids) for ids in ours(TEXTS)["input_ids"]}) > 5  # not all of it unknown
    assert dict(ours(TEXTS[0], TEXTS[3])) == dict(theirs(TEXTS[0], TEXTS[3]))
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert type(AutoProcessor.from_pretrained(mine)) is type(AutoProcessor.from_pretrained(other))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizer_is_the_sources(kind, tmp_path):
    dense = dense_with(kind, tmp_path)
    upcycle(dense, 2, output=tmp_path / "mixture")
    assert_same_tokenizer(tmp_path / "mixture", dense)


def test_every_way_carries_it(tmp_path):
    dense = dense_with("llama, a class that is not its own", tmp_path)
    upcycle(dense, 2, output=tmp_path / "streamed")
    upcycle(dense, 2, output=tmp_path / "in_memory", evaluation=[torch.tensor([[1, 2, 3]])])
    export(tmp_path / "streamed", tmp_path / "stock")
    import_stock(tmp_path / "stock", tmp_path / "back")
    for name in ("streamed", "in_memory", "stock", "back"):
        assert_same_tokenizer(tmp_path / name, dense)


def test_a_folder_without_a_tokenizer_gets_none(tmp_path):
    tiny_dense("bert").save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", 2, output=tmp_path / "mixture")
    assert not (tmp_path / "mixture" / "tokenizer_config.json").exists()


def test_files_that_name_their_class_are_copied_byte_for_byte(tmp_path):
    dense = dense_with("bert, vocab.txt alone", tmp_path)
    AutoTokenizer.from_pretrained(dense).save_pretrained(dense)
    modules = {
        "modules.json": "[]",
        "sentence_bert_config.json": "{}",
        "config_sentence_transformers.json": "{}",
        "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
        "10_Dense/model.safetensors": "x",
        "preprocessor_config.json": "{}",
    }
    for name, content in modules.items():
        (dense / name).parent.mkdir(exist_ok=True)
        (dense / name).write_text(content)
    upcycle(dense, 2, output=tmp_path / "mixture")
    for name in (*modules, "vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if (dense / name).exists():
            assert (tmp_path / "mixture" / name).read_bytes() == (dense / name).read_bytes()


def test_every_file_that_a_tokenizer_looks_for_is_carried(tmp_path):
    """A new transformers brings new names of files."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    classes = filter(None, map(tokenizer_class_from_name, filter(None, set(TOKENIZER_MAPPING_NAMES.values()))))
    names = {
        name for each in classes for name in getattr(each, "vocab_files_names", {}).values() if isinstance(name, str)
    }
    from hf_sparse_moe.checkpoints.files import COMPANIONS, copy_own

    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    for name in names:
        (tmp_path / "from" / name).write_text("x")
    copy_own(tmp_path / "from", tmp_path / "to", COMPANIONS)
    assert {path.name for path in (tmp_path / "to").iterdir()} == names
    assert {"vocab.txt", "merges.txt", "source.spm"} <= names
