"""What holds for every test: nothing may be left behind, and hypothesis tries the same examples each time, however slow the machine is.

More and other ones: ``pytest --hypothesis-profile soak -k fuzz`` and the like.
"""

from collections.abc import Iterator

import pytest
from hypothesis import settings

pytest_plugins = ["tests.support.leaks"]

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("soak", derandomize=False, deadline=None, max_examples=20_000)
settings.load_profile("same")


@pytest.fixture(params=["auto", "tcp"])
def every_transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """Peers go through shared memory, or through TCP although they are on one host."""
    from tests.checks.support import QUICK

    before, QUICK["transport"] = QUICK["transport"], request.param
    yield request.param
    QUICK["transport"] = before
