"""What tests of several rooms use."""

import contextlib
from collections.abc import Iterator

import pytest
from hosts import Host, NoHosts, two_hosts


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other over a network; a test is skipped, with the reason, where there can be none."""
    with contextlib.ExitStack() as stack:
        try:
            both = stack.enter_context(two_hosts())
        except NoHosts as why:
            pytest.skip(str(why))
        yield both
