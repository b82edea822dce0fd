"""Publishing a mixture in one commit, so that a repository never holds half of one."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.utils import logging

from hf_sparse_moe.checkpoints.source import Source, read_config
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .adapter_folder import ADAPTER_CONFIG, Adapter, is_adapter, read_adapter
from .adapter_publish import stage_adapter
from .checkpoint import Checkpoint, read_checkpoint
from .errors import ATTEMPTS, NOT_DONE, check_repo_id, is_passing, pause, status_of, told_by_the_hub, with_retries
from .evaluation_results import RESULTS_FILE, evaluation_entries, write_evaluation_results
from .fingerprint import FINGERPRINT_NAME, make_fingerprint
from .model_card import render_model_card
from .publishable import publishable_files


logger = logging.get_logger(__name__)

# What an earlier push may have left that this model does not have: `from_pretrained` prefers an old single file to new
# shards, and the others describe the weights beside them.
SUPERSEDABLE = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
    r"|adapter_model\.(safetensors|bin)|(expert_lora|adapter_base)\.json"
    r"|(receipt|fingerprint|training_record|routing_statistics)\.json|expert_load\.png"
    rf"|{re.escape(RESULTS_FILE)}",
    re.ASCII,
)


@dataclass(frozen=True)
class Published:
    """
    What a push did.

    Args:
        commit ([`~huggingface_hub.CommitInfo`]): Its `oid` pins what was published.
        files (`list[str]`): What the repository now has of the folder.
        left_out (`list[str]`): What of the folder was not published.
    """

    commit: CommitInfo
    files: list[str]
    left_out: list[str]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    base: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tag: str | None = None,
    token: bool | str | None = None,
) -> Published:
    """
    Publish the checkpoint or adapter in a folder as one commit, which also deletes weight files that it supersedes.

    The model is loaded once, for its fingerprint: outputs that [`doctor`] compares wherever the checkpoint arrives;
    with an adapter its base is, which is fetched for that.
    Pickles, training states and whatever else is no part of a checkpoint are left out. The folder stays as it is. The
    card is rendered from it, and keeps what a person wrote in the folder's README.md or the Hub's. Large files that
    reached the Hub in a call that was interrupted are not sent again.

    Args:
        folder (`str` or `Path`): Of a saved model, or of an adapter that PEFT saved.
        repo_id (`str`): `"user/name"`. Created if it does not exist.
        base (`str`, *optional*):
            Folder or Hub id of an adapter's base. Defaults to the one that the adapter names.
        private (`bool`, *optional*): For a new repository. Defaults to the namespace's own setting.
        revision (`str`, *optional*): A branch, created from main if it does not exist. Defaults to main.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of writing to the branch.
        commit_message (`str`, *optional*): Defaults to `"Upload <class>"`, or `"Upload adapter"`.
        tag (`str`, *optional*): A name for the commit.
        token (`bool` or `str`, *optional*): Defaults to that of `hf auth login`.

    Returns:
        [`Published`]

    Raises:
        ValueError: no checkpoint, weights in a pickle, a sharded training state, a token in a file, a tag that names
            another commit; an adapter whose base is another, or which does not fit it; a repository that holds a
            model where an adapter is pushed, or the other way round.
        PermissionError: the token is missing, wrong, or may not write there.
        HubUnavailableError: the Hub could not do it now.
    """
    folder = Path(folder)
    files, left_out = publishable_files(folder)
    check_repo_id(repo_id)
    if base is not None and not is_adapter(folder):
        raise ValueError(f"`base={base!r}` is given, but `{folder}` holds a model and no adapter. Leave it out.")
    title = "Upload adapter"
    with tempfile.TemporaryDirectory() as temporary, told_by_the_hub(repo_id, revision, writes=True):
        staged = Path(temporary)
        published: Adapter | Checkpoint | None
        if is_adapter(folder):
            stage_adapter(files, staged, base, token)
            published = read_adapter(staged)
        else:
            title = f"Upload {_architecture(folder)}"
            make_fingerprint(folder, staged / FINGERPRINT_NAME)
            published = read_checkpoint(folder) if _is_mixture(folder) else None
        api = HfApi(token=token)
        repo_id = _prepare(api, repo_id, private, revision)
        card = None
        if published is not None:
            write_evaluation_results(evaluation_entries(published.record), staged)
            local = [files["README.md"].read_bytes().decode()] if "README.md" in files else []
            card = lambda remote: render_model_card(published, repo_id, previous=[*local, *remote])  # noqa: E731
        files |= {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
        commit = _commit(
            api,
            repo_id,
            files,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or title,
            commit_description=None,
            tag=tag,
            card=card,
        )
    return Published(commit, sorted({*files, *(["README.md"] if card else [])}), left_out)


def push_to_hub(
    model: SparseMoePreTrainedModel,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    evaluation: Mapping[str, Any] | TrainerState | None = None,
    license: str | None = None,
    tags: Iterable[str] | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
) -> CommitInfo:
    """
    Publish weights, config, code, receipt, fingerprint and model card as one commit, which also deletes the weight
    files that it supersedes. The head is read again after a failure, so that a commit whose answer was lost is not
    made twice.

    Of the repository's card, what a person wrote stays (see [`render_model_card`]). It does not gather a model whose
    weights are spread over several processes.

    Args:
        model (`SparseMoePreTrainedModel`): A model of this package.
        repo_id (`str`): `"user/name"`, or a name in your own namespace. Created if it does not exist.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Published in the same commit.
        evaluation (`dict` or `TrainerState`, *optional*): Measured results for the card, see [`render_model_card`].
        license (`str`, *optional*): The model's licence, such as `"apache-2.0"`.
        tags (`Iterable[str]`, *optional*): Further tags of the card.
        commit_message (`str`, *optional*): Defaults to `"Upload <class>"`.
        commit_description (`str`, *optional*): Text below the message.
        private (`bool`, *optional*): For a new repository. Defaults to the namespace's own setting.
        token (`bool` or `str`, *optional*): Defaults to that of `hf auth login`.
        revision (`str`, *optional*): A branch, created from main if it does not exist. Defaults to main.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of writing to the branch.
        max_shard_size (`int` or `str`, defaults to `"50GB"`): Size of one weight file, at most.

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit; its `oid` pins what was published.

    Raises:
        PermissionError: the token is missing, wrong, or may not write there.
        ValueError: the model wrote no weights, or the Hub refuses the card.
        HubUnavailableError: the Hub could not do it now.
    """
    with tempfile.TemporaryDirectory() as temporary, told_by_the_hub(repo_id, revision, writes=True):
        folder = Path(temporary)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"`model` ({type(model).__name__}) saved no weights, so nothing was published to `{repo_id}`. If "
                "it is sharded over processes, run `hf-sparse-moe consolidate CHECKPOINT OUTPUT`, and push OUTPUT."
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        make_fingerprint(folder, folder / FINGERPRINT_NAME)
        api = HfApi(token=token)
        repo_id = _prepare(api, repo_id, private, revision)
        checkpoint = read_checkpoint(folder)
        card = partial(render_model_card, checkpoint, repo_id, evaluation=evaluation, license=license, tags=tags)
        return _commit(
            api,
            repo_id,
            {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()},
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            commit_description=commit_description,
            card=lambda remote: card(previous=remote),
        )


def _architecture(folder: Path) -> str:
    architectures = read_config(Source(folder.resolve().name, folder, None)).architectures
    return architectures[0] if architectures else folder.resolve().name


def _is_mixture(folder: Path) -> bool:
    return read_config(Source(folder.resolve().name, folder, None)).model_type.startswith("sparse_moe_")


def _prepare(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Create what does not exist yet; returns the full id."""
    repo_id = with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    return repo_id


