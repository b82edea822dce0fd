"""`doctor`: whether a checkpoint, here or on the Hub, is what was once published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils import HF_MODULES_CACHE

from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.source import find_source

from .adapter_folder import is_adapter
from .adapter_publish import named_base
from .download import pull
from .examination import FAILED, NOT_CHECKED, Finding, compare_outputs


REMOTE_CODE = "runs by its own code"
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")


@dataclass(frozen=True)
class DoctorReport:
    """
    What [`doctor`] found.

    Args:
        source (`str`): The folder or Hub id.
        revision (`str`, *optional*): The commit of a Hub id.
        findings (`list[Finding]`): One per check.
    """

    source: str
    revision: str | None
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(finding.verdict != FAILED for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {"healthy": self.healthy, **asdict(self)}


def doctor(
    source: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    token: bool | str | None = None,
) -> DoctorReport:
    """
    Load a checkpoint in a fresh process, compute in float32, and check it: every tensor present, finite and tied as
    the config says, nothing drawn at random, experts that differ, routers that choose, the code that travels, and
    outputs that equal its fingerprint.

    An adapter is loaded with its base: that this is the base it was trained on, every tensor attached and finite,
    outputs that differ from the base's own, equal the fingerprint, and are those of plain PEFT.

    A checkpoint on the Hub is fetched into a temporary folder first, with the hash of each file checked.

    Args:
        source (`str` or `Path`): Folder or Hub id of a mixture, of this package or a stock one, or of an adapter.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        base (`str` or `Path`, *optional*):
            Folder or Hub id of an adapter's base. Defaults to the one that it names, at the revision that it names.
        trust_remote_code (`bool`, defaults to `False`):
            Also run the code in the checkpoint, in a process of its own that cannot import this package and is given
            no token. Read that code first.
        token (`bool` or `str`, *optional*): Defaults to that of `hf auth login`.

    Returns:
        [`DoctorReport`]

    Raises:
        ValueError, PermissionError, OSError, HubUnavailableError: it cannot be fetched, see [`pull`].
    """
    with tempfile.TemporaryDirectory() as temporary:
        workplace, commit, folder = Path(temporary), None, Path(source)
        is_here = folder.is_dir()
        if not is_here:
            folder = workplace / "checkpoint"
            commit = pull(str(source), folder, revision=revision, token=token).revision
        bases = []
        if is_adapter(folder):
            named = named_base(folder, base, from_hub=not is_here)
            bases = [find_source(*named, token=token).folder.resolve()]
        elif base is not None:
            raise ValueError(f"`base={str(base)!r}` is given, but `{source}` is not an adapter. Leave it out.")
        elif not (folder / "config.json").is_file():
            raise ValueError(f"`{source}` has no config.json. Pass the folder or Hub id of a saved model.")
        findings = _examined(folder.resolve(), workplace, trust_remote_code, *bases)
    return DoctorReport(str(source), commit, findings)


def _examined(folder: Path, workplace: Path, trust_remote_code: bool, *base: Path) -> list[Finding]:
    given, result = workplace / "examined.json", workplace / "ran.json"
    if death := _run(["-m", "hf_sparse_moe.hub.examination", *map(str, (folder, given, *base))], workplace):
        return [Finding("loads", FAILED, f"The process that loaded it died: {death}.")]
    examined = json.loads(given.read_text(encoding="utf-8"))
    findings = [Finding(**finding) for finding in examined["findings"]]
    if not (probe := examined["probe"]):
        return findings
    script = Path(__file__).with_name("remote_code_run.py")
    if not read_json(folder / "config.json").get("auto_map"):
        outcome = NOT_CHECKED, "It has none."
    elif not trust_remote_code:
        outcome = NOT_CHECKED, "Its code is run only with `--trust-remote-code`; read it first."
    elif death := _run(["-P", *map(str, (script, folder, given, result))], workplace):
        outcome = FAILED, f"Without the package it does not load: {death}."
    else:
        ran = json.loads(result.read_text(encoding="utf-8"))
        outcome = compare_outputs(probe["fingerprint"], ran, "to this package")
    return [*findings, Finding(REMOTE_CODE, *outcome)]


def _run(arguments: list[str], workplace: Path) -> str | None:
    """Run Python without tokens, the Hub or a shared cache; returns the last line of its errors if it failed."""
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    home = workplace / "home"
    environment |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["TRANSFORMERS_VERBOSITY"] = "error"
    # The packages of this process, and not the code of checkpoints that it has loaded: it would hide this one's.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path and path != HF_MODULES_CACHE)
    ended = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if ended.returncode < 0:
        return f"signal {-ended.returncode}, perhaps for lack of memory"
    lines = ended.stderr.strip().splitlines() or ["no message"]
    return " ".join(lines[-1].split())[:300] if ended.returncode else None
