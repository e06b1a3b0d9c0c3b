"""Images from files, patches, sets with an odd one out, and damaged files."""

import gzip
import io
import struct

import numpy as np
import pytest
from PIL import Image

from qkvjax.data.image_examples import patches_of, sets_of
from qkvjax.data.images import open_images
from qkvjax.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (60, 8, 12), dtype=np.uint8)
LABELS = (np.arange(60) % 3).astype(np.uint8)


@pytest.fixture
def npz(tmp_path):
    """Returns a function that writes an npz file and returns its source."""

    def make(**arrays):
        np.savez(tmp_path / "images.npz", **arrays)
        return f"npz:{tmp_path / 'images.npz'}"

    return make


@pytest.fixture
def idx(tmp_path):
    """The four files of MNIST's format, the second half of them compressed."""

    def write(name, array, pack):
        head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        content = head + array.tobytes()
        if pack:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / name).write_bytes(content)

    for split, part in (("train", slice(40)), ("t10k", slice(40, 60))):
        write(f"{split}-images-idx3-ubyte", PIXELS[part], split == "train")
        write(f"{split}-labels-idx1-ubyte", LABELS[part], split == "t10k")
    return f"idx:{tmp_path}", tmp_path


def test_idx_files_are_read(idx):
    images = open_images(idx[0])
    np.testing.assert_array_equal(images.train[0][..., 0], PIXELS[:40])
    np.testing.assert_array_equal(images.validation[1], LABELS[40:])
    assert images.num_classes == 3


def test_an_npz_with_both_splits_keeps_them(npz):
    source = npz(x_train=PIXELS[:50], y_train=LABELS[:50], x_test=PIXELS[50:], y_test=LABELS[50:])
    images = open_images(source)
    np.testing.assert_array_equal(images.validation[0][..., 0], PIXELS[50:])


def test_an_npz_with_one_gives_its_last_tenth_of_a_shuffle(npz):
    images = open_images(npz(images=PIXELS, labels=LABELS))
    assert (len(images.train[0]), len(images.validation[0])) == (54, 6)
    both = np.concatenate([images.train[0], images.validation[0]])[..., 0]
    assert {x.tobytes() for x in both} == {x.tobytes() for x in PIXELS}


def test_patches_are_the_image_row_by_row(npz):
    images = open_images(npz(images=PIXELS, labels=LABELS))
    data = patches_of("npz:x", images, 4, 7, "none")
    batch = next(data.scored_batches(4))
    assert batch["inputs"].shape == (4, 6, 16) and batch["positions"].shape == (4, 7)
    assert batch["targets"].shape == batch["weights"].shape == (4, 1)
    row = images.normalised(images.validation[0][:1])[0, :, :, 0]
    np.testing.assert_array_equal(batch["inputs"][0, 1].reshape(4, 4), row[:4, 4:8])
    np.testing.assert_array_equal(batch["inputs"][0, 3].reshape(4, 4), row[4:, :4])
    every = data.show(images.train[0], None)
    assert abs(every.mean()) < 1e-5 and every.std() == pytest.approx(1, abs=1e-4)


def test_augmented_images_follow_from_seed_and_step(npz):
    images = open_images(npz(images=PIXELS, labels=LABELS))
    plain, moved = (patches_of("npz:x", images, 4, 7, how) for how in ("none", "crop_flip"))
    one, two, other = (moved.batch(0, step, 8)["inputs"] for step in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert (one != plain.batch(0, 3, 8)["inputs"]).any() and (one != other).any()
    scored = [next(data.scored_batches(4))["inputs"] for data in (plain, moved)]
    np.testing.assert_array_equal(*scored)


def test_every_set_has_one_odd_image(npz):
    flat = np.repeat(LABELS[:, None], 4, axis=1).reshape(60, 2, 2)  # the pixels tell the class
    data = sets_of("anomaly:npz:x", open_images(npz(images=flat, labels=LABELS)), 10, (100, 40))
    for batch in (data.batch(0, 0, 64), next(data.scored_batches(40))):
        inputs = batch["inputs"].reshape(-1, 10, 4)
        for pixels, place in zip(inputs[:, :, 0], batch["targets"].ravel()):
            usual = np.delete(pixels, place)
            assert (usual == usual[0]).all() and pixels[place] != usual[0]
    assert data.output == "choice" and data.num_outputs == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": PIXELS}, "holds pictures: save it with"),
        ({"images": PIXELS, "labels": LABELS[:9]}, "do not fit"),
        ({"images": PIXELS[:, 0], "labels": LABELS}, "do not fit"),
        ({"images": PIXELS, "labels": LABELS.astype(int) - 1}, "label -1 is out of range"),
        ({"images": PIXELS, "labels": LABELS + 0.5}, "is out of range: labels are whole numbers"),
        (
            {"x_train": PIXELS, "y_train": LABELS, "x_test": PIXELS, "y_test": LABELS + 1},
            "label 3 is out of range",
        ),
        (
            {"images": PIXELS, "labels": LABELS.astype(int) + 2**40},
            r"1099511627778 is out of range.*fewer",
        ),
        ({"images": np.where(PIXELS == 7, np.nan, PIXELS), "labels": LABELS}, "finite real"),
        (
            {"images": PIXELS, "labels": LABELS.astype(str)},
            "labels are names.*'[012]'.*numpy.unique",
        ),
        ({"images": PIXELS, "labels": LABELS.astype("S4")}, "labels are names"),
        (
            {"x_train": PIXELS, "y_train": LABELS, "x_test": PIXELS, "y_test": LABELS.astype(str)},
            "labels are names",
        ),
        ({"images": PIXELS, "labels": np.array([{}] * 60)}, "holds Python objects"),
        ({"images": PIXELS, "labels": np.eye(3)[LABELS]}, r"do not fit.*labels\.argmax\(1\)"),
        ({"images": PIXELS, "labels": LABELS[:, None]}, r"do not fit.*labels\[:, 0\]"),
        ({"images": PIXELS.reshape(60, -1), "labels": LABELS}, "do not fit.*reshape"),
        (
            {"images": PIXELS[:, None].repeat(3, 1), "labels": LABELS},
            r"3, 8, 12\) look like \[n, channels.*transpose\(0, 2, 3, 1\)",
        ),
        ({"images": PIXELS[:, None], "labels": LABELS}, "look like .n, channels"),
        ({"images": PIXELS * 1j, "labels": LABELS}, r"pixels \(complex128\) must be finite real"),
        ({"images": PIXELS.astype(str), "labels": LABELS}, "must be finite real"),
        (
            {"x_train": PIXELS, "y_train": LABELS, "x_test": PIXELS[:, 2:], "y_test": LABELS},
            r"to score are \(6, 12\), those to train on \(8, 12\): make them of one size",
        ),
    ],
)
def test_arrays_that_are_not_labelled_images(npz, arrays, message):
    with pytest.raises(UserError, match=message):
        open_images(npz(**arrays))


