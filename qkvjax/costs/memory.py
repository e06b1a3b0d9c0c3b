"""Peak memory of compiled programs against batch and context, for every sharing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qkvjax import config as configs
from qkvjax import formats
from qkvjax.attention.spec import SHARINGS, sharing_name
from qkvjax.costs import sharings
from qkvjax.errors import UserError
from qkvjax.report import drawing

ARTICLE = (0.10, 0.25)  # what the article says training saves, by batch size
MODES = {"train": "a training step", "decode": "decoding"}


def measure(config, batches: list[int], contexts: list[int], log: Callable[[str], None]) -> list:
    """A record a program: mode, sharing, batch, context, peak_bytes, where it was compiled, and
    num_params of the model with three projections, which says what was compiled.

    Args:
      config: of a language model; its sharing is replaced by each in turn.
      batches, contexts: varied one at a time, around data.batch_size and data.seq_len.

    Raises:
      UserError: no language model, or one that only three projections fit.
    """
    if config.model.kind != "lm":
        raise UserError(f"model.kind={config.model.kind!r}: memory is measured of kind lm")
    from qkvjax.parallel import host

    exact = sharings.recipe_costs(configs.changed(config, model={"sharing": "q-k-v"}))[1]
    facts = {
        "what": "memory",
        "device": host.device_name(),
        "environment": host.environment(),
        "num_params": exact["num_params"],
    }
    places = [(b, config.data.seq_len) for b in batches]
    places += [(config.data.batch_size, c) for c in contexts]
    records, refused = [], None
    for sharing in SHARINGS:
        for mode in MODES:
            for batch, context in dict.fromkeys(places):
                try:
                    peak = _peak(config, sharing, mode, batch, context)
                except UserError as error:
                    refused = f"{sharing_name(sharing)} is left out: {error}"
                    break
                records.append(
                    facts
                    | {
                        "mode": mode,
                        "sharing": sharing,
                        "batch": batch,
                        "context": context,
                        "peak_bytes": peak,
                        "base_batch": config.data.batch_size,
                        "base_context": config.data.seq_len,
                        "date": host.now(),
                    }
                )
        log(refused or f"compiled {sharing_name(sharing)}")
        refused = None
    return records


def _peak(config, sharing: str, mode: str, batch: int, context: int) -> int | None:
    """Peak bytes of one program, compiled and not run."""
    import jax

    from qkvjax.costs.measure import peak_bytes
    from qkvjax.data.tokenizers import tokenizer_size
    from qkvjax.models.spec import model_spec
    from qkvjax.parallel.mesh import make_mesh
    from qkvjax.training.run import compile_for

    values = {"data": {"batch_size": batch, "seq_len": context}, "train": {"accumulation": 1}}
    config = configs.changed(config, model={"sharing": sharing}, **values)
    num_ids = tokenizer_size(config.data.tokenizer)
    spec = model_spec(config.model, num_ids, context)
    if mode == "decode":
        return peak_bytes(_decode_step(config, spec, num_ids))
    mesh = make_mesh(config.mesh.sizes, jax.devices()[:1])
    return peak_bytes(compile_for(config, spec, mesh)[0])


def _decode_step(config, spec, num_ids):
    import jax
    import jax.numpy as jnp

    from qkvjax.generation.decode import empty_caches, sample_tokens
    from qkvjax.models.build import make

    batch, context = config.data.batch_size, config.data.seq_len
    dtype = jnp.dtype(config.train.compute_dtype)
    # Weights as they are served: in the dtype that is computed in.
    model = jax.eval_shape(lambda: make(spec, jax.random.key(0)))
    model = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), model)
    layers = jax.eval_shape(lambda m: m.stack.layers(), model)
    cache = jax.eval_shape(lambda m: empty_caches(m, batch, context, dtype), model)
    logits = jax.ShapeDtypeStruct((batch, spec.vocab_size), jnp.float32)
    arguments = (jnp.int32(context - 1), jax.random.key(0), jnp.float32(1))
    options = {"dtype": dtype, "max_tokens": 1, "num_ids": num_ids, "greedy": True}
    return sample_tokens.lower(model, layers, cache, logits, *arguments, **options).compile()


def table(records: list[dict]) -> list[str]:
    """Lines of a table: a row a program, what the baseline takes and what each sharing saves."""
    shown = [s for s in SHARINGS if any(r["sharing"] == s for r in records)]
    header = [("", ""), ("", "batch"), ("", "context"), ("QKV", "peak")]
    header += [(sharing_name(s), "saves") for s in shown[1:]]
    rows = []
    for mode, told in MODES.items():
        for place in dict.fromkeys((r["batch"], r["context"]) for r in records):
            found = {
                r["sharing"]: r["peak_bytes"]
                for r in records
                if r["mode"] == mode and (r["batch"], r["context"]) == place
            }
            base = found["q-k-v"]
            saved = [formats.saved(1 - found[s] / base) if s in found else "–" for s in shown[1:]]
            rows.append([told, f"{place[0]:,}", f"{place[1]:,}", formats.num_bytes(base), *saved])
    return formats.table(header, rows)


def savings(records: list[dict], mode: str) -> Iterator[tuple[str, int, int, float]]:
    """(sharing, batch, context, part of the baseline's peak that is saved) of each program."""
    mine = [r for r in records if r["mode"] == mode and r.get("peak_bytes")]
    base = {(r["batch"], r["context"]): r["peak_bytes"] for r in mine if r["sharing"] == "q-k-v"}
    for r in mine:
        place = r["batch"], r["context"]
        if r["sharing"] != "q-k-v" and place in base:
            yield r["sharing"], *place, 1 - r["peak_bytes"] / base[place]


def plot(records: list[dict]):
    """What each sharing saves of the peak against batch and context; the article's range as a
    band."""
    figure, panels = drawing.new(8.6, 5.6, columns=2, rows=2)
    batch, context = records[0]["base_batch"], records[0]["base_context"]
    names = [s for s in SHARINGS[1:] if any(r["sharing"] == s for r in records)]
    for row, (mode, told) in enumerate(MODES.items()):
        for column, axis in enumerate(("batch", "context")):
            axes = panels[2 * row + column]
            for i, name in enumerate(names):
                line = sorted(
                    (b if axis == "batch" else c, 100 * part)
                    for sharing, b, c, part in savings(records, mode)
                    if sharing == name and (c == context if axis == "batch" else b == batch)
                )
                style = drawing.line_style(i)
                axes.plot(*zip(*line), marker=".", label=sharing_name(name), **style)
            if mode == "train":
                low, high = (100 * part for part in ARTICLE)
                axes.axhspan(low, high, color=drawing.FAINT, alpha=0.25, lw=0)
            axes.axhline(0, color=drawing.INK, linewidth=1)
            ticks = sorted({r[axis] for r in records})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
            axes.set_xlabel("sequences of a batch" if axis == "batch" else "tokens of a sequence")
            fixed = f"{context:,} tokens" if axis == "batch" else f"{batch:,} sequences"
            axes.set_title(f"{told}, {fixed}", fontsize=10)
        panels[2 * row].set_ylabel("peak saved, %")
    panels[0].legend(frameon=False, fontsize=8.5)
    return figure
