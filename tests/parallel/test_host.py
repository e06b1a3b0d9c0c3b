"""The compilation cache of the host process."""

import os

import pytest

from qkvjax.parallel import host


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return tmp_path


def test_compiled_programs_are_kept_for_their_user_alone(home):
    host.keep_programs()
    folder = home / ".cache/qkvjax/programs"
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_is_not_trusted(home):
    folder = home / ".cache/qkvjax/programs"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    host.keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("named", ["", "/elsewhere"])
def test_the_users_own_choice_stays(home, monkeypatch, named):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
    host.keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == named


def test_a_home_that_cannot_be_written(home):
    (home / ".cache").write_text("a file")
    host.keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
