"""Atomic writing; what a full disk or a kill leaves is in test_checkpoint.py."""

import errno
import os
import stat

import pytest

from pico_tg.files import PicoError, atomic_write, fsync_folder
from pico_tg.tools.cli import check_writable


def test_a_link_is_followed(tmp_path):
    """To a file in another folder, or to one that is not there yet; nothing else is left."""
    there = tmp_path / "there"
    there.mkdir()
    (there / "old").write_bytes(b"before")
    (tmp_path / "link").symlink_to("there/old")
    (tmp_path / "new-link").symlink_to("link-to-link")
    (tmp_path / "link-to-link").symlink_to(there / "new")
    for name in ("link", "new-link"):
        check_writable(tmp_path / name)
        with atomic_write(tmp_path / name) as file:
            file.write(b"after")
        assert (tmp_path / name).is_symlink()
    assert (there / "old").read_bytes() == (there / "new").read_bytes() == b"after"
    assert sorted(os.listdir(there)) == ["new", "old"]
    assert sorted(os.listdir(tmp_path)) == ["link", "link-to-link", "new-link", "there"]


def test_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "a").symlink_to("no/where")
    (tmp_path / "b").symlink_to("b")
    for name in ("a", "b"):
        with pytest.raises(PicoError, match="cannot write"), atomic_write(tmp_path / name):
            pass
        assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a pipe"])
def test_what_is_no_file_is_not_replaced(kind, tmp_path):
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe") if kind == "link to a pipe" else (tmp_path / "pipe").rename(path)
    before = sorted(os.listdir(tmp_path))
    for write in (check_writable, lambda path: atomic_write(path).__enter__()):
        with pytest.raises(PicoError, match=r"cannot write .* not a file"):
            write(path)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(os.name != "posix", reason="other systems do not sync folders")
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_fsync_of_folders(code, tmp_path, monkeypatch):
    """EINVAL and ENOTSUP say that it cannot be had; EIO says that data may be lost."""
    fsync = os.fsync

    def refuse(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            fsync_folder(tmp_path)
        with pytest.raises(PicoError, match="cannot write"), atomic_write(tmp_path / "a") as file:
            file.write(b"text")
    else:
        fsync_folder(tmp_path)
        with atomic_write(tmp_path / "a") as file:
            file.write(b"text")
    assert (tmp_path / "a").read_bytes() == b"text"
    assert os.listdir(tmp_path) == ["a"]
