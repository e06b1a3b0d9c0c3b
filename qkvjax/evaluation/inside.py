"""What a trained model's attention layers are and do: records of named measures.

A record is a dict with layer, head (None for the layer as a whole), what (the thing measured,
such as "W_q", "W_q W_k^T", "k activations"), metric and value; records of spectra also have
`values`, largest first, those of principal angles (whose value is the mean cosine) the angles.
Letters: B sequences, T tokens, D model width, N query heads, K key-value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.attention.layer import Attention
from qkvjax.attention.spec import AttentionSpec
from qkvjax.data.dataset import whole_rows
from qkvjax.errors import UserError
from qkvjax.evaluation import spectra
from qkvjax.models.transformer import without_stack
from qkvjax.parallel import distributed


class Looked(NamedTuple):
    """What one layer computes of a batch, float32 on the host.

    Attributes:
      states: block such as "kv" -> the projection's output [B, T, heads, H].
      scores: [B, N, T, T], everything that softmax sees, before the mask.
      weights: [B, N, T, T], attention.
    """

    states: dict[str, np.ndarray]
    scores: np.ndarray
    weights: np.ndarray


def chosen(layers: Sequence[AttentionSpec], wanted: list[str] | None) -> list[list[str]]:
    """The projections of each layer to look at, "q" or "kv" as its sharing has them.

    Args:
      wanted: names; without any, all.

    Raises:
      UserError: one that no layer has.
    """
    there = [["".join(block) for block in layer.blocks] for layer in layers]
    known = dict.fromkeys(name for names in there for name in names)
    for name in wanted or ():
        if name not in known:
            sharings = " and ".join(dict.fromkeys(repr(layer.sharing) for layer in layers))
            raise UserError(
                f"there is no projection {name!r} in sharing {sharings}: it has {', '.join(known)}"
            )
    return [[name for name in names if not wanted or name in wanted] for names in there]


@jax.jit
def _look(block, x, positions):
    """The next x, and (states, scores, weights) of a block's attention."""
    layer = block.attention
    y = block.attention_norm(x)
    heads = {"".join(b): layer.spec.num_role_heads(b[0]) for b in layer.spec.blocks}
    states = {
        name: project(y).reshape(*x.shape[:2], heads[name], -1)
        for name, project in layer.projections.items()
    }
    q, entry = layer.project(y, positions)
    k, _ = layer.expand(entry, positions)
    extra = layer.columns(q, positions)
    if extra:
        q, k = jnp.concatenate([q, extra["q_pe"]], -1), jnp.concatenate([k, extra["k_pe"]], -1)
    groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgts", groups, k) / layer.spec.head_dim**0.5
    scores = scores.reshape(scores.shape[0], -1, *scores.shape[3:])
    places = jnp.arange(x.shape[1])
    distance = places[:, None] - places[None]
    mask = distance >= 0 if layer.spec.causal else jnp.ones_like(distance, bool)
    if layer.spec.window is not None:
        mask &= abs(distance) < layer.spec.window
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return block(x, positions)[0], (states, scores, weights)


def look(model, inputs) -> list[Looked]:
    """Runs whole sequences, int [B, T] or as the model reads them, and keeps what each layer
    computed.
    """
    x, positions = _embedded(model, inputs)
    seen = []
    for block in model.stack.layers():
        x, computed = _look(block, x, positions)
        seen.append(Looked(*jax.device_get(computed)))
    return seen


def _embedded(model, inputs) -> tuple[jax.Array, jax.Array]:
    """(what the first block reads, positions int [B, T]) of whole sequences."""
    length = inputs.shape[1] + (model.spec.kind == "vit")
    positions = jnp.broadcast_to(jnp.arange(length), (len(inputs), length))
    return model.embed(jnp.asarray(inputs), positions), positions


