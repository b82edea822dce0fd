"""
Train a sparse encoder or decoder to embed texts, through sentence-transformers: on pairs of texts that belong together
(retrieval), or on pairs with a score (similarity).

    python training/run_embeddings.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --num_experts 8 \
        --train_file questions.jsonl.gz --text_column question --second_text_column answer --output_dir outputs/search
"""

import sys
from dataclasses import dataclass, field

from datasets import Dataset, DatasetDict
from transformers import AutoModel, PreTrainedConfig


try:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.evaluation import (
        EmbeddingSimilarityEvaluator,
        InformationRetrievalEvaluator,
    )
    from sentence_transformers.sentence_transformer.modules import Transformer
except ModuleNotFoundError as error:
    print(f"error: {error}. Install it: pip install 'hf-sparse-moe[embeddings]'", file=sys.stderr)
    raise SystemExit(2) from error

import recipe


OF_PAIRS = {"multiple_negatives": losses.MultipleNegativesRankingLoss}
OF_SCORES = {"cosent": losses.CoSENTLoss, "cosine": losses.CosineSimilarityLoss}


@dataclass
class EmbeddingArguments(recipe.DataArguments):
    text_column: str = field(default="text", metadata={"help": "The first text of a pair, such as a question."})
    second_text_column: str = field(default="second_text", metadata={"help": "The second, such as its answer."})
    negative_column: str | None = field(
        default=None, metadata={"help": "A text that resembles the second and does not belong to the first."}
    )
    score_column: str | None = field(
        default=None,
        metadata={"help": "How similar the texts are, from 0 to --max_score. Without it, they belong together."},
    )
    max_score: float = field(default=1.0, metadata={"help": "The score of texts that mean the same; STS-B: 5."})
    loss: str | None = field(
        default=None,
        metadata={
            "help": "multiple_negatives (the default without scores: the other texts of a batch are wrong answers), "
            "cosent (the default with scores: their order counts) or cosine (their size)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = OF_PAIRS if self.score_column is None else OF_SCORES
        self.loss = self.loss or next(iter(allowed))
        if self.loss not in allowed:
            having = "without" if self.score_column is None else "with"
            raise ValueError(f"`--loss={self.loss}` {having} `--score_column` must be one of {tuple(allowed)}.")
        if self.negative_column is not None and self.score_column is not None:
            raise ValueError("`--negative_column` belongs to pairs without `--score_column`. Leave one of them out.")


@dataclass
class EmbeddingTrainingArguments(recipe.TrainingArguments, SentenceTransformerTrainingArguments):
    batch_sampler: str = field(
        default="no_duplicates",
        metadata={"help": "no_duplicates: no text twice in a batch, where it would be a wrong answer to itself."},
    )


class EmbeddingTrainer(SentenceTransformerTrainer):
    """Writes no card of its own beside the weights, over the recipe's."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.model.save_pretrained(output_dir or self.args.output_dir, create_model_card=False)


def load_encoder(args: recipe.ModelArguments, config: PreTrainedConfig) -> SentenceTransformer:
    """The checkpoint's own pooling and normalisation, or mean pooling, around a model that is still the dense one."""
    if config.is_encoder_decoder:
        raise ValueError(
            f"`{args.model_name_or_path}` is an encoder-decoder, of which sentence-transformers embeds with the "
            "encoder alone, and a mixture has both. Pass an encoder or a decoder."
        )
    encoder = SentenceTransformer(args.model_name_or_path, revision=args.model_revision, device="cpu")
    if not isinstance(encoder[0], Transformer):
        raise ValueError(
            f"`{args.model_name_or_path}` begins with a `{type(encoder[0]).__name__}`, not a transformer. Pass an "
            "encoder or a decoder."
        )
    return encoder


def as_pairs(data: DatasetDict, args: EmbeddingArguments) -> DatasetDict:
    """The columns by the names and in the order that sentence-transformers takes them; scores from 0 to 1."""
    columns = {"anchor": args.text_column, "positive": args.second_text_column}
    columns |= {} if args.negative_column is None else {"negative": args.negative_column}
    pairs = DatasetDict()
    for split, rows in data.items():
        texts = {name: recipe.column(rows, column) for name, column in columns.items()}
        for name, values in texts.items():
            if not all(isinstance(value, str) and value.strip() for value in values):
                raise ValueError(
                    f"The column `{columns[name]}` of the {split} data has rows without text. Remove them."
                )
        if args.score_column is not None:
            scores = recipe.column(rows, args.score_column)
            if not all(isinstance(score, int | float) and 0 <= score <= args.max_score for score in scores):
                raise ValueError(
                    f"`--score_column={args.score_column}` of the {split} data has values that are no numbers from 0 "
                    f"to {args.max_score:g}. Pass the scores' `--max_score`."
                )
            texts["score"] = [score / args.max_score for score in scores]
        pairs[split] = Dataset.from_dict(texts)
    return pairs


def evaluator(pairs: Dataset, batch_size: int) -> EmbeddingSimilarityEvaluator | InformationRetrievalEvaluator:
    """Correlation with the scores; or how well each first text finds its second among all of the validation data."""
    if "score" in pairs.column_names:
        texts = (pairs["anchor"], pairs["positive"], pairs["score"])
        return EmbeddingSimilarityEvaluator(*map(list, texts), batch_size=batch_size, write_csv=False)
    # The same text may stand in several rows: it is one question, or one answer.
    queries = {text: str(place) for place, text in enumerate(dict.fromkeys(pairs["anchor"]))}
    corpus = {text: str(place) for place, text in enumerate(dict.fromkeys(pairs["positive"]))}
    relevant: dict[str, set[str]] = {}
    for question, answer in zip(pairs["anchor"], pairs["positive"], strict=True):
        relevant.setdefault(queries[question], set()).add(corpus[answer])
    return InformationRetrievalEvaluator(
        {key: text for text, key in queries.items()},
        {key: text for text, key in corpus.items()},
        relevant,
        accuracy_at_k=[1],
        precision_recall_at_k=[10],
        batch_size=batch_size,
        write_csv=False,
    )


def metric_names(encoder: SentenceTransformer, scored: bool) -> list[str]:
    """What the [`evaluator`] calls its numbers."""
    kind = encoder.similarity_fn_name
    if scored:
        return [f"pearson_{kind}", f"spearman_{kind}"]
    names = ("accuracy@1", "precision@10", "recall@10", "ndcg@10", "mrr@10", "map@100")
    return [f"{kind}_{name}" for name in names]


def main() -> None:
    with recipe.stop_on_bad_input():
        model_args, data_args, args = recipe.parse_arguments(
            __doc__, recipe.ModelArguments, EmbeddingArguments, EmbeddingTrainingArguments
        )
        for argument in ("config_name", "distributed_config"):
            if getattr(model_args, argument) is not None:
                raise ValueError(
                    f"`--{argument}` is not for embeddings: train the model with run_mlm.py first, and pass its "
                    "folder as `--model_name_or_path`."
                )
        data = recipe.load_data(data_args)
        recipe.require_columns(
            data,
            text_column=data_args.text_column,
            second_text_column=data_args.second_text_column,
            negative_column=data_args.negative_column,
            score_column=data_args.score_column,
        )
        pairs = as_pairs(data, data_args)
        config = recipe.load_config(model_args, None)
        encoder = load_encoder(model_args, config)
        tokenizer = encoder.tokenizer
        names = metric_names(encoder, scored=data_args.score_column is not None)
        recipe.check_best_metric(args, names, of_predictions=False)
        encoder.max_seq_length = recipe.sequence_length(data_args, tokenizer, config)
        encoder[0].model = recipe.load_model(model_args, AutoModel, config, tokenizer, args.seed)

    validation = pairs.get("validation")
    loss = (OF_PAIRS | OF_SCORES)[data_args.loss]
    trainer = EmbeddingTrainer(
        model=encoder.to(args.device),
        args=args,
        train_dataset=pairs.get("train"),
        eval_dataset=validation,
        loss=loss(encoder),
        evaluator=None if validation is None else evaluator(validation, args.per_device_eval_batch_size),
    )
    recipe.train_and_evaluate(
        trainer,
        data_args,
        "correlations are of the embeddings' cosines with the scores"
        if data_args.score_column
        else "each first text of the validation data searches among all second texts of it",
    )


if __name__ == "__main__":
    main()
