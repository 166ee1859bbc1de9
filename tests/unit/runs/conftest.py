"""Fixtures of the tests of runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mpscl_ray.runs.storage import S3Path
from tests.s3 import Server, serve


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("s3")) as started:
        yield started


@pytest.fixture
def remote(server: Server, request: pytest.FixtureRequest) -> S3Path:
    """A folder of the bucket for this test alone."""
    return server.folder(request.node.name.replace("[", "-").replace("]", ""))
