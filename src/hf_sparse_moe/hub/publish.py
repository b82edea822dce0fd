"""Publishing in one commit, so that a repository never holds half of a model."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerState

from hf_sparse_moe.checkpoints.config import read_config
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.source import named_architecture
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME
from hf_sparse_moe.upcycling.surgery_checks import last_surgery

from .adapter_files import ADAPTER_CONFIG, Adapter, is_adapter, read_adapter
from .adapter_publish import save_adapter, stage_adapter
from .checkpoint import Checkpoint, SurgeryResult, read_checkpoint
from .errors import NOT_DONE, PASSING, raise_hub_error, retried
from .evaluation_results import RESULTS_FILE, write_evaluation_results
from .fingerprint import FINGERPRINT_NAME, is_wanted, make_fingerprint
from .model_card import render_model_card
from .publishable import checked_for_tokens, publishable_files


if TYPE_CHECKING:
    from peft import PeftModel

# What an earlier push may have left that this model does not have: `from_pretrained` prefers an old single file to new
# shards, and the others describe the weights beside them.
SUPERSEDABLE = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
    r"|adapter_model\.(safetensors|bin)|(expert_lora|adapter_base)\.json"
    r"|(receipt|fingerprint|training_record|routing_statistics)\.json|expert_load\.png"
    rf"|{re.escape(RESULTS_FILE)}",
    re.ASCII,
)
REPORT_NAME = "routing.html"


@dataclass(frozen=True)
class PushReport:
    """
    What [`push`] did.

    Args:
        commit ([`~huggingface_hub.CommitInfo`]): Its `oid` pins what was published.
        files (`list[str]`): The files that the repository now has of it.
        left_out (`list[str]`): What of the folder was not published.
    """

    commit: CommitInfo
    files: list[str]
    left_out: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values: the commit's id and its address, or that of the pull request."""
        url = self.commit.pr_url or str(self.commit)
        return {"commit": self.commit.oid, "url": url, "files": self.files, "left_out": self.left_out}