def weight_records(layer: Attention, index: int, names: list[str]) -> Iterator[dict]:
    """Spectra and effective ranks of a layer's projections, whole and by head, and what two of
    them have in common: their cosine, and by head the angles between what their columns span (all
    heads together span every direction; mean squared cosine of two random heads: H / D).
    """
    spec = layer.spec
    weights = {name: np.asarray(layer.projections[name].weight[...], np.float64) for name in names}
    for name, weight in weights.items():
        yield from _spectrum(index, None, f"W_{name}", spectra.singular_values(weight))
        for head, part in enumerate(_heads(weight, spec.head_dim)):
            yield from _spectrum(index, head, f"W_{name}", spectra.singular_values(part))
    query, key = ("".join(spec.block(role)) for role in "qk")
    if query in weights and key in weights:
        both = list(_beside(weights[query], weights[key], spec.head_dim))
        for head, parts in enumerate(both):
            values = spectra.product_singular_values(*parts)
            yield from _spectrum(index, head, "W_q W_k^T", values)
        whole = (np.concatenate(parts, axis=1) for parts in zip(*both))
        values = spectra.product_singular_values(*whole)
        yield from _spectrum(index, None, "W_q W_k^T", values)
    for a, b in _pairs(weights):
        if weights[a].shape == weights[b].shape:
            record = {"layer": index, "head": None, "what": f"W_{a}, W_{b}"}
            yield record | {"metric": "cosine", "value": spectra.cosine(weights[a], weights[b])}
        for head, parts in enumerate(_beside(weights[a], weights[b], spec.head_dim)):
            angles = spectra.principal_angles(*parts)
            yield {
                "layer": index,
                "head": head,
                "what": f"W_{a}, W_{b}",
                "metric": "principal_angles",
                "value": float(np.cos(angles).mean()),
                "values": angles.tolist(),
            }


def activation_records(seen: Looked, index: int, names: list[str]) -> Iterator[dict]:
    """Spectra of what the projections put out, their CKA, and how attention spreads."""
    flat = {
        name: seen.states[name].reshape(-1, np.prod(seen.states[name].shape[2:])) for name in names
    }
    for name, x in flat.items():
        centred = x - x.mean(0)
        heads = np.split(centred, seen.states[name].shape[2], axis=1)
        for head, part in (None, centred), *enumerate(heads):
            values = spectra.singular_values(part)
            yield from _spectrum(index, head, f"{name} activations", values)
    for a, b in _pairs(flat):
        yield {
            "layer": index,
            "head": None,
            "what": f"{a}, {b} activations",
            "metric": "linear_cka",
            "value": spectra.linear_cka(flat[a], flat[b]),
        }
    measures = {
        "score_asymmetry": spectra.asymmetry(seen.scores),
        "diagonal_mass": spectra.diagonal_mass(seen.weights),
        "entropy": spectra.entropy(seen.weights),
    }
    largest = np.where(seen.weights > 0, seen.scores, -np.inf).max((0, 2, 3))
    by_head = {name: value.mean(0) for name, value in measures.items()} | {"max_logit": largest}
    for metric, values in by_head.items():
        for head, value in enumerate(values):
            yield {
                "layer": index,
                "head": head,
                "what": "attention",
                "metric": metric,
                "value": float(value),
            }


def analyze(model, inputs, wanted: list[str] | None = None) -> tuple[list[dict], list[Looked]]:
    """Every record of a model on a batch as `look` takes it, layer by layer.

    Args:
      wanted: projections to look at, such as ["q", "kv"]; None means all.

    Returns:
      The records, and what each layer computed.

    Raises:
      UserError: a projection that no layer has.
    """
    names_of, records = chosen(model.spec.layers, wanted), []
    seen = look(model, inputs)
    layers = zip(model.stack.layers(), seen, names_of, strict=True)
    for index, (block, computed, names) in enumerate(layers):
        records += _layer_records(block, computed, index, names)
    return records, seen


def _layer_records(block, computed: Looked, index: int, names: list[str]) -> list[dict]:
    weights = weight_records(block.attention, index, names)
    return [*weights, *activation_records(computed, index, names)]


def sequences(dataset, count: int) -> np.ndarray:
    """Up to `count` whole validation sequences as a model reads them: int [count, T], or what
    labelled examples have.

    Raises:
      UserError: no validation document is as long as a sequence.
    """
    if dataset.tokenizer is not None:
        return whole_rows(dataset, count)
    count = min(count, len(dataset.validation))
    return next(dataset.scored_batches(count))["inputs"]


