"""Files are whole or not there, and errors name the file that a person knows."""

import os

import pytest

from davinci_jax.files import write_atomically


def test_an_error_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_atomically(file, "old")

    def refuse(old, new):
        raise PermissionError(13, "Permission denied", str(old), None, str(new))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError) as caught:
        write_atomically(file, "new")
    assert (caught.value.filename, caught.value.filename2) == (str(file), None)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "none" / "a.json", "new")
    assert caught.value.filename == str(tmp_path / "none" / "a.json")
