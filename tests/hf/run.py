"""Run transformers' own `ModelTesterMixin` on the models of this package and on their dense backbones: `make test-hf`.

Downloads the sdist of the installed transformers version into `.cache/` once, runs `suite.py`, prints a table, writes
tests/hf/README.md, and fails if a mixture fails a test that its dense backbone passes and for which
`known_failures.toml` gives no reason, or if a failure listed there is gone.
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
sys.path.insert(0, str(HERE.parent))

from hf.backbones import BACKBONES, identifier  # noqa: E402


ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "model_tester"
REPORT = CACHE / "report.xml"
PAGE = Path(__file__).parent / "README.md"
Results = dict[str, dict[str, tuple[str, str]]]


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


def run_suite(tests: Path, jobs: int, arguments: list[str]) -> Results:
    """Run `suite.py` and return {class: {test: (outcome, first line of the message)}}."""
    command = [sys.executable, "-m", "pytest", str(HERE / "suite.py"), "-n", str(jobs), "--timeout=300"]
    command += ["-q", "-rN", "--tb=no", f"--junitxml={REPORT}"]
    # The marks and the warnings of transformers' tests are not ours to judge.
    command += ["-o", "addopts=", "-o", "filterwarnings=ignore", "-o", "verbosity_subtests=0", *arguments]
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRANSFORMERS_TESTS": str(tests)}).returncode
    if code > 1:  # 0 all passed, 1 some failed
        raise SystemExit(f"pytest did not get through the suite (exit code {code}); see its output above.")
    results: Results = defaultdict(dict)
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


def own_failures(results: Results, name: str) -> dict[str, str]:
    """The tests that the mixture of a backbone fails and the backbone does not, with their messages."""
    dense = results[identifier(name, sparse=False)]
    return {
        test: message
        for test, (outcome, message) in sorted(results[identifier(name, sparse=True)].items())
        if outcome == "failed" and dense.get(test, ("", ""))[0] != "failed"
    }


def summary(results: Results) -> list[str]:
    """The table of passed, failed and skipped tests, as Markdown rows."""
    rows = [
        "| backbone | dense: passed | failed | skipped | mixture: passed | failed | skipped | fails alone |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in BACKBONES:
        cells = [name]
        for sparse in (False, True):
            count = Counter(outcome for outcome, _ in results[identifier(name, sparse)].values())
            cells += [str(count[outcome]) for outcome in ("passed", "failed", "skipped")]
        rows.append(f"| {' | '.join(cells)} | {len(own_failures(results, name))} |")
    return rows


def page(results: Results, reasons: dict[str, list[str]]) -> str:
    """The text of tests/hf/README.md."""
    where = defaultdict(list)
    for name in BACKBONES:
        for test in own_failures(results, name):
            where[test].append(name)
    failures = [
        f"| `{test}` | {', '.join(names)} | {reasons.get(test, '**not examined yet**')} |"
        for test, names in sorted(where.items())
    ]
    return "\n".join(
        [
            "# transformers' own model tests",
            "",
            "`ModelTesterMixin` is the suite that every model inside transformers passes through. `make test-hf`",
            "fetches it from the source distribution of the installed transformers and runs it on a tiny mixture of",
            "each backbone below, with all its heads, and on the dense backbone itself. Parts of the suite that the",
            "distribution does not carry are left empty, so one test cannot pass there for any model that generates.",
            "",
            f"This page is written by `make test-hf`; this is the result for transformers {transformers.__version__}.",
            "",
            *summary(results),
            "",
            "## What a mixture fails and its dense backbone passes or skips",
            "",
            *(["| test | mixtures of | reason |", "| --- | --- | --- |", *failures] if failures else ["Nothing."]),
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
    unexplained = 0
    for name in BACKBONES:
        for test, message in own_failures(results, name).items():
            if test not in reasons:
                unexplained += 1
                print(f"FAILED without a reason in known_failures.toml: {name}: {test}: {message}")
    gone = {test for test in reasons if not any(test in own_failures(results, name) for name in BACKBONES)}
    if not arguments:  # a part of the suite says nothing about the rest
        for test in sorted(gone):
            print(f"known_failures.toml lists a test that no mixture fails alone any more; take it out: {test}")
        PAGE.write_text(page(results, reasons), encoding="utf-8")
        unexplained += len(gone)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
