"""Fixtures of the tests of runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mpscl_ray.runs.storage import S3Path
from tests import gcs, s3


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[s3.Server | gcs.Server]:
    with {"s3": s3, "gs": gcs}[request.param].serve(tmp_path_factory.mktemp(request.param)) as started:
        yield started


@pytest.fixture
def remote(server: s3.Server | gcs.Server, request: pytest.FixtureRequest) -> S3Path:
    """A folder of the bucket for this test alone."""
    return server.folder(request.node.name.replace("[", "-").replace("]", ""))
