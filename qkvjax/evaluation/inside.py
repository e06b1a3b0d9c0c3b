"""Measures of a trained model's attention layers, as records.

A record is a dict with layer, head (None for the layer as a whole), what (the thing measured,
such as "W_q", "W_q W_k^T", "k activations"), metric and value. Records of spectra also have
`values`, the singular values, largest first. Those of principal angles have the angles in `values`,
and the mean cosine as value.

Letters: B sequences, T tokens, D model width, N query heads, H head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qkvjax.attention.layer import Attention
from qkvjax.attention.spec import AttentionSpec
from qkvjax.data.dataset import whole_rows
from qkvjax.errors import UserError
from qkvjax.evaluation import spectra
from qkvjax.evaluation.activations import LayerActivations, embedded, layer_activations, run_block
from qkvjax.models.transformer import without_stack
from qkvjax.parallel import distributed

QUERY_KEY_PRODUCT = "W_q W_k^T"
MOST_SEQUENCES = 8  # that the evaluator runs: their scores take memory by the square of T


def analyze(
    model, inputs, wanted: list[str] | None = None
) -> tuple[list[dict], list[LayerActivations]]:
    """Returns every record of a model on a batch, layer by layer.

    Args:
      inputs: as `layer_activations` takes them.
      wanted: projections to measure, such as ["q", "kv"]; None means all.

    Returns:
      The records, and what each layer computed.

    Raises:
      UserError: a projection that no layer has.
    """
    names_of_layers = chosen_projections(model.spec.layers, wanted)
    activations = layer_activations(model, inputs)
    records = []
    layers = zip(model.stack.layers(), activations, names_of_layers, strict=True)
    for index, (block, computed, names) in enumerate(layers):
        records += _layer_records(block, computed, index, names)
    return records, activations


def score(model, dataset, *, batch_size: int, dtype=None, mesh=None) -> dict[str, float]:
    """Returns `means` of a model on a few validation sequences: the evaluator of kind "inside".

    The model runs in float32 on one device, whatever it trains in and on. One layer at a time is
    gathered there, so that the model may be larger than the device.
    """
    inputs = sequences(dataset, min(batch_size, MOST_SEQUENCES))
    names_of_layers = chosen_projections(model.spec.layers, None)
    records = []
    # A mesh is set for a thread. Another thread has none, so that its arrays are on one device.
    with ThreadPoolExecutor(1) as one_device:

        def run(function, *arguments):
            return one_device.submit(function, *arguments).result()

        x, positions = run(embedded, distributed.fetch(without_stack(model)), inputs)
        for index, names in enumerate(names_of_layers):
            block = distributed.fetch(model.stack.layer(index))
            x, computed = run(run_block, block, x, positions)
            records += _layer_records(block, computed, index, names)
    return means(records)


def spectra_of(model) -> dict[str, list[float]]:
    """Returns the mean spectrum of each projection, for the report of a study.

    Singular values over the largest, mean over the layers that have the projection:
    "q" -> [min(D, N H)]. A projection whose width differs between layers is left out.
    """
    spectra_of_layers: dict[str, list[np.ndarray]] = {}
    for block in model.stack.layers():
        for name, projection in block.attention.projections.items():
            values = spectra.singular_values(projection.weight[...])
            spectra_of_layers.setdefault(name, []).append(values / values[0])
    return {
        name: np.mean(rows, 0).round(5).tolist()
        for name, rows in spectra_of_layers.items()
        if len({len(row) for row in rows}) == 1
    }


# ---- what is measured -------------------------------------------------------------------------


def chosen_projections(
    layers: Sequence[AttentionSpec], wanted: list[str] | None
) -> list[list[str]]:
    """Returns the projections of each layer to measure, named as its sharing has them: "q", "kv".

    Args:
      wanted: names; without any, all.

    Raises:
      UserError: a name that no layer has.
    """
    names_of_layers = [["".join(block) for block in layer.blocks] for layer in layers]
    known = dict.fromkeys(name for names in names_of_layers for name in names)
    for name in wanted or ():
        if name not in known:
            sharings = " and ".join(dict.fromkeys(repr(layer.sharing) for layer in layers))
            raise UserError(
                f"there is no projection {name!r} in sharing {sharings}: use one of"
                f" {', '.join(known)}"
            )
    if not wanted:
        return names_of_layers
    return [[name for name in names if name in wanted] for names in names_of_layers]


def sequences(dataset, count: int) -> np.ndarray:
    """Returns up to `count` whole validation sequences as a model reads them.

    Returns:
      int [count, T] for text; for labelled examples, their inputs.

    Raises:
      UserError: no validation document is as long as a sequence.
    """
    if dataset.tokenizer is not None:
        return whole_rows(dataset, count)
    count = min(count, len(dataset.validation))
    return next(dataset.scored_batches(count))["inputs"]


# ---- records ----------------------------------------------------------------------------------


def _layer_records(block, computed: LayerActivations, index: int, names: list[str]) -> list[dict]:
    weights = weight_records(block.attention, index, names)
    return [*weights, *activation_records(computed, index, names)]


def weight_records(layer: Attention, index: int, names: list[str]) -> Iterator[dict]:
    """Yields records of a layer's projections.

    Spectra and effective ranks of each projection and of W_q W_k^T, whole and by head. For each
    pair of projections the cosine of the weights, and by head the angles between their column
    spaces. (All heads together span every direction. For two random heads the mean squared cosine
    is H / D.)

    Args:
      index: of the layer.
      names: projections to measure.
    """
    head_dim = layer.spec.head_dim
    weights = {name: np.asarray(layer.projections[name].weight[...], np.float64) for name in names}
    for name, weight in weights.items():
        yield from _spectrum(index, None, f"W_{name}", spectra.singular_values(weight))
        for head, part in enumerate(_heads(weight, head_dim)):
            yield from _spectrum(index, head, f"W_{name}", spectra.singular_values(part))
    query, key = ("".join(layer.spec.block(role)) for role in "qk")
    if query in weights and key in weights:
        yield from _product_spectra(index, weights[query], weights[key], head_dim)
    for a, b in _pairs(weights):
        what = f"W_{a}, W_{b}"
        if weights[a].shape == weights[b].shape:
            value = spectra.cosine(weights[a], weights[b])
            yield _record(index, None, what, "cosine", value)
        for head, parts in enumerate(_pairs_of_heads(weights[a], weights[b], head_dim)):
            angles = spectra.principal_angles(*parts)
            record = _record(index, head, what, "principal_angles", np.cos(angles).mean())
            yield record | {"values": angles.tolist()}


def _product_spectra(index: int, query, key, head_dim: int) -> Iterator[dict]:
    """Yields the records of W_q W_k^T, by head and for all heads together."""
    pairs = list(_pairs_of_heads(query, key, head_dim))
    for head, (query_part, key_part) in enumerate(pairs):
        values = spectra.product_singular_values(query_part, key_part)
        yield from _spectrum(index, head, QUERY_KEY_PRODUCT, values)
    # Grouped keys are repeated, so that both have the same columns.
    whole = (np.concatenate(parts, axis=1) for parts in zip(*pairs))
    values = spectra.product_singular_values(*whole)
    yield from _spectrum(index, None, QUERY_KEY_PRODUCT, values)


def activation_records(computed: LayerActivations, index: int, names: list[str]) -> Iterator[dict]:
    """Yields spectra of the projections' outputs, their CKA, and measures of attention by head.

    Args:
      index: of the layer.
      names: projections to measure.
    """
    outputs = {}  # name -> [B T, heads H]
    for name in names:
        state = computed.states[name]
        outputs[name] = state.reshape(-1, np.prod(state.shape[2:]))
    for name, x in outputs.items():
        centred = x - x.mean(0)
        heads = np.split(centred, computed.states[name].shape[2], axis=1)
        for head, part in (None, centred), *enumerate(heads):
            values = spectra.singular_values(part)
            yield from _spectrum(index, head, f"{name} activations", values)
    for a, b in _pairs(outputs):
        value = spectra.linear_cka(outputs[a], outputs[b])
        yield _record(index, None, f"{a}, {b} activations", "linear_cka", value)
    visible_scores = np.where(computed.weights > 0, computed.scores, -np.inf)
    values_by_metric = {
        "score_asymmetry": spectra.asymmetry(computed.scores).mean(0),
        "diagonal_mass": spectra.diagonal_mass(computed.weights).mean(0),
        "entropy": spectra.entropy(computed.weights).mean(0),
        "max_logit": visible_scores.max((0, 2, 3)),
    }
    for metric, values in values_by_metric.items():
        for head, value in enumerate(values):
            yield _record(index, head, "attention", metric, value)


def _record(layer: int, head: int | None, what: str, metric: str, value) -> dict:
    return {"layer": layer, "head": head, "what": what, "metric": metric, "value": float(value)}


def _spectrum(layer: int, head: int | None, what: str, values: np.ndarray) -> Iterator[dict]:
    """Yields three records of one matrix: its singular values and two ranks."""
    record = _record(layer, head, what, "singular_values", values[0])
    yield record | {"values": values.tolist()}
    yield _record(layer, head, what, "effective_rank", spectra.effective_rank(values))
    yield _record(layer, head, what, "stable_rank", spectra.stable_rank(values))


def _heads(weight: np.ndarray, head_dim: int) -> list[np.ndarray]:
    """Returns the part [D, H] of each head of a weight [D, heads H]."""
    return np.split(weight, weight.shape[1] // head_dim, axis=1)


def _pairs_of_heads(a: np.ndarray, b: np.ndarray, head_dim: int) -> Iterator[tuple]:
    """Yields the parts [D, H] of two weights head by head.

    Where one has fewer heads, each of its heads meets all heads of its group.
    """
    heads_of_a = _heads(a, head_dim)
    heads_of_b = _heads(b, head_dim)
    count = max(len(heads_of_a), len(heads_of_b))
    for head in range(count):
        part_of_a = heads_of_a[head * len(heads_of_a) // count]
        part_of_b = heads_of_b[head * len(heads_of_b) // count]
        yield part_of_a, part_of_b


def _pairs(named: dict) -> list[tuple[str, str]]:
    """Returns each pair of names once, in order."""
    return list(itertools.combinations(named, 2))


# ---- means ------------------------------------------------------------------------------------


def means(records: list[dict]) -> dict[str, float]:
    """Returns one number for each measure: the mean over layers and heads, of logits the largest.

    rank_q, ... are effective ranks of the projections, rank_q_activations, ... those of their
    outputs, rank_scores those of W_q W_k^T by head. cka_k_v, cosine_k_v and angles_k_v (cosines of
    the principal angles by head) compare two projections.
    """
    values_by_name: dict[str, list[float]] = {}
    for record in records:
        name = _name_of_mean(record)
        if name is not None:
            values_by_name.setdefault(name, []).append(record["value"])
    results = {}
    for name, values in values_by_name.items():
        results[name] = float(max(values) if name == "max_logit" else np.mean(values))
    return results


def _name_of_mean(record: dict) -> str | None:
    """Returns the name of the mean that a record is part of; None for no mean."""
    metric = record["metric"]
    what = record["what"]
    if what == "attention":
        return metric
    # "W_q" -> q, "q activations" -> q_activations, "W_k, W_v" and "k, v activations" -> k_v
    names = "_".join(part.strip(",").removeprefix("W_") for part in what.split()[:2])
    if metric == "effective_rank":
        is_product = what == QUERY_KEY_PRODUCT
        is_whole = record["head"] is None
        if is_product:
            return None if is_whole else "rank_scores"
        return f"rank_{names}" if is_whole else None
    prefixes = {"principal_angles": "angles", "cosine": "cosine", "linear_cka": "cka"}
    if metric in prefixes:
        return f"{prefixes[metric]}_{names}"
    return None
