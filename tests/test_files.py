import os
import stat
from pathlib import Path

import pytest

from lipcert.files import write_atomically


@pytest.mark.parametrize(
    ("data", "content"), [(b"\x00\xff\r\n", b"\x00\xff\r\n"), ("α\r\nβ\n", "α\r\nβ\n".encode())]
)
def test_the_content_arrives_byte_for_byte_and_replaces_the_old(tmp_path, data, content):
    path = tmp_path / "file"
    path.write_bytes(b"a much longer content that was there before")
    write_atomically(path, data)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("no space left")])
@pytest.mark.parametrize(("owner", "step"), [(os, "fsync"), (Path, "replace")])
@pytest.mark.parametrize("old", [b"old", None])
def test_an_interruption_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path, monkeypatch, failure, owner, step, old
):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)

    def interrupt(*args):
        assert len(list(tmp_path.iterdir())) == (1 if old is None else 2)  # half-way: both exist
        raise failure

    monkeypatch.setattr(owner, step, interrupt)
    with pytest.raises((KeyboardInterrupt, OSError)):
        write_atomically(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"file": old} if old else {})


def test_nothing_of_the_new_content_shows_before_the_replacement(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(path.read_bytes()), fsync(fd)))
    write_atomically(path, b"new")
    assert seen == [b"old"]  # the new content was forced to disk while the old one still stood


def test_a_missing_folder_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "file", b"new")
    assert not list(tmp_path.iterdir())


def test_the_file_gets_the_rights_any_new_file_would_get(tmp_path):
    write_atomically(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    atomic, plain = (stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("atomic", "plain"))
    assert atomic == plain