def push(
    what: PreTrainedModel | PeftModel | Trainer | str | Path,
    repo_id: str | None = None,
    *,
    base: str | Path | None = None,
    adapter_name: str = "default",
    tokenizer: PreTrainedTokenizerBase | None = None,
    evaluation: Mapping[str, Any] | TrainerState | None = None,
    license: str | None = None,
    language: str | Iterable[str] | None = None,
    tags: str | Iterable[str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tag: str | None = None,
    max_shard_size: int | str = "50GB",
    fingerprint: bool | None = None,
    with_report: str | Path | None = None,
    token: bool | str | None = None,
) -> PushReport:
    """
    Publish a model or an adapter with its code, card and receipt as one commit, which also deletes the weight files
    that it supersedes.

    Pickles, training states, links that lead elsewhere and whatever else is not part of a checkpoint are left out. The
    card keeps what a person wrote in the folder's README.md or the Hub's. An adapter is compared with its base before
    anything is sent. A commit whose answer was lost is not made twice; large files that arrived are not sent again.

    Args:
        what (`PreTrainedModel`, `PeftModel`, `Trainer`, `str` or `Path`):
            A mixture or a stock model, an adapter, a trainer of either, or the folder of a saved one, which stays as
            it is. Every process of a training calls it with the trainer, so that weights which are spread over them
            are gathered; other models that are sharded must be consolidated first.
        repo_id (`str`):
            `"user/name"`, or a name in your own namespace. Created if it does not exist. A trainer's defaults to its
            `hub_model_id`.
        base (`str` or `Path`, *optional*): Folder or Hub id of an adapter's base. Defaults to the one that it names.
        adapter_name (`str`, defaults to `"default"`): Which adapter of a `PeftModel`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Published in the same commit, with a model in memory.
        evaluation (`dict` or `TrainerState`, *optional*): Measured results for the card, see [`render_model_card`].
        license (`str`, *optional*): Such as `"apache-2.0"`.
        language (`str` or `Iterable[str]`, *optional*): Codes, such as `"en"`.
        tags (`str` or `Iterable[str]`, *optional*): Further tags of the card.
        private (`bool`, *optional*): For a new repository. Defaults to the namespace's own setting.
        revision (`str`, *optional*): A branch, created from main if it does not exist. Defaults to main.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of writing to the branch.
        commit_message (`str`, *optional*): Defaults to `"Upload <class>"`, or `"Upload adapter"`.
        commit_description (`str`, *optional*): Text below the message.
        tag (`str`, *optional*): A name for the commit. One that names another commit is never moved.
        max_shard_size (`int` or `str`, defaults to `"50GB"`): Of one weight file, for a model in memory.
        fingerprint (`bool`, *optional*):
            Whether to publish outputs on a fixed sequence, which [`doctor`] compares wherever the checkpoint arrives.
            The weights are loaded for it once; of an adapter its base too. Defaults to True up to 4 GiB of weights.
        with_report (`str` or `Path`, *optional*):
            A page of [`explain_routing`], published as `routing.html`. It shows the text that it was made from.
        token (`bool` or `str`, *optional*): Defaults to that of `hf auth login`.

    Returns:
        [`PushReport`]; None on the other processes of a training.

    Raises:
        ValueError: no checkpoint, weights in a pickle, a token in a file, a tag that names another commit, an adapter
            that does not fit its base, or a repository that holds a model where an adapter is pushed.
        PermissionError: the token is missing, wrong, or may not write there.
        HubUnavailableError: the Hub could not do it now.
    """
    if isinstance(what, Trainer):
        repo_id, token = repo_id or hub_model_id(what), token or what.args.hub_token
        revision = revision or what.args.hub_revision
        private = what.args.hub_private_repo if private is None else private
    if repo_id is None:
        raise ValueError('`repo_id` is missing. Say where to publish: `push(model, "user/name")`.')
    with (
        raise_hub_error(repo_id, revision, writes=True),
        tempfile.TemporaryDirectory() as temporary,
        _as_folder(what, adapter_name, tokenizer, max_shard_size) as folder,
    ):
        if folder is None:
            return cast("PushReport", None)
        files, left_out = publishable_files(folder)
        published, title = _stage(folder, files, Path(temporary), base, token, fingerprint)
        if with_report is not None:
            files[REPORT_NAME] = checked_for_tokens(Path(with_report))
        own_tags = getattr(what.model if isinstance(what, Trainer) else what, "model_tags", None) or ()
        tags = [*own_tags, *([tags] if isinstance(tags, str) else tags or ())]
        told: dict[str, Any] = {"evaluation": evaluation, "license": license, "language": language, "tags": tags}
        render = None if published is None else partial(_card, published, **told)
        options: dict[str, Any] = {"revision": revision, "create_pr": create_pr}
        options |= {"commit_message": commit_message or title, "commit_description": commit_description}
        write = partial(_write, HfApi(token=token), repo_id, files, render, private, tag, **options)
        # A 404 says that the head is gone. A lost answer may hide a pull request, and a second one is worse.
        made = retried(write, {404} | (NOT_DONE if create_pr else PASSING))
        if tag is not None:
            retried(partial(_tag, HfApi(token=token), made, tag))
    return PushReport(made, sorted({*files, *(["README.md"] if render else [])}), left_out)


def hub_model_id(trainer: Trainer) -> str:
    """Where a trainer publishes."""
    return trainer.hub_model_id or trainer.args.hub_model_id or Path(str(trainer.args.output_dir)).resolve().name


@contextmanager
def _as_folder(
    what: Any, adapter_name: str, tokenizer: PreTrainedTokenizerBase | None, max_shard_size: int | str
) -> Iterator[Path | None]:
    """The folder of what is pushed, a temporary one where it is in memory; None where another process saves it."""
    if isinstance(what, str | Path):
        yield Path(what)
    elif isinstance(what, Trainer):
        from .trainer_push import saved_trainer

        with saved_trainer(what) as saved:
            yield saved
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield _saved(what, Path(temporary), adapter_name, tokenizer, max_shard_size)


def _saved(
    what: Any, folder: Path, adapter_name: str, tokenizer: PreTrainedTokenizerBase | None, max_shard_size: int | str
) -> Path:
    """Save what is in memory in `folder`, or below; returns where."""
    if isinstance(what, PreTrainedModel):
        what.save_pretrained(folder, max_shard_size=max_shard_size)
    elif hasattr(what, "peft_config"):
        folder = save_adapter(what, folder, adapter_name)
    else:
        raise ValueError(
            f"`what` is a {type(what).__name__}, which cannot be pushed. Pass a model, an adapter, a trainer or a "
            "folder."
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"`{type(what).__name__}` saved no weights, so nothing was published. If it is sharded over processes, "
            "run `hf-sparse-moe consolidate CHECKPOINT OUTPUT`, and push OUTPUT."
        )
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def _stage(
    folder: Path,
    files: dict[str, Path],
    staged: Path,
    base: str | Path | None,
    token: bool | str | None,
    fingerprint: bool | None,
) -> tuple[Adapter | Checkpoint | SurgeryResult | None, str]:
    """Add to `files` what is published besides the folder's own; returns the card's subject and a title."""
    published: Adapter | Checkpoint | SurgeryResult | None = None
    if is_adapter(folder):
        stage_adapter(files, staged, base, token, fingerprint)
        published, title = read_adapter(staged), "Upload adapter"
    elif base is not None:
        raise ValueError(f"`base={str(base)!r}` is given, but `{folder}` holds a model, not an adapter. Remove it.")
    else:
        config = read_config(folder)
        title = f"Upload {named_architecture(config) or folder.resolve().name}"
        weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if not make_fingerprint(folder, staged / FINGERPRINT_NAME, is_wanted(fingerprint, weight_bytes)):
            files.pop(FINGERPRINT_NAME, None)  # of other weights
        if isinstance(config, SparseMoeConfig) or last_surgery(read_json(folder / RECEIPT_NAME, optional=True)):
            published = read_checkpoint(folder)
    if published is not None:
        write_evaluation_results(published.record, staged)
    files |= {path.relative_to(staged).as_posix(): path for path in staged.rglob("*") if path.is_file()}
    return published, title


def _write(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path],
    render: Callable[..., str] | None,
    private: bool | None,
    tag: str | None,
    **options: Any,
) -> CommitInfo:
    """Commit on the head as it is now. Files that it holds already are left out, so that a second call is a no-op."""
    repo_id, revision = api.create_repo(repo_id, private=private, exist_ok=True).repo_id, options["revision"]
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    head = api.model_info(repo_id, revision=revision)
    present = {sibling.rfilename for sibling in head.siblings or ()}
    _check_kind(repo_id, files, present)
    if tag is not None:
        _check_tag(api, repo_id, tag, head.sha)
    written: dict[str, Path | bytes] = {**files}
    if render is not None:
        cards = [files["README.md"]] if "README.md" in files else []
        if "README.md" in present:
            cards.append(Path(api.hf_hub_download(repo_id, "README.md", revision=head.sha)))
        previous, has_report = [card.read_bytes().decode() for card in cards], REPORT_NAME in present | files.keys()
        written["README.md"] = render(repo_id, previous=previous, has_report=has_report).encode()
    superseded = sorted(name for name in present - set(written) if SUPERSEDABLE.fullmatch(name))
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in written.items()]
    deletions = [CommitOperationDelete(path_in_repo=name) for name in superseded]
    return api.create_commit(repo_id, [*operations, *deletions], parent_commit=head.sha, **options)


