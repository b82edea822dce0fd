"""What the Hub or the way to it answered, as one sentence that holds no token and no signed address."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
NOT_DONE = {408, 409, 412, 429}  # a commit under way, a head that moved, a limit: surely nothing was written
PERHAPS_DONE = {500, 502, 503, 504}
LONGEST_REASON = 200

_BUSY = {
    409: "another commit is being made",
    412: "somebody else kept pushing to it in between",
    429: "too many requests were sent",
}
_UPLOAD = re.compile(r"Error while uploading '(.+)' to the Hub")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]+")


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
    try:
        yield
    except HFValidationError:
        check_repo_id(repo_id)
        raise
    except OfflineModeIsEnabled:
        raise HubUnavailableError(
            f"`{repo_id}` is on the Hub, but this machine is set to stay offline (`HF_HUB_OFFLINE`). Unset that, or "
            "use what is in the cache."
        ) from None
    except (HTTPError, OSError, RuntimeError) as error:
        answer = _hub_answer(error)
        if answer is None:
            raise
        # No cause is kept: it would show addresses, some of them signed.
        raise _translate(answer, repo_id, revision, writes, _UPLOAD.search(str(error))) from None


def retried(ask: Callable[[], Result], may_pass: Callable[[HTTPError], bool] | None = None) -> Result:
    """
    What `ask` returns, called again where the Hub was busy or did not answer. For the few requests that
    `huggingface_hub` sends once only: creating a repository, a branch or a tag, and the commit itself.
    `may_pass` says whether an error is worth another attempt, by default [`is_passing`].
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return ask()
        except HTTPError as error:
            if not (may_pass or is_passing)(error):
                raise
        time.sleep(FIRST_PAUSE * 2**attempt)
    return ask()


def is_passing(error: HTTPError) -> bool:
    """Whether the same request may succeed later."""
    status = status_of(error)
    return status is None or status in NOT_DONE | PERHAPS_DONE


def status_of(error: BaseException) -> int | None:
    """The HTTP status; None where the connection ended before there was an answer."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` for a name that cannot be a Hub id."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"`{repo_id}` is not a Hub id (`user/name`). Check the spelling, or the path if you meant a folder."
        ) from None


def redact(text: str) -> str:
    """The text on one line, short, and without tokens."""
    token = get_token()
    text = text.replace(token, "<token>") if token else text
    text = " ".join(_TOKEN.sub("<token>", text).split()).rstrip(".")
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "…"


def _hub_answer(error: BaseException) -> BaseException | None:
    """The error of the Hub inside `error`: an upload wraps it in a RuntimeError, a download in other errors."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HTTPError | OfflineModeIsEnabled):
            return seen
        seen = seen.__cause__
    is_ours = isinstance(error, EntryNotFoundError) or "Consistency check failed" in str(error)
    return error if is_ours else None


def _translate(
    error: BaseException, repo_id: str, revision: str | None, writes: bool, upload: re.Match[str] | None
) -> Exception:
    status, hub = status_of(error), f"The Hub ({constants.ENDPOINT})"
    answer = type(error).__name__ if status is None else f"status {status}"
    reason, login = _reason(error), "Run `hf auth login`, or set `HF_TOKEN`"
    if upload is not None:
        return _unavailable(repo_id, f"its storage did not take `{upload[1]}` ({answer})")
    if status == 401 and re.search(r"(?i)invalid (credentials|user token)", reason):
        refused = f"refused to let you write to `{repo_id}`" if writes else f"refused to show you `{repo_id}`"
        return PermissionError(
            f"{hub} {refused}: your token is wrong or expired (status 401). A wrong token is refused even where none "
            "is needed. Run `hf auth login`, or unset `HF_TOKEN`."
        )
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"`{repo_id}` is gated (status {status}): its owner decides who may read it. Ask for access at "
            f"{constants.ENDPOINT}/{repo_id} and log in with that account (`hf auth login`)."
        )
    if writes and (status in (401, 403) or isinstance(error, RepositoryNotFoundError)):
        return PermissionError(
            f"{hub} refused to let you write to `{repo_id}` (status {status}): the token is missing, or may not write "
            f"there. {login} to one with write access."
        )
    if isinstance(error, RepositoryNotFoundError):
        seen = "your token may not see it" if get_token() else "you are not logged in"
        return ValueError(
            f"`{repo_id}` does not exist on the Hub ({constants.ENDPOINT}), or is private and {seen} (status "
            f"{status}). Check the name. {login} to a token of an account that may read it."
        )
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"`{repo_id}` has no branch, tag or commit `{revision}`. Choose one that it has.")
    if status in (401, 403):
        return PermissionError(f"{hub} refuses to show `{repo_id}` (status {status}: {reason}). {login}.")
    if status is not None and status not in NOT_DONE | PERHAPS_DONE and status < 500:
        return ValueError(f"{hub} refuses this for `{repo_id}` (status {status}: {reason}).")
    fault = "it had a fault of its own" if status else "it could not be reached, or the connection was cut"
    return _unavailable(repo_id, f"{_BUSY.get(status or 0, fault)} ({answer})")


def _unavailable(repo_id: str, what: str) -> HubUnavailableError:
    return HubUnavailableError(
        f"The Hub ({constants.ENDPOINT}) did not finish with `{repo_id}`: {what}. Run the same command again: files "
        "that arrived are not sent twice."
    )


def _reason(error: BaseException) -> str:
    if not isinstance(error, HfHubHTTPError):
        return type(error).__name__
    return redact(error.server_message or error.response.headers.get("X-Error-Message") or "no reason given")
