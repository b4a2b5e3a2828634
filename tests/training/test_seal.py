"""The seal of a checkpoint's step."""

from davinci_jax.training import seal


def test_the_seal_that_another_host_is_writing_is_no_file_of_the_step(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "array").write_bytes(b"12345678")
    unfinished = tmp_path / ".seal-1-of-2.json.4711"
    unfinished.write_text("{")
    seal.write_seal(tmp_path, {"step": 3})
    unfinished.unlink()
    assert seal.find_damage(tmp_path) is None
    assert seal.read_meta(tmp_path) == {"step": 3}

    (tmp_path / "state" / "array").write_bytes(b"12345679")
    assert "state/array was altered" in seal.find_damage(tmp_path)


def test_sealed_steps_are_those_that_all_hosts_have_sealed(tmp_path):
    assert seal.sealed_steps(tmp_path / "nothing") == []
    for step in ("12", "3", "15", "20.removed"):
        (tmp_path / step).mkdir()
        seal.write_seal(tmp_path / step, {})
    (tmp_path / "15" / "seal-0-of-1.json").rename(tmp_path / "15" / "seal-0-of-2.json")
    (tmp_path / "18").mkdir()
    assert seal.sealed_steps(tmp_path) == [3, 12]