def _card(published: Adapter | Checkpoint | SurgeryResult, repo_id: str, has_report: bool, **told: Any) -> str:
    if isinstance(published, Checkpoint):
        published = replace(published, has_report=has_report)
    return render_model_card(published, repo_id, **told)


def _check_kind(repo_id: str, files: Mapping[str, Path], present: set[str]) -> None:
    """transformers takes a repository with both for the adapter, whatever its base is."""
    kinds = {"config.json": "a model", ADAPTER_CONFIG: "an adapter"}
    for pushed, there in (("config.json", ADAPTER_CONFIG), (ADAPTER_CONFIG, "config.json")):
        if pushed in files and there in present and there not in files:
            raise ValueError(
                f"`{repo_id}` holds {kinds[there]}, and this is {kinds[pushed]}: one would be taken for the other, or "
                "replace it. Choose a repository of its own."
            )


def _tag(api: HfApi, commit: CommitInfo, tag: str) -> None:
    repo_id = commit.repo_url.repo_id
    api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True)
    _check_tag(api, repo_id, tag, commit.oid)  # another push may have made it in between


def _check_tag(api: HfApi, repo_id: str, tag: str, commit: str | None) -> None:
    """Raise a `ValueError` where the tag names another commit than this one."""
    tags = api.list_repo_refs(repo_id).tags
    tagged = next((reference.target_commit for reference in tags if reference.name == tag), None)
    if tagged not in (None, commit):
        raise ValueError(
            f"`{repo_id}` has the tag `{tag}` already, on commit {tagged}, and people may rely on it. Choose another "
            f"tag for {commit}."
        )
