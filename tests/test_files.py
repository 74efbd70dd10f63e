"""Files are written whole or not at all, JSON is the same text for equal values, a lock keeps others out."""

import errno
import hashlib
import json
import multiprocessing
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sjepa_deploy.files import (
    bytes_hash,
    canonical_json,
    file_hash,
    file_lock,
    json_file,
    load_json,
    seal,
    write_atomically,
    written_whole,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(JSON)
def test_json_is_read_back_and_does_not_depend_on_the_order_of_keys(value):
    assert json.loads(json_file(value)) == load_json(canonical_json(value).encode()) == value
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(list(value.items())))) == canonical_json(value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_json_has_no_word_for_is_not_written(number):
    for write in (canonical_json, json_file):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write([number])
    with pytest.raises(ValueError, match="no JSON number"):
        load_json(json.dumps([number]).encode())


@pytest.mark.parametrize("text", [b'{"a":' * 200 + b"1" + b"}" * 200, b"[" * 100_000, b"[" * 101 + b"]" * 101])
@pytest.mark.parametrize("finite", [True, False])
def test_json_that_is_nested_too_deeply_is_a_value_error(text, finite):
    with pytest.raises(ValueError, match="nested more than 100 levels deep"):
        load_json(text, finite=finite)
    assert load_json(b"[" * 99 + b"]" * 99, finite=finite)


@given(st.binary(max_size=1 << 12) | st.integers(1, 3).map(lambda n: bytes(n << 20)))
def test_hashes_are_sha256(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "hashed"
    file.write_bytes(content)
    assert file_hash(file) == bytes_hash(content) == hashlib.sha256(content).hexdigest()


def test_a_file_is_replaced_whole_with_the_rights_of_any_new_file(tmp_path):
    file, other = tmp_path / "a.json", tmp_path / "other"
    other.touch()
    for content in (b"old", b"new"):
        write_atomically(file, content)
        assert file.read_bytes() == content
    assert file.stat().st_mode == other.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [file, other]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path, monkeypatch, error):
    file = tmp_path / "a.npz"
    write_atomically(file, b"old")

    def fail(*_):
        raise error

    def interrupted():
        with written_whole(file) as path:
            assert path.suffix == ".npz", "NumPy appends it otherwise"
            path.write_bytes(b"ne")
            fail()

    with pytest.raises(type(error)):
        interrupted()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(type(error)):
            write_atomically(file, b"new")
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("a.npz", b"old")]


def _hold(file, held, leave):
    with file_lock(file):
        held.set()
        leave.wait(30)


def test_a_lock_keeps_another_process_out_until_it_is_given_back(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, leave = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "folder" / "lock", held, leave))
    process.start()
    assert held.wait(30)
    waited = []
    with file_lock(tmp_path / "folder" / "lock", waiting=lambda: (waited.append(process.is_alive()), leave.set())):
        process.join(30)
    assert waited == [True]
    assert process.exitcode == 0
    with pytest.raises(FileExistsError), file_lock(tmp_path / "folder" / "lock" / "lock"):
        pytest.fail("the block must not run")


VALUES = st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4))
def test_a_seal_is_of_what_stands_in_the_file(data):
    """Not of what this release reads of it: a key that it does not know counts, and one that it adds does not."""
    stored = json.loads(json.dumps(data))
    digest = seal(stored)
    assert seal(stored | {"digest": digest}) == digest
    assert seal(json.loads(json.dumps(stored, indent=3))) == digest
    assert seal(stored | {"another key": 1}) != digest
