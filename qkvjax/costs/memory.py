"""Peak memory of compiled programs against batch and context, for every sharing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qkvjax import config as configs
from qkvjax import formats
from qkvjax.attention.spec import SHARINGS, sharing_name
from qkvjax.costs import sharings
from qkvjax.errors import UserError
from qkvjax.report import drawing

ARTICLE = (0.10, 0.25)  # the range of what training saves in the article, over batch sizes
MODES = {"train": "a training step", "decode": "decoding"}


def measure(config, batches: list[int], contexts: list[int], log: Callable[[str], None]) -> list:
    """Compiles a training step and a decoding step of every sharing, without running them.

    Args:
      config: of a language model; its sharing is replaced by each in turn.
      batches: sequences of a batch, varied at data.seq_len.
      contexts: tokens of a sequence, varied at data.batch_size.
      log: is called with a line for each sharing.

    Returns:
      A record for each program: mode, sharing, batch, context, peak_bytes, where it was compiled,
      and num_params of the model with three projections, which identifies the model.

    Raises:
      UserError: the config is not of a language model.
    """
    if config.model.kind != "lm":
        raise UserError(
            f"model.kind={config.model.kind!r}: bench memory needs a language model (model.kind=lm)"
        )
    from qkvjax.parallel import host

    _, costs = sharings.recipe_costs(configs.changed(config, model={"sharing": "q-k-v"}))
    facts = {
        "what": "memory",
        "device": host.device_name(),
        "environment": host.environment(),
        "num_params": costs["num_params"],
    }
    base_batch = config.data.batch_size
    base_context = config.data.seq_len
    shapes = [(batch, base_context) for batch in batches]
    shapes += [(base_batch, context) for context in contexts]
    records = []
    for sharing in SHARINGS:
        message = f"compiled {sharing_name(sharing)}"
        for mode in MODES:
            try:
                for batch, context in dict.fromkeys(shapes):
                    record = {
                        "mode": mode,
                        "sharing": sharing,
                        "batch": batch,
                        "context": context,
                        "peak_bytes": _peak(config, sharing, mode, batch, context),
                        "base_batch": base_batch,
                        "base_context": base_context,
                        "date": host.now(),
                    }
                    records.append(facts | record)
            except UserError as error:  # the numbers of heads forbid the sharing
                message = f"{sharing_name(sharing)} is left out: {error}"
        log(message)
    return records


def _peak(config, sharing: str, mode: str, batch: int, context: int) -> int | None:
    """Returns the peak bytes of one program."""
    import jax

    from qkvjax.data.tokenizers import tokenizer_size
    from qkvjax.models.spec import model_spec
    from qkvjax.parallel.mesh import make_mesh
    from qkvjax.training.fits import peak_bytes
    from qkvjax.training.run import compile_for

    config = configs.changed(
        config,
        model={"sharing": sharing},
        data={"batch_size": batch, "seq_len": context},
        train={"accumulation": 1},
    )
    num_ids = tokenizer_size(config.data.tokenizer)
    spec = model_spec(config.model, num_ids, context)
    if mode == "decode":
        return peak_bytes(_compile_decode_step(config, spec, num_ids))
    mesh = make_mesh(config.mesh.sizes, jax.devices()[:1])
    compiled, _ = compile_for(config, spec, mesh)
    return peak_bytes(compiled)


def _compile_decode_step(config, spec, num_ids: int):
    """Compiles the decoding of one token at the end of a full cache."""
    import jax
    import jax.numpy as jnp

    from qkvjax.generation.decode import empty_caches, sample_tokens
    from qkvjax.models.build import make

    batch = config.data.batch_size
    context = config.data.seq_len
    dtype = jnp.dtype(config.train.compute_dtype)
    # The weights have the dtype that is computed in, as when a model is served.
    model = jax.eval_shape(lambda: make(spec, jax.random.key(0)))
    model = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), model)
    lowered = sample_tokens.lower(
        model,
        jax.eval_shape(lambda m: m.stack.layers(), model),
        jax.eval_shape(lambda m: empty_caches(m, batch, context, dtype), model),
        jax.ShapeDtypeStruct((batch, spec.vocab_size), jnp.float32),  # logits
        jnp.int32(context - 1),  # start
        jax.random.key(0),
        jnp.float32(1),  # temperature
        dtype=dtype,
        max_tokens=1,
        num_ids=num_ids,
        greedy=True,
    )
    return lowered.compile()


def table(records: list[dict]) -> list[str]:
    """Returns the lines of a table: what three projections take and what each sharing saves."""
    measured = _measured_sharings(records)
    header = [("", ""), ("", "batch"), ("", "context"), ("QKV", "peak")]
    header += [(sharing_name(sharing), "saves") for sharing in measured[1:]]
    shapes = dict.fromkeys((r["batch"], r["context"]) for r in records)
    rows = []
    for mode, title in MODES.items():
        for batch, context in shapes:
            peaks = {
                r["sharing"]: r["peak_bytes"]
                for r in records
                if (r["mode"], r["batch"], r["context"]) == (mode, batch, context)
            }
            base = peaks["q-k-v"]
            saved = [
                formats.saved(1 - peaks[sharing] / base) if sharing in peaks else formats.NONE
                for sharing in measured[1:]
            ]
            rows.append([title, f"{batch:,}", f"{context:,}", formats.num_bytes(base), *saved])
    return formats.table(header, rows)


def _measured_sharings(records: list[dict]) -> list[str]:
    """Returns the sharings that have a record, three projections first."""
    measured = {record["sharing"] for record in records}
    return [sharing for sharing in SHARINGS if sharing in measured]


def savings(records: list[dict], mode: str) -> Iterator[tuple[str, int, int, float]]:
    """Yields (sharing, batch, context, part of the baseline's peak that it saves)."""
    records = [r for r in records if r["mode"] == mode and r.get("peak_bytes")]
    base_peaks = {
        (r["batch"], r["context"]): r["peak_bytes"] for r in records if r["sharing"] == "q-k-v"
    }
    for record in records:
        shape = (record["batch"], record["context"])
        if record["sharing"] != "q-k-v" and shape in base_peaks:
            yield record["sharing"], *shape, 1 - record["peak_bytes"] / base_peaks[shape]


def plot(records: list[dict]):
    """Draws what each sharing saves of the peak: a row for each mode, against batch and context.

    A band shows the range of the article.
    """
    figure, panels = drawing.new(8.6, 5.6, columns=2, rows=2)
    for row, (mode, title) in enumerate(MODES.items()):
        for column, axis in enumerate(("batch", "context")):
            axes = panels[2 * row + column]
            _draw_savings(axes, records, mode, axis)
            if mode == "train":
                low, high = (100 * part for part in ARTICLE)
                axes.axhspan(low, high, color=drawing.FAINT, alpha=0.25, lw=0)
            fixed = f"{records[0]['base_context']:,} tokens"
            if axis == "context":
                fixed = f"{records[0]['base_batch']:,} sequences"
            axes.set_title(f"{title}, {fixed}", fontsize=10)
        panels[2 * row].set_ylabel("peak saved, %")
    panels[0].legend(frameon=False, fontsize=8.5)
    return figure


def _draw_savings(axes, records: list[dict], mode: str, axis: str) -> None:
    """Draws a line for each sharing along `axis`, "batch" or "context", with the other fixed."""
    base_batch = records[0]["base_batch"]
    base_context = records[0]["base_context"]
    for number, name in enumerate(_measured_sharings(records)[1:]):
        points = []
        for sharing, batch, context, saved in savings(records, mode):
            if sharing != name:
                continue
            if axis == "batch" and context == base_context:
                points.append((batch, 100 * saved))
            elif axis == "context" and batch == base_batch:
                points.append((context, 100 * saved))
        style = drawing.line_style(number)
        axes.plot(*zip(*sorted(points)), marker=".", label=sharing_name(name), **style)
    axes.axhline(0, color=drawing.INK, linewidth=1)
    ticks = sorted({record[axis] for record in records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("sequences of a batch" if axis == "batch" else "tokens of a sequence")
