import pytest


@pytest.fixture(autouse=True)
def data_folder(tmp_path_factory, monkeypatch):
    """An empty data folder for each test."""
    folder = tmp_path_factory.mktemp("prepared")
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def corpus(tmp_path):
    """A folder of 40 documents of different lengths, with an accent in each."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        words = " ".join(f"{i}.{j}" for j in range(i % 7 * 8))
        (folder / f"{i:02d}.txt").write_text(f"document é {i}: {words}")
    return folder
