"""Which of these tests run beside all others."""

import os

import pytest


def pytest_collection_modifyitems(items):
    """A fork of a process in which other tests have started threads may hang: these run alone, where asked for."""
    if os.environ.get("SPARSE_MOE_RECOVERY"):
        return
    alone = pytest.mark.skip(reason="forks, so it runs alone: SPARSE_MOE_RECOVERY=1 pytest tests/distributed")
    for item in items:
        if item.path.name.startswith(("test_recovery", "test_consolidate")) and item.path.parent.name == "distributed":
            item.add_marker(alone)
