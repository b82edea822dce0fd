"""Run transformers' own `ModelTesterMixin` on the models of this package: `make test-hf`.

Downloads the sdist of the installed transformers version into `.cache/` once, runs `suite.py`, prints a table, writes
docs/model_tester.md, and fails if a test fails for which `known_failures.toml` gives no reason, or if a failure listed
there is gone.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

import transformers


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "model_tester"
REPORT = CACHE / "report.xml"
PAGE = ROOT / "docs" / "model_tester.md"
FAMILIES = {  # class of suite.py: what the table calls it
    "EncoderTest": "encoder (ModernBERT)",
    "DecoderTest": "decoder (Qwen3)",
    "EncoderDecoderTest": "encoder-decoder (T5 v1.1)",
    "MixtralTest": "stock Mixtral",
}


def fetch_tests(version: str) -> Path:
    """The `tests/` folder of the sdist of transformers `version`, downloaded on first use and never committed."""
    folder = CACHE / f"transformers-{version}" / "tests"
    if not folder.is_dir():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=transformers"]
        subprocess.run([*download, "--dest", str(CACHE), f"transformers=={version}"], check=True)
        with tarfile.open(CACHE / f"transformers-{version}.tar.gz") as sdist:
            wanted = [member for member in sdist if "/tests/" in member.name]
            sdist.extractall(CACHE, members=wanted, filter="data")
    return folder


def run_suite(tests: Path, jobs: int, arguments: list[str]) -> dict[str, dict[str, tuple[str, str]]]:
    """Run `suite.py` and return {class: {test: (outcome, first line of the message)}}."""
    command = [sys.executable, "-m", "pytest", str(HERE / "suite.py"), "-n", str(jobs), "--timeout=300"]
    command += ["-q", "-rN", "--tb=no", f"--junitxml={REPORT}"]
    # The marks and the warnings of transformers' tests are not ours to judge.
    command += ["-o", "addopts=", "-o", "filterwarnings=ignore", "-o", "verbosity_subtests=0", *arguments]
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRANSFORMERS_TESTS": str(tests)}).returncode
    if code > 1:  # 0 all passed, 1 some failed
        raise SystemExit(f"pytest did not get through the suite (exit code {code}); see its output above.")
    results: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    for case in ElementTree.parse(REPORT).iter("testcase"):
        outcome, message = "passed", ""
        for kind, name in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if (found := case.find(kind)) is not None:
                outcome, message = name, (found.get("message") or "").strip().split("\n")[0]
        tests_of_class = results[case.get("classname", "").rsplit(".")[-1]]
        # A sub-test is a case of its own under the same name: one that failed fails the test.
        if tests_of_class.get(case.get("name", ""), ("", ""))[0] != "failed":
            tests_of_class[case.get("name", "")] = (outcome, message)
    return results


def summary(results: dict) -> list[str]:
    """The table of passed, failed and skipped tests, as Markdown rows."""
    rows = ["| model | passed | failed | skipped |", "| --- | ---: | ---: | ---: |"]
    for key, name in FAMILIES.items():
        count = Counter(outcome for outcome, _ in results[key].values())
        rows.append(f"| {name} | {count['passed']} | {count['failed']} | {count['skipped']} |")
    return rows


def page(results: dict, reasons: dict) -> str:
    """The text of docs/model_tester.md."""
    failures = [
        f"| {name} | `{test}` | {reasons.get(key, {}).get(test, '**not examined yet**')} |"
        for key, name in FAMILIES.items()
        for test, (outcome, _) in sorted(results[key].items())
        if outcome == "failed"
    ]
    return "\n".join(
        [
            "# transformers' own model tests",
            "",
            "`ModelTesterMixin` is the suite that every model inside transformers passes through. `make test-hf`",
            "fetches it from the source distribution of the installed transformers and runs it on one tiny model a",
            "family, with its classes, and on stock Mixtral in the same setting. Parts of the suite that",
            "the distribution does not carry are left empty, so one test cannot pass there for any model.",
            "",
            f"This page is written by `make test-hf`; this is the result for transformers {transformers.__version__}.",
            "",
            *summary(results),
            "",
            "## Every failure, and why",
            "",
            *(["| model | test | reason |", "| --- | --- | --- |", *failures] if failures else ["None."]),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes of pytest-xdist (default: 2)")
    options, arguments = parser.parse_known_args()
    results = run_suite(fetch_tests(transformers.__version__), options.jobs, arguments)
    reasons = tomllib.loads((HERE / "known_failures.toml").read_text(encoding="utf-8"))

    print("\n".join(["", *summary(results), ""]))
    failed = {(key, test) for key in FAMILIES for test, (outcome, _) in results[key].items() if outcome == "failed"}
    known = {(key, test) for key, tests in reasons.items() for test in tests}
    ran = {(key, test) for key, tests in results.items() for test in tests}
    for key, test in sorted(failed - known):
        print(f"FAILED without a reason in known_failures.toml: {FAMILIES[key]}: {test}: {results[key][test][1]}")
    for key, test in sorted((known & ran) - failed):
        print(f"known_failures.toml lists a test that passes now; take it out: {FAMILIES[key]}: {test}")
    if not arguments:  # a part of the suite says nothing about the rest
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(results, reasons), encoding="utf-8")
    return 1 if (failed - known) or ((known & ran) - failed) else 0


if __name__ == "__main__":
    sys.exit(main())