def _commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path],
    *,
    commit_message: str,
    commit_description: str | None,
    revision: str | None,
    create_pr: bool,
    tag: str | None = None,
    card: Callable[[list[str]], str] | None = None,
) -> CommitInfo:
    tagged = None if tag is None else _tagged(api, repo_id, tag, revision)
    for attempt in range(1, ATTEMPTS + 1):
        head = with_retries(lambda: api.model_info(repo_id, revision=revision))
        present = {sibling.rfilename for sibling in head.siblings or ()}
        _check_kind(repo_id, files, present)
        written = {} if card is None else {"README.md": card(_remote_card(api, repo_id, head.sha, present)).encode()}
        try:
            # Files that the head holds already are left out, so where an earlier attempt did succeed this is a no-op.
            commit = api.create_commit(
                repo_id,
                _operations({**files, **written}, present=present),
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head.sha,
            )
            break
        except HTTPError as error:
            if attempt == ATTEMPTS or not _worth_another_try(error, create_pr):
                raise
            reason = f"status {status_of(error)}" if status_of(error) else type(error).__name__
            logger.info(f"Attempt {attempt} to commit to {repo_id} failed ({reason}); reading its head again.")
        pause(attempt)
    if tagged not in (None, commit.oid):
        raise ValueError(
            f"`{repo_id}` now has commit {commit.oid}, but its tag `{tag}` names {tagged}. Choose another."
        )
    if tag is not None and tagged is None:
        with_retries(lambda: api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True))
    return commit


def _check_kind(repo_id: str, files: Mapping[str, Path], present: set[str]) -> None:
    """transformers takes a repository with both for the adapter, whatever its base is."""
    kinds = {"config.json": "a model", ADAPTER_CONFIG: "an adapter"}
    for pushed, there in (("config.json", ADAPTER_CONFIG), (ADAPTER_CONFIG, "config.json")):
        if pushed in files and there in present and there not in files:
            raise ValueError(
                f"`{repo_id}` holds {kinds[there]}, and this is {kinds[pushed]}: one would be taken for the other, or "
                "replace it. Choose a repository of its own."
            )


def _tagged(api: HfApi, repo_id: str, tag: str, revision: str | None) -> str | None:
    """The commit that has the tag; it may be the head, which a call that is run again has tagged."""
    references = with_retries(lambda: api.list_repo_refs(repo_id)).tags
    commit = next((reference.target_commit for reference in references if reference.name == tag), None)
    if commit is not None and commit != with_retries(lambda: api.model_info(repo_id, revision=revision)).sha:
        raise ValueError(
            f"`{repo_id}` has the tag `{tag}` already, on commit {commit}, and people may rely on it. Choose another."
        )
    return commit


def _remote_card(api: HfApi, repo_id: str, commit: str | None, present: set[str]) -> list[str]:
    """The card that the commit would replace: what a person wrote there is kept."""
    if "README.md" not in present:
        return []
    path = with_retries(lambda: api.hf_hub_download(repo_id, "README.md", revision=commit))
    return [Path(path).read_bytes().decode()]


def _worth_another_try(error: HTTPError, create_pr: bool) -> bool:
    # A lost answer may hide a pull request that exists: the head of its base cannot tell, and a second is worse.
    return status_of(error) in NOT_DONE if create_pr else is_passing(error)


def _operations(
    files: Mapping[str, Path | bytes], *, present: set[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    superseded = sorted(name for name in present - set(files) if SUPERSEDABLE.fullmatch(name))
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    return [*additions, *(CommitOperationDelete(path_in_repo=name) for name in superseded)]
