"""Networks for links, one of each kind."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.links import NETS, LinkNet, has_ipv6


@pytest.fixture(params=NETS)
async def links(request: pytest.FixtureRequest) -> AsyncIterator[LinkNet]:
    if request.param == "tcp6" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    net = LinkNet(NETS[request.param])
    yield net
    await net.close()
