"""The local Hub, and processes whose Hub it is."""

import re
from collections.abc import Iterator

import pytest

from hub_client import ClientProcess
from hub_server import HubServer


@pytest.fixture(scope="session")
def hub_server() -> Iterator[HubServer]:
    with HubServer(tokens={"hf_writer": "tester", "hf_other": "other"}) as server:
        yield server


@pytest.fixture(scope="session")
def client(hub_server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientProcess]:
    """One long-lived process with the package, so that torch is imported once: `client(function, repo_id=...)`."""
    process = ClientProcess(hub_server.client_environment(tmp_path_factory.mktemp("hf_home")))
    yield process
    process.close()


@pytest.fixture(scope="session")
def stranger(hub_server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientProcess]:
    """A process with an empty cache that cannot import the package: the remote code is all it has."""
    home = tmp_path_factory.mktemp("stranger")
    environment = hub_server.client_environment(home, token=None)
    process = ClientProcess(environment | {"WITHOUT_PACKAGE": "hf_sparse_moe"}, "-I")
    yield process
    process.close()


@pytest.fixture
def repo_id(request: pytest.FixtureRequest, hub_server: HubServer) -> Iterator[str]:
    """A name that no other test uses; the repository does not exist yet."""
    hub_server.faults.clear()
    hub_server.requests.clear()
    yield "tester/" + re.sub(r"[^a-zA-Z0-9]+", "-", request.node.name).strip("-")
    hub_server.faults.clear()
