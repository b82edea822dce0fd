"""The table of what was measured, at the end of a run; results travel in the reports, also from xdist's workers."""

from collections import Counter


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    rows = sorted(row for report in reports for name, row in report.user_properties if name == "architecture")
    if not rows:
        return
    terminalreporter.section("architectures")
    for row in rows:
        terminalreporter.write_line("{:8} {:24} {:15} {}".format(*row))
    counts = Counter(row[2] for row in rows)
    terminalreporter.write_line(", ".join(f"{count} {status}" for status, count in counts.items()))
