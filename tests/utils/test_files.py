"""Atomic files: a reader sees the old content or the new one."""

from __future__ import annotations

import pytest

from diffusers_ddpm_ext.utils.files import write_atomically, write_text_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_parent_folders_are_made_only_where_wanted(tmp_path):
    assert write_text_atomically(tmp_path / "a" / "b.txt", "ü").read_bytes() == "ü".encode()
    with pytest.raises(FileNotFoundError):
        write_text_atomically(tmp_path / "c" / "d.txt", "", make_parents=False)
