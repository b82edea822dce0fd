"""Publishing a mixture in one commit, so that a repository never holds half of one."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.utils import logging

from hf_sparse_moe.hub.model_card import render_model_card
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel


logger = logging.get_logger(__name__)

ATTEMPTS = 4
# What an earlier push may have left that this model does not have: `from_pretrained` prefers an old single file to new
# shards, and a receipt describes the weights beside it.
SUPERSEDABLE = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?|receipt\.json", re.ASCII
)
NOT_COMMITTED = {409, 412, 429}  # a commit under way, a head that moved, a limit: surely nothing was written
PERHAPS_COMMITTED = {500, 502, 503, 504}


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
    Publish weights, config, code, receipt and model card as one commit, which also deletes the weight files that it
    supersedes. The head is read again after a failure, so that a commit whose answer was lost is not made twice.

    It overwrites the repository's card, and does not gather a model whose weights are spread over several processes.

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
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"`model` ({type(model).__name__}) saved no weights, so nothing was published to `{repo_id}`. If "
                "it is sharded over processes, load its consolidated checkpoint and push that."
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            card = render_model_card(model, repo_id, evaluation=evaluation, license=license, tags=tags)
            (folder / "README.md").write_text(card, encoding="utf-8")
            return _commit(
                api,
                repo_id,
                folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or f"Upload {type(model).__name__}",
                commit_description=commit_description,
            )
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise PermissionError(
                f"The Hub ({api.endpoint}) refused to let you write to `{repo_id}` (status "
                f"{error.response.status_code}): the token is missing, wrong, or may not write there. Run "
                "`hf auth login`, or pass `token=` one with write access."
            ) from error


def _commit(
    api: HfApi,
    repo_id: str,
    folder: Path,
    *,
    commit_message: str,
    commit_description: str | None,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    attempt = 0
    while True:
        attempt += 1
        head = api.model_info(repo_id, revision=revision)
        try:
            # Files that the head holds already are left out, so where an earlier attempt did succeed this is a no-op.
            return api.create_commit(
                repo_id,
                _operations(folder, present={sibling.rfilename for sibling in head.siblings or ()}),
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head.sha,
            )
        except HTTPError as error:
            if attempt == ATTEMPTS or not _worth_another_try(error, create_pr):
                raise
            logger.warning(f"Attempt {attempt} to commit to {repo_id} failed; reading its head again. ({error})")
        time.sleep(0.5 * 2**attempt)


def _worth_another_try(error: HTTPError, create_pr: bool) -> bool:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in NOT_COMMITTED:
        return True
    # A lost answer may hide a pull request that exists: the head of its base cannot tell, and a second is worse.
    return not create_pr and (status is None or status in PERHAPS_COMMITTED)


def _operations(folder: Path, *, present: set[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    superseded = sorted(name for name in present - set(files) if SUPERSEDABLE.fullmatch(name))
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    return [*additions, *(CommitOperationDelete(path_in_repo=name) for name in superseded)]
