"""Files are read and written whole or not at all; errors are one line."""

import errno
import os
import stat

import pytest

from fiddler_run.errors import FiddlerError
from fiddler_run.system import files


def test_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfOnce \xef\xbb\xbf")
    assert files.read_text(path) == "Once \ufeff"  # only at the start


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "large").write_bytes(b"x" * 11)
    for path, words in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null byte"),
    ):
        with pytest.raises(FiddlerError, match=f"cannot read: .*{words}"):
            files.read_text(path)
    with pytest.raises(FiddlerError, match=r"latin: not UTF-8 text \(byte 3\); save it as UTF-8"):
        files.read_text(tmp_path / "latin")
    with pytest.raises(FiddlerError, match="large: larger than 1e-05 MB"):
        files.read_bytes(tmp_path / "large", 10)
    for question in (files.exists, files.is_file, files.is_folder):
        assert not question(tmp_path / "none")
        assert not question(tmp_path / "latin" / "below")
        for name in ("loop", "x" * 300, "a\0b"):
            with pytest.raises(FiddlerError, match="cannot read: "):
                question(tmp_path / name)


def test_locked_folder_is_refused(tmp_path, monkeypatch):
    """Simulated, because root may enter every folder."""

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        with pytest.raises(FiddlerError, match="locked/t.yaml: cannot read: Permission denied"):
            files.exists("locked/t.yaml")
        with pytest.raises(FiddlerError, match="locked/t.yaml: cannot write: Permission denied"):
            files.require_writable("locked/t.yaml")


@pytest.mark.parametrize("name", ["loop/x", "loop", "x" * 300, "a\0b", ".", "fifo", "file/below"])
def test_unwritable_paths_are_refused(tmp_path, monkeypatch, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    for write in (files.require_writable, lambda path: files.write_whole(path, "new")):
        with pytest.raises(FiddlerError, match="cannot write: ") as refusal:
            write(name)
        assert "\n" not in str(refusal.value)
    assert sorted(os.listdir()) == before
    assert (tmp_path / "file").read_text() == "kept"


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FiddlerError, match="file: cannot write: No space left on device"):
        files.write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_new_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_whole(tmp_path / "new", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_partial_files_are_recognised_by_name(tmp_path):
    target = tmp_path / "a[b]*.yaml"
    ours = tmp_path / f".{target.name}.0123456789abcdef.partial"
    for path in (
        ours,
        tmp_path / f".{target.name}.swp",
        tmp_path / ".ab.yaml.0123456789abcdef.partial",
        target,
    ):
        path.write_text("")
    assert files.partial_files(target) == [ours]
