"""The data set of a configuration: labelled examples, and which kind of model reads what."""

import numpy as np
import pytest

from qkvjax import config as configs
from qkvjax.data.dataset_like import DatasetLike, dataset_record
from qkvjax.data.open import open_dataset
from qkvjax.errors import UserError


def config_of(kind, source, seq_len=24):
    config = configs.default()
    config.model.kind = kind
    config.data.update(source=source, seq_len=seq_len)
    return config


@pytest.fixture(scope="module")
def data():
    return open_dataset(config_of("encoder", "synthetic:recall:train=30:test=10"))


def test_a_batch_is_a_function_of_seed_and_step(data):
    one, two = data.batch(1, 2, 6), data.batch(1, 2, 6, accumulation=3)
    for name, array in one.items():
        np.testing.assert_array_equal(array.reshape(two[name].shape), two[name])
    assert two["inputs"].shape == (3, 2, 24)
    assert (one["inputs"] != data.batch(2, 2, 6)["inputs"]).any()
    epoch = np.concatenate([data.batch(1, step, 6)["inputs"][0] for step in range(5)])
    assert {row.tobytes() for row in epoch} == {row.tobytes() for row in data.train.inputs}
    with pytest.raises(UserError, match="does not divide"):
        data.batch(1, 2, 6, accumulation=4)


def test_every_label_is_scored_once(data):
    for batch_size in (3, 10, 64):
        batches = list(data.scored_batches(batch_size))
        assert all(batch["weights"].shape == (batch_size, 24) for batch in batches)
        assert sum(batch["weights"].sum() for batch in batches) == 40 == data.num_validation_tokens
    some = list(data.scored_batches(3, max_labels=12))
    assert sum(batch["weights"].sum() for batch in some) == 12


def test_text_and_examples_have_one_interface(corpus, data):
    text = open_dataset(config_of("lm", f"text:{corpus}", 16))
    members = [name for name in vars(DatasetLike) if not name.startswith("_")]
    assert len(members) == 14
    for dataset in (text, data):
        assert all(hasattr(dataset, name) for name in members)
        record = dataset_record(dataset)
        assert record["digest"] == dataset.digest
        assert record["num_train_tokens"] == dataset.num_labels("train")
    assert text.tokenizer.name == "bytes"
    assert data.tokenizer is None


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("lm", "synthetic:reverse", "model.kind=encoder, or one of copy, sub, recall"),
        ("lm", "digits", "it reads text"),
        ("lm", "anomaly:digits", "it reads text"),
        ("encoder", "stdlib", "it reads synthetic:TASK"),
        ("encoder", "digits", "it reads synthetic:TASK"),
        ("encoder", "anomaly:", "write anomaly:IMAGES"),
        ("encoder", "anomaly:stdlib", "write anomaly:IMAGES"),
        ("vit", "synthetic:sort", "it reads images"),
        ("vit", "cifar", "it reads images"),
    ],
)
def test_sources_that_a_model_does_not_read(kind, source, message):
    with pytest.raises(UserError, match=message):
        open_dataset(config_of(kind, source))


def test_digits_are_real_digits():
    pytest.importorskip("sklearn")
    config = config_of("vit", "digits", 17)
    config.model.patch_size = 2
    data = open_dataset(config)
    assert (len(data.train), len(data.validation), data.num_outputs) == (1617, 180, 10)
