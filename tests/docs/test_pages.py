"""The pages' Python runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_the_page_runs(page):
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    exec(compile(code, str(page), "exec"), {"__name__": page.stem})  # noqa: S102


def test_a_variant_of_ones_own_decodes_as_it_reads():
    """The cached decoding of the page's variant equals its full forward."""
    import jax.numpy as jnp
    import numpy as np

    from qkvjax.generation.decode import decode, empty_caches

    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/explanations/variants.md").read_text(), re.DOTALL)
    names = {"__name__": "variants"}
    exec(compile("\n".join(code), "variants.md", "exec"), names)  # noqa: S102
    model = names["model"]
    ids = jnp.arange(12)[None] * 7 % 256
    cache = empty_caches(model, 1, 12, jnp.float32)
    assert all(set(held) == {"kv"} for held in cache)
    found = []
    for t in range(12):
        logits, cache = decode(
            model, model.stack.layers(), cache, ids[:, t : t + 1], t, dtype=jnp.float32
        )
        found.append(logits[:, 0])
    np.testing.assert_allclose(jnp.stack(found, 1), model(ids), rtol=1e-4, atol=1e-4)
