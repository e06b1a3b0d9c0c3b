"""Sample through the real cache, from one model or several side by side.

  qkvjax generate --workdir=runs/first --prompt="def main("
  qkvjax generate --workdir=runs/first --workdir=runs/tied --prompt="import " --temperature=0
  qkvjax generate --workdir=runs/tied --cache_layout=kv      cache K and V apart, to compare
  qkvjax generate --workdir=runs/tied --cache_dtype=int8     a byte a number, one scale a head

Prints the text, decoded tokens a second and the bytes of the cache that was allocated. Parameters
and cache are sharded over all devices: over heads and the feed-forward width as far as these
divide.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from absl import flags

from qkvjax.commands import cli
from qkvjax.errors import UserError

FLAGS = {
    "workdir": (tuple, [], "a trained run; repeat it to compare"),
    "prompt": (str, "", "text to go on from"),
    "max_tokens": (int, 200, "how many tokens to sample"),
    "temperature": (float, 0.8, "0 takes the likeliest token"),
    "seed": (int, 0, "of the samples"),
    "step": (int, None, "which checkpoint; the newest if unset"),
    "cache_layout": (str, None, "kv or shared; the smallest that fits if unset"),
    "cache_length": (int, None, "room in tokens; as much as needed if unset"),
    "cache_dtype": (str, None, "float32, bfloat16 or int8; the model's if unset"),
    "page_size": (int, None, "tokens of a page; contiguous if unset"),
    **cli.ATTENTION,
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(argv, __doc__, FLAGS, body)


def body(values: flags.FlagValues) -> None:
    if not values.workdir:
        raise UserError("--workdir=DIR is missing: which run should generate text?")
    values.prompt = _as_typed(values.prompt)
    columns = [sample(workdir, values) for workdir in values.workdir]
    print(side_by_side(columns, shutil.get_terminal_size((100, 40)).columns))


def _as_typed(text: str) -> str:
    """A word of the command line as the UTF-8 that it was typed in, whatever the locale (LC_ALL=C
    has no é); what is not UTF-8 stays as it is."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def sample(workdir: str, values: flags.FlagValues) -> list[str]:
    """The lines of one model's column: a head, the text, the figures."""
    from qkvjax.attention.spec import sharing_name
    from qkvjax.generation.generate import continuation, generate, prompt_ids
    from qkvjax.generation.serving import serve
    from qkvjax.parallel.mesh import for_generation
    from qkvjax.training.restore import load_model

    model, tokenizer, config, step = load_model(
        workdir, values.step, mesh=for_generation, attention=values.attention
    )
    if tokenizer is None:
        raise UserError(
            f"{workdir} was trained on {config.data.source}, which is not text: generate needs a"
            " language model of text"
        )
    model = serve(model, config.train.compute_dtype)
    made = generate(
        model,
        prompt_ids(tokenizer, values.prompt),
        num_ids=tokenizer.num_ids,
        max_tokens=values.max_tokens,
        temperature=values.temperature,
        seed=values.seed,
        layout=values.cache_layout,
        cache_length=values.cache_length,
        cache_dtype=values.cache_dtype,
        page_size=values.page_size,
        dtype=config.train.compute_dtype,
    )
    kept = f"{made.cache_length} tokens x {made.cache_bytes // made.cache_length:,}"
    if values.page_size is None and any(layer.window for layer in model.spec.layers):
        kept = f"{made.cache_length} tokens, of which a windowed layer keeps its window"
    return [
        f"{workdir}, step {step}: {sharing_name(config.model.sharing)}",
        "",
        *(values.prompt + continuation(tokenizer, made.ids[0])).splitlines(),
        "",
        f"{made.tokens_per_second:,.1f} tokens/s",
        f"cache {made.cache_bytes:,} bytes: {kept}",
    ]


def side_by_side(columns: list[list[str]], width: int) -> str:
    """Columns of wrapped text beside each other; a single one is left as it is."""
    if len(columns) == 1:
        return "\n".join(columns[0])
    each = max(20, (width - 3 * (len(columns) - 1)) // len(columns))
    wrapped = [
        [
            part
            for line in column
            for part in textwrap.wrap(
                line.expandtabs(4), each, drop_whitespace=False, replace_whitespace=False
            )
            or [""]
        ]
        for column in columns
    ]
    rows = zip_longest(*wrapped, fillvalue="")
    return "\n".join(" | ".join(f"{cell:<{each}}" for cell in row).rstrip() for row in rows)
