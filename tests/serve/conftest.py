"""The scripted service behind a real server, and OpenAI's client for it: one of each for a module."""

import pytest
from live_server import live_server
from openai import OpenAI
from scripted_service import ScriptedService, repeat


@pytest.fixture(scope="module")
def served():
    """A scripted service, and the address of a server over it."""
    service = ScriptedService()
    with live_server(service) as address:
        service.address = address
        yield service


@pytest.fixture
def service(served):
    """The service with the script that repeats."""
    yield served
    served.script = repeat


@pytest.fixture(scope="module")
def client(served):
    with OpenAI(base_url=f"{served.address}/v1", api_key="any", max_retries=0) as client:
        yield client
