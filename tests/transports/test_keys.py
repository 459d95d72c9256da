import os
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from pccl.core.address import key_text
from pccl.core.errors import InvalidArgument
from pccl.transports.keys import AllowList, KeyPair, load_allowed, load_keypair, new_keypair, save_keypair


def test_a_new_pair_is_one_of_curve() -> None:
    one, other = new_keypair(), new_keypair()
    assert len(one.public) == len(one.secret) == 32
    assert one != other
    assert z85.decode(zmq.curve_public(z85.encode(one.secret))) == one.public


def test_the_secret_is_not_shown() -> None:
    pair = new_keypair()
    assert repr(pair) == f"KeyPair({key_text(pair.public)})"
    assert key_text(pair.secret) not in f"{pair} {pair!r}"


def test_a_file_keeps_a_pair(tmp_path: Path) -> None:
    pair, path = new_keypair(), tmp_path / "key"
    save_keypair(path, pair)
    assert load_keypair(path) == load_keypair(str(path)) == pair
    assert path.stat().st_mode & 0o777 == 0o600
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    assert f"public = {key_text(pair.public)}" in lines


def test_a_file_is_private_whatever_the_umask_is(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        save_keypair(tmp_path / "key", new_keypair())
    finally:
        os.umask(old)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    pair, path = new_keypair(), tmp_path / "key"
    save_keypair(path, pair)
    with pytest.raises(InvalidArgument, match="exists"):
        save_keypair(path, new_keypair())
    assert load_keypair(path) == pair


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o666])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    save_keypair(path, new_keypair())
    path.chmod(mode)
    with pytest.raises(InvalidArgument, match=f"chmod 600 {path}"):
        load_keypair(path)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="missing: cannot be read"):
        load_keypair(tmp_path / "missing")
    with pytest.raises(InvalidArgument, match="cannot be written"):
        save_keypair(tmp_path / "no" / "such" / "folder", new_keypair())
    with pytest.raises(InvalidArgument, match="missing: cannot be read"):
        load_allowed(tmp_path / "missing")


SECRET = key_text(b"s" * 32)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "not a key file"),
        (f"public = {SECRET}\n", "not a key file"),
        (f"\nprivate = {SECRET}\n", "line 2: 'public"),
        (f"secret = {SECRET}x\n", "line 1: not a key"),
        (f"secret {SECRET}\n", "line 1"),
        (f"public = {SECRET}\nsecret = {SECRET}\n", "not that of the secret"),
        ("\0\ufffd\n", "line 1"),
    ],
)
def test_files_that_are_wrong_are_refused_without_showing_the_secret(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(InvalidArgument, match=error) as caught:
        load_keypair(path)
    assert SECRET not in str(caught.value)


def test_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"\xff\xfe\x00")
    path.chmod(0o600)
    for load in (load_keypair, load_allowed):
        with pytest.raises(InvalidArgument, match="not a"):
            load(path)


def test_a_list_of_keys_may_have_comments_and_names(tmp_path: Path) -> None:
    a, b = key_text(b"a" * 32), key_text(b"b" * 32)
    path = tmp_path / "allowed"
    path.write_text(f"# peers\n\n{a}\n  {b}  the second one # for now\n")
    assert load_allowed(path) == {b"a" * 32: "", b"b" * 32: "the second one"}


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    path.write_text(f"{key_text(b'a' * 32)}\nrubbish\n")
    with pytest.raises(InvalidArgument, match="allowed, line 2: 'rubbish' is not a key"):
        load_allowed(path)


def test_keys_may_be_given() -> None:
    allowed = AllowList([b"a" * 32])
    assert b"a" * 32 in allowed
    assert b"b" * 32 not in allowed
    for wrong in (["text"], [b"short"], [KeyPair(b"a" * 32, b"a" * 32)]):
        with pytest.raises(InvalidArgument, match="allowed"):
            AllowList(wrong)  # type: ignore[arg-type]


def test_a_changed_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "allowed"
    path.write_text("")
    allowed = AllowList(path)
    assert b"a" * 32 not in allowed
    path.write_text(key_text(b"a" * 32))
    assert b"a" * 32 in allowed
    path.write_text("rubbish")
    assert b"a" * 32 in allowed
    path.unlink()
    assert b"a" * 32 in allowed
    assert [record.message.partition(": ")[0] for record in caplog.records] == ["the list of allowed keys stays as it was"] * 2
    path.write_text(key_text(b"b" * 32))
    assert b"a" * 32 not in allowed
    with pytest.raises(InvalidArgument):
        AllowList(tmp_path / "missing")
