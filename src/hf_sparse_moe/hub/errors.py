"""What the Hub or the way to it answered, as one sentence that holds no token and no signed address."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id


Result = TypeVar("Result")

ATTEMPTS = 4
FIRST_PAUSE = 0.5  # seconds; each pause is twice the one before
NOT_DONE: set[int | None] = {408, 409, 412, 429}  # a commit under way, a head that moved, a limit: nothing was written
PASSING = NOT_DONE | {500, 502, 503, 504, None}  # None is a connection that was cut


class HubUnavailableError(ConnectionError):
    """The Hub could not do it now: nothing is wrong with the request, and sending it again may succeed."""


@contextmanager
def raise_hub_error(repo_id: str, revision: str | None = None, writes: bool = False) -> Iterator[None]:
    """
    Turn an error of the Hub, or of the connection to it, into one of three with a single sentence.

    Raises:
        ValueError: there is no such repository or revision, or the Hub refuses what was sent.
        PermissionError: the token is missing, wrong, or lacks the right.
        HubUnavailableError: offline, a connection that is cut, a rate limit, a fault of the Hub.
    """
    check_repo_id(repo_id)
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:
        if (answer := _hub_answer(error)) is None:
            raise
        # No cause is kept: it would show addresses, some of them signed.
        raise _translate(answer, error, repo_id, revision, writes) from None


def retried(ask: Callable[[], Result], passing: Collection[int | None] = PASSING) -> Result:
    """
    What `ask` returns, called again where the Hub was busy or did not answer: for requests that `huggingface_hub`
    sends once. `passing` are the statuses that are worth another attempt.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return ask()
        except HTTPError as error:
            if _status(error) not in passing:
                raise
        time.sleep(FIRST_PAUSE * 2**attempt)
    return ask()


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` for a name that cannot be a Hub id."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"`{repo_id}` is not a Hub id (`user/name`). Check the spelling, or the path if you meant a folder."
        ) from None


def _hub_answer(error: BaseException) -> BaseException | None:
    """The error of the Hub inside `error`: an upload wraps it in a RuntimeError, a download in other errors."""
    is_ours = isinstance(error, HTTPError | OfflineModeIsEnabled)
    if not is_ours and error.__cause__ is not None and (inner := _hub_answer(error.__cause__)):
        return inner
    is_ours |= isinstance(error, EntryNotFoundError) or "Consistency check failed" in str(error)
    return error if is_ours else None


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _translate(
    answer: BaseException, error: BaseException, repo_id: str, revision: str | None, writes: bool
) -> Exception:
    status, reason, hub = _status(answer), _reason(answer), f"The Hub ({constants.ENDPOINT})"
    said = f"status {status}: {reason}" if status else reason
    upload = re.match("Error while uploading '(.+)'", str(error))
    if isinstance(answer, OfflineModeIsEnabled):
        return HubUnavailableError(
            f"`{repo_id}` is on the Hub, but this machine is set to stay offline. Unset `HF_HUB_OFFLINE`."
        )
    if upload or status is None or status in PASSING or status >= 500:
        what = f"`{upload[1]}` of `{repo_id}`" if upload else f"`{repo_id}`"
        return HubUnavailableError(
            f"{hub} did not finish with {what} ({said}). Run the same command again: files that arrived are not sent "
            "twice."
        )
    if isinstance(answer, RevisionNotFoundError):
        return ValueError(f"`{repo_id}` has no branch, tag or commit `{revision}`. Choose one that it has.")
    is_closed = writes or isinstance(answer, GatedRepoError) or "invalid" in reason.lower()
    if isinstance(answer, RepositoryNotFoundError) and not is_closed:
        return ValueError(
            f"`{repo_id}` does not exist on the Hub ({constants.ENDPOINT}), or is private and you may not see it "
            f"(status {status}). Check the name, and log in with an account that may read it (`hf auth login`)."
        )
    if isinstance(answer, RepositoryNotFoundError) or status in (401, 403):
        return PermissionError(
            f"{hub} refused to {'let you write to' if writes else 'show you'} `{repo_id}` ({said}). Log in with an "
            f"account that may (`hf auth login`, or `HF_TOKEN`), or ask for access at {constants.ENDPOINT}/{repo_id}."
        )
    return ValueError(f"{hub} refuses this for `{repo_id}` ({said}).")


def _reason(error: BaseException) -> str:
    """What the Hub says, on one line, short, and without tokens."""
    if not isinstance(error, HfHubHTTPError):
        return type(error).__name__
    text = error.server_message or error.response.headers.get("X-Error-Message") or "no reason given"
    token = get_token()
    text = text.replace(token, "<token>") if token else text
    return shorten(re.sub(r"\bhf_[A-Za-z0-9_]+", "<token>", text), 200, placeholder="…").rstrip(".")