def means(records: list[dict]) -> dict[str, float]:
    """One number for each measure: means over layers and heads, of logits the largest.

    rank_q, ... are effective ranks of the projections, rank_q_activations, ... of what they put
    out, rank_scores those of W_q W_k^T by head; cka_k_v, cosine_k_v and angles_k_v (cosines of
    the principal angles by head) compare two of them.
    """
    found: dict[str, list[float]] = {}
    for record in records:
        metric, what = record["metric"], record["what"]
        names = "_".join(part.removeprefix("W_") for part in what.split()[:2]).replace(",", "")
        whole = record["head"] is None
        name = {
            ("effective_rank", True): None if what == "W_q W_k^T" else f"rank_{names}",
            ("effective_rank", False): "rank_scores" if what == "W_q W_k^T" else None,
            ("principal_angles", False): f"angles_{names}",
            ("cosine", True): f"cosine_{names}",
            ("linear_cka", True): f"cka_{names}",
        }.get((metric, whole), metric if what == "attention" else None)
        if name:
            found.setdefault(name, []).append(record["value"])
    return {name: float((max if name == "max_logit" else np.mean)(v)) for name, v in found.items()}


def score(model, dataset, *, batch_size: int, dtype=None, mesh=None) -> dict[str, float]:
    """Returns `means` of a model on a few validation sequences: the evaluator of kind "inside".

    The model is looked at in float32 on one device, whatever it trains in and on. One layer at a
    time is gathered there, so that a model larger than a device can be looked at.
    """
    inputs = sequences(dataset, min(batch_size, 8))
    names_of = chosen(model.spec.layers, None)
    records = []
    # The mesh in force belongs to the thread that set it: the other thread has one device.
    with ThreadPoolExecutor(1) as one_device:

        def run(function, *arguments):
            return one_device.submit(function, *arguments).result()

        x, positions = run(_embedded, distributed.fetch(without_stack(model)), inputs)
        for index, names in enumerate(names_of):
            block = distributed.fetch(model.stack.layer(index))
            x, computed = run(_look, block, x, positions)
            records += _layer_records(block, Looked(*jax.device_get(computed)), index, names)
    return means(records)


def spectra_of(model) -> dict[str, list[float]]:
    """Singular values over the largest of each projection, mean over the layers that have it:
    "q" -> [min(D, N H)], for the report of a study.
    """
    found: dict[str, list[np.ndarray]] = {}
    for block in model.stack.layers():
        for name, projection in block.attention.projections.items():
            values = spectra.singular_values(projection.weight[...])
            found.setdefault(name, []).append(values / values[0])
    alike = {name: rows for name, rows in found.items() if len({len(row) for row in rows}) == 1}
    return {name: np.mean(rows, 0).round(5).tolist() for name, rows in alike.items()}


def _heads(weight: np.ndarray, head_dim: int) -> list[np.ndarray]:
    """[D, heads * H] -> a matrix [D, H] for each head."""
    return np.split(weight, weight.shape[1] // head_dim, axis=1)


def _beside(a: np.ndarray, b: np.ndarray, head_dim: int) -> Iterator[tuple]:
    """Head by head the parts of two weights; a key-value head stands beside each of its group."""
    heads = _heads(a, head_dim), _heads(b, head_dim)
    count = max(map(len, heads))
    for head in range(count):
        yield tuple(parts[head * len(parts) // count] for parts in heads)


def _pairs(named: dict) -> list[tuple[str, str]]:
    names = list(named)
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


def _spectrum(layer: int, head: int | None, what: str, values: np.ndarray) -> Iterator[dict]:
    """Three records of one matrix: its singular values and two ranks."""
    record = {"layer": layer, "head": head, "what": what}
    yield record | {
        "metric": "singular_values",
        "value": float(values[0]),
        "values": values.tolist(),
    }
    yield record | {"metric": "effective_rank", "value": spectra.effective_rank(values)}
    yield record | {"metric": "stable_rank", "value": spectra.stable_rank(values)}
