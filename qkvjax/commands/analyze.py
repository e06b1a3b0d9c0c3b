"""Look inside a trained model: spectra of its projections, what they share, how it attends.

  qkvjax analyze --workdir=runs/qkv
  qkvjax analyze --workdir=runs/qkv --workdir=runs/tied --data=text:my_book.txt
  qkvjax analyze --workdir=runs/tied --projections=q,kv --step=500

For each layer and head: singular values, effective and stable rank of the projections, of
W_q W_k^T and of what the projections put out; for each pair of projections the cosine of the
weights, the angles between their heads' spaces and the CKA of what they put out; asymmetry of the
scores, attention to oneself, entropy and largest logit. qkvjax/evaluation/spectra.py defines each
with its equation. WORKDIR gets analysis.jsonl (a line a measure) and analysis/ with plots: spectra,
heads, attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from qkvjax.commands import cli
from qkvjax.errors import UserError

FLAGS = {
    "workdir": (tuple, [], "a trained run; repeat it for several"),
    "projections": (list, None, "which, as the sharings have them: q,kv; all if unset"),
    "data": (str, None, "another corpus, as data.source names it"),
    "step": (int, None, "which checkpoint; the newest if unset"),
    "num_sequences": (int, 8, "sequences that activations come from", 1),
}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(argv, __doc__, FLAGS, body)


def body(values: flags.FlagValues) -> None:
    if not values.workdir:
        raise UserError("--workdir=DIR is missing: which run should be analyzed?")
    for workdir in values.workdir:
        print("\n".join(look_into(Path(workdir), values)))


def look_into(workdir: Path, values: flags.FlagValues) -> list[str]:
    """Writes analysis.jsonl and the plots of one run; returns a table to print."""
    from qkvjax.attention.spec import sharing_name
    from qkvjax.data.open import check_fits, open_dataset
    from qkvjax.evaluation import inside
    from qkvjax.files import write_lines
    from qkvjax.parallel import placed
    from qkvjax.parallel.mesh import for_scoring
    from qkvjax.report import inside_plots
    from qkvjax.training.identity import check_data
    from qkvjax.training.restore import load_model

    model, _, config, step = load_model(workdir, values.step, mesh=for_scoring)
    inside.chosen_projections(model.spec.layers, values.projections)  # before the data are read
    dataset = open_dataset(config, values.data, whole=values.data is not None, log=print)
    check_fits(dataset, model.spec)
    if values.data is None:
        check_data(workdir, config.data.source, dataset.digest)
    inputs = inside.sequences(dataset, values.num_sequences)
    with placed.on_mesh_of(model):
        records, seen = inside.analyze(model, inputs, values.projections)
    num_tokens = len(inputs) * config.data.seq_len
    facts = {"step": step, "data_digest": dataset.digest, "num_tokens": num_tokens}
    write_lines(workdir / "analysis.jsonl", [facts | record for record in records])
    places = inside_plots.write(records, seen, workdir / "analysis")
    head = f"{workdir}, step {step}: {sharing_name(config.model.sharing)}, {num_tokens:,} tokens"
    return [head, "", *inside_plots.table(records), "", f"plots: {', '.join(map(str, places))}"]
