"""Messages name the remedy that helps."""

import pytest

from qkvjax.data.tokenizers import load_tokenizer
from qkvjax.errors import UserError
from qkvjax.files import read_object


def test_a_missing_file_is_to_be_looked_for(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="no such file.*check the path") as refused:
        read_object(path)
    assert "or delete it" not in str(refused.value)
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON.*restore it from a copy"):
        read_object(path)


def test_a_missing_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match="tokenizer.json cannot be read.*check the path") as refused:
        load_tokenizer(f"bpe:{tmp_path}/tokenizer.json")
    assert "or delete it" not in str(refused.value)