def test_damaged_files_are_refused(npz, idx, tmp_path):
    source = npz(images=PIXELS, labels=LABELS)
    file = tmp_path / "images.npz"
    for content in (file.read_bytes()[:900], b"", b"PK no zip"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is damaged or of another kind"):
            open_images(source)
    with open(file, "wb") as alone:
        np.save(alone, PIXELS)  # an array, and not a file of several
    with pytest.raises(UserError, match="is damaged or of another kind.*numpy.savez"):
        open_images(source)
    with pytest.raises(UserError, match="nothing is at"):
        open_images("npz:/nowhere.npz")
    source, folder = idx
    packed = folder / "train-images-idx3-ubyte.gz"
    for content in (
        packed.read_bytes()[:99],
        gzip.compress(b"\0\0\x08"),
        gzip.compress(b"\0\0\x08\x03"),
        b"\x1f\x8b junk",
    ):
        packed.write_bytes(content)
        with pytest.raises(UserError, match="is damaged or of another kind"):
            open_images(source)
    packed.unlink()
    with pytest.raises(UserError, match="has no train-images-idx3-ubyte"):
        open_images(source)


def test_shapes_that_do_not_fit(npz):
    images = open_images(npz(images=PIXELS, labels=LABELS))
    with pytest.raises(UserError, match="patch_size=5 does not divide images of 8 x 12"):
        patches_of("npz:x", images, 5, 7, "none")
    odd = open_images(npz(images=PIXELS[:, :7], labels=LABELS))
    with pytest.raises(UserError, match="7 x 12 pixels: only 1 divides both sides, so pad or crop"):
        patches_of("npz:x", odd, 4, 7, "none")
    with pytest.raises(UserError, match="data.seq_len=7, not 16"):
        patches_of("npz:x", images, 4, 16, "none")
    with pytest.raises(UserError, match="data.seq_len=10"):
        sets_of("anomaly:npz:x", images, 16)


def png(image: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    file.seek(0)
    return file


@pytest.mark.parametrize("compressed", [False, True])
def test_images_that_tfds_has_prepared(compressed, tmp_path, monkeypatch):
    """As plain numbers, and as PNG, in which CIFAR and its like are kept."""
    import tensorflow_datasets as tfds

    shape = 8, 12, 1
    feature = tfds.features.Tensor(shape=shape, dtype=np.uint8)
    if compressed:
        feature = tfds.features.Image(shape=shape, encoding_format="png")

    class LittlePictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": feature,
                    "label": tfds.features.ClassLabel(num_classes=3),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._rows(0, 40), "test": self._rows(40, 60)}

        def _rows(self, start, stop):
            for i in range(start, stop):
                image = png(PIXELS[i]) if compressed else PIXELS[i][..., None]
                yield i, {"image": image, "label": int(LABELS[i])}

        _generate_examples = _rows

    LittlePictures(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    images = open_images("tfds:little_pictures")
    np.testing.assert_array_equal(images.train[0][..., 0], PIXELS[:40])
    np.testing.assert_array_equal(images.validation[1], LABELS[40:])
    with pytest.raises(UserError, match="is not prepared in"):
        open_images("tfds:cifar10")
