"""Addresses as users write them: what is one comes back, and everything else is an InvalidArgument that shows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pccl.core.address import KEY_BYTES, Address, join, key_text, parse_address, parse_endpoint, parse_key
from pccl.core.errors import InvalidArgument
from pccl.core.options import DEFAULT_PORT

names = st.from_regex(r"[a-z][a-z0-9-]{0,20}(\.[a-z][a-z0-9]{0,8}){0,3}", fullmatch=True)
hosts = st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str) | names
ports = st.integers(0, 65535)
keys = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
near_misses = st.text(alphabet=":[]/?=&#@%.-_0129afxz pcltk", max_size=30)


@given(hosts, ports, st.none() | keys)
def test_every_address_comes_back(host: str, port: int, key: bytes | None) -> None:
    address = Address(host, port, key)
    assert parse_address(str(address)) == address


@given(hosts)
def test_the_port_may_be_left_out(host: str) -> None:
    shown = f"[{host}]" if ":" in host else host
    assert parse_address(shown) == parse_address(f"pccl://{shown}") == Address(host, DEFAULT_PORT)
    assert parse_endpoint(shown, "listen") == (host, None)
    assert parse_endpoint(host, "listen") == (host, None)


@given(hosts, ports)
def test_every_endpoint_comes_back(host: str, port: int) -> None:
    assert parse_endpoint(join(host, port), "listen") == (host, port)


@given(keys)
def test_every_key_comes_back(key: bytes) -> None:
    assert parse_key(key_text(key)) == key


PARSERS: list[Callable[[str], object]] = [parse_address, parse_key, lambda text: parse_endpoint(text, "listen")]


@given(st.text(max_size=30) | near_misses, st.sampled_from(PARSERS))
@example("[", parse_address)
@example("[::1", parse_address)
@example("::1]", parse_address)
@example("[1.2.3.4]:5", parse_address)
@example("pccl://h:99999", parse_address)
@example("h:-1", parse_address)
@example("h:٣", parse_address)
@example("pccl://h?key=", parse_address)
@example("pccl://h?key=a&key=b", parse_address)
@example("pccl://h\u2100:1", parse_address)
@example("é" * 43, parse_key)
@example("\ud800", parse_key)
@example("\ud800", parse_address)
def test_any_text_is_an_address_or_an_invalid_argument(text: str, parse: Callable[[str], object]) -> None:
    try:
        parse(text)
    except InvalidArgument:
        pass


@pytest.mark.parametrize("text", [None, 5, b"host:1", ("host", 1)])
def test_an_address_is_text(text: object) -> None:
    with pytest.raises(InvalidArgument, match="text like"):
        parse_address(text)  # type: ignore[arg-type]


NONE = "|:|:1|h:x|h:65536|h:1:2|http://h:1|h:1/path|h:1#x|user@h:1|h:1?key=short|h:1?kex=x|h:1?key|[::1]x|[::1]x:5|[::1|::1]:5"


@pytest.mark.parametrize("text", NONE.split("|"))
def test_what_is_no_address_is_shown(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_address(text, "the address")
    assert text in str(caught.value) or "key" in str(caught.value)
