"""The Python of the pages compiles and runs as it stands."""

import shutil

import pytest
from site_pages import DOCS, ROOT, blocks, name_of

from qkvjax.commands import cli

WITH_PYTHON = [page for page in DOCS if blocks(page, "python")]
VARIANT = ROOT / "docs/tutorials/your_variant.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the workdirs that the pages name: runs/qkv, runs/tied and runs/study."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    arguments = (
        f"--config.data.source=text:{folder / 'text.txt'}",
        "--config.train.steps=2",
        "--config.data.seq_len=16",
        "--config.data.batch_size=2",
        "--config.model.d_model=32",
        "--config.evals.eval.max_labels=200",
    )
    run = f"--workdir={folder / 'runs/tied'}"
    recipe = "--config=configs/lm.py:depth=2,sharing=q-k=v"
    assert cli.main(["qkvjax", "train", recipe, run, *arguments]) == 0
    shutil.copytree(folder / "runs/tied", folder / "runs/qkv")
    shutil.copytree(ROOT / "benchmarks/results/equal_cache", folder / "runs/study")
    return folder


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_of_the_page_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    code = "\n".join(blocks(page, "python"))
    exec(compile(code, str(page), "exec"), {"__name__": page.stem})  # noqa: S102


def test_a_variant_of_ones_own_takes_about_thirty_lines():
    code = "\n".join(blocks(VARIANT, "python"))
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 36


def test_a_variant_of_ones_own_decodes_as_it_reads():
    """The cached decoding of the page's variant equals its full forward."""
    import jax.numpy as jnp
    import numpy as np

    from qkvjax.generation.decode import decode, empty_caches

    names = {"__name__": "variants"}
    exec(compile("\n".join(blocks(VARIANT, "python")), VARIANT.name, "exec"), names)  # noqa: S102
    model = names["model"]
    ids = jnp.arange(12)[None] * 7 % 256
    cache = empty_caches(model, 1, 12, jnp.float32)
    assert all(set(layer) == {"kv"} for layer in cache)
    outputs = []
    for t in range(12):
        logits, cache = decode(
            model, model.stack.layers(), cache, ids[:, t : t + 1], t, dtype=jnp.float32
        )
        outputs.append(logits[:, 0])
    np.testing.assert_allclose(jnp.stack(outputs, 1), model(ids), rtol=1e-4, atol=1e-4)
