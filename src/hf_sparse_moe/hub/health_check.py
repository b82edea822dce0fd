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

from .adapter_files import is_adapter, read_adapter
from .adapter_publish import named_base
from .download import pull
from .examination import FAILED, NOT_CHECKED, Finding, Outcome, compare_outputs, examine, examine_adapter


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
    Load a checkpoint, compute in float32, and check it: every tensor present, finite and tied as the config says,
    nothing drawn at random, experts that differ, routers that choose, the code that travels, and outputs that equal
    its fingerprint.

    An adapter is loaded with its base: that this is the base it was trained on, every tensor found and finite,
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
        folder = folder.resolve()
        if is_adapter(folder):
            named = named_base(read_adapter(folder, folder.name), base, from_hub=not is_here)
            findings = examine_adapter(folder, find_source(*named, token=token).folder.resolve())
            return DoctorReport(str(source), commit, findings)
        if base is not None:
            raise ValueError(f"`base={str(base)!r}` is given, but `{source}` is not an adapter. Leave it out.")
        if not (folder / "config.json").is_file():
            raise ValueError(f"`{source}` has no config.json. Pass the folder or Hub id of a saved model.")
        findings, probe = examine(folder)
        if probe:
            unread = NOT_CHECKED, "Its code is run only with `--trust-remote-code`; read it first."
            outcome = _by_its_own_code(folder, probe, workplace) if trust_remote_code else unread
            findings.append(Finding(REMOTE_CODE, *outcome))
    return DoctorReport(str(source), commit, findings)


def _by_its_own_code(folder: Path, probe: dict[str, Any], workplace: Path) -> Outcome:
    """Whether the code that came with a checkpoint computes what this package does, without it, a token or the Hub."""
    if not read_json(folder / "config.json").get("auto_map"):
        return NOT_CHECKED, "It has none."
    given, result, home = (workplace / name for name in ("probe.json", "ran.json", "home"))
    given.write_text(json.dumps(probe), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    environment |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["TRANSFORMERS_VERBOSITY"] = "error"
    # The packages of this process, and not the code of checkpoints that it has loaded: it would hide this one's.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path and path != HF_MODULES_CACHE)
    script = Path(__file__).with_name("remote_code_run.py")
    command = [sys.executable, "-P", *map(str, (script, folder, given, result))]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"it ended with {ended.returncode}"]
        return FAILED, f"Without the package it does not load: {' '.join(lines[-1].split())[:300]}."
    ran = json.loads(result.read_text(encoding="utf-8"))
    return compare_outputs(probe["fingerprint"], ran, "to this package")
