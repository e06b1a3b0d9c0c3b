"""What a trained language model's attention layers are and do: records of named measures.

A record is a dict with layer, head (None for the layer as a whole), what (the thing measured,
such as "W_q", "W_q W_k^T", "k activations"), metric and value; records of spectra also have
`values`, largest first. Letters: B sequences, T tokens, D model width, N query heads, K
key-value heads, H head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from qkvjax.analysis import columns, spectra
from qkvjax.attention.layer import Attention
from qkvjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Looked:
    """What one layer computes of a batch, float32 on the host.

    Attributes:
      states: block such as "kv" -> the projection's output [B, T, heads, H].
      scores: [B, N, T, T], everything that softmax sees, before the mask.
      weights: [B, N, T, T], attention.
    """

    states: dict[str, np.ndarray]
    scores: np.ndarray
    weights: np.ndarray


def blocks_of(sharing_blocks, wanted: list[str] | None) -> list[str]:
    """The projections to look at, "q" or "kv" as the sharing has them; None means all.

    Raises:
      UserError: one that this sharing does not have.
    """
    there = ["".join(block) for block in sharing_blocks]
    for name in wanted or ():
        if name not in there:
            raise UserError(
                f"there is no projection {name!r} in sharing"
                f" {'-'.join('='.join(block) for block in sharing_blocks)!r}: it has"
                f" {', '.join(there)}"
            )
    return [name for name in there if wanted is None or name in wanted]


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
    extra = layer.columns(q, k, positions)
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
    return block(x, positions), (states, scores, weights)


def look(model, ids) -> list[Looked]:
    """Runs whole sequences int [B, T] through the model and keeps what each layer computed."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    x, found = model.embed(jnp.asarray(ids), positions), []
    for block in model.stack.layers():
        x, (states, scores, weights) = _look(block, x, positions)
        found.append(Looked(*jax.device_get((states, scores, weights))))
    return found


def weight_records(layer: Attention, index: int, names: list[str]) -> Iterator[dict]:
    """Spectra and effective ranks of a layer's projections, whole and by head, and what two of
    them have in common.
    """
    spec = layer.spec
    weights = {name: np.asarray(layer.projections[name].weight[...], np.float64) for name in names}
    for name, weight in weights.items():
        yield from _spectrum(index, None, f"W_{name}", spectra.singular_values(weight))
        for head, part in enumerate(_heads(weight, spec.head_dim)):
            yield from _spectrum(index, head, f"W_{name}", spectra.singular_values(part))
    query, key = ("".join(spec.block(role)) for role in "qk")
    if query in weights and key in weights:
        keys = _heads(weights[key], spec.head_dim)
        for head, part in enumerate(_heads(weights[query], spec.head_dim)):
            shared = keys[head * len(keys) // spec.num_heads]
            values = spectra.product_singular_values(part, shared)
            yield from _spectrum(index, head, "W_q W_k^T", values)
    for a, b in _pairs(weights):
        if weights[a].shape == weights[b].shape:
            record = {"layer": index, "head": None, "what": f"W_{a}, W_{b}"}
            yield record | {"metric": "cosine", "value": spectra.cosine(weights[a], weights[b])}
        angles = spectra.principal_angles(weights[a], weights[b])
        yield {
            "layer": index, "head": None, "what": f"W_{a}, W_{b}",
            "metric": "mean_cosine_of_principal_angles", "value": float(np.cos(angles).mean()),
        }  # fmt: skip


def activation_records(seen: Looked, index: int, names: list[str]) -> Iterator[dict]:
    """Spectra of what the projections put out, their CKA, and how attention spreads."""
    flat = {name: seen.states[name].reshape(-1, np.prod(seen.states[name].shape[2:]))
            for name in names}  # fmt: skip
    for name, x in flat.items():
        centred = x - x.mean(0)
        yield from _spectrum(index, None, f"{name} activations", spectra.singular_values(centred))
    for a, b in _pairs(flat):
        yield {
            "layer": index, "head": None, "what": f"{a}, {b} activations",
            "metric": "linear_cka", "value": spectra.linear_cka(flat[a], flat[b]),
        }  # fmt: skip
    measures = {
        "score_asymmetry": spectra.asymmetry(seen.scores),
        "diagonal_mass": spectra.diagonal_mass(seen.weights),
        "entropy": spectra.entropy(seen.weights),
    }
    largest = np.where(seen.weights > 0, seen.scores, -np.inf).max((0, 2, 3))
    by_head = {name: value.mean(0) for name, value in measures.items()} | {"max_logit": largest}
    for metric, values in by_head.items():
        for head, value in enumerate(values):
            yield {"layer": index, "head": head, "what": "attention", "metric": metric,
                   "value": float(value)}  # fmt: skip


def analyze(model, ids, wanted: list[str] | None = None) -> tuple[list[dict], list[Looked]]:
    """Every record of a language model on a batch int [B, T], layer by layer.

    Args:
      wanted: projections to look at, such as ["q", "kv"]; None means all.

    Returns:
      The records, and what each layer computed.

    Raises:
      UserError: a projection that a layer does not have.
    """
    seen, records = look(model, ids), []
    for index, (block, found) in enumerate(zip(model.stack.layers(), seen, strict=True)):
        names = blocks_of(block.attention.spec.blocks, wanted)
        records += weight_records(block.attention, index, names)
        records += activation_records(found, index, names)
    return records, seen


def table(records: list[dict]) -> list[str]:
    """Lines of a table of one model: a row a layer, means over heads."""
    cells: dict[int, dict[str, list[float]]] = {}
    for record in records:
        metric, what = record["metric"], record["what"]
        name = {
            "effective_rank": f"rank {what}" if record["head"] is None else None,
            "linear_cka": f"CKA {what.removesuffix(' activations')}",
            "score_asymmetry": "asymmetry", "diagonal_mass": "to oneself", "entropy": "entropy",
            "max_logit": "max logit",
        }.get(metric)  # fmt: skip
        if name:
            row = cells.setdefault(record["layer"], {})
            row.setdefault(name.replace(" activations", "(x)"), []).append(record["value"])
    columns_ = list(dict.fromkeys(name for row in cells.values() for name in row))
    header = [("", "layer"), *(tuple(("", *name.split(" ", 1))[-2:]) for name in columns_)]
    rows = [
        [str(layer), *(f"{np.mean(row[n]):.3g}" if n in row else "–" for n in columns_)]
        for layer, row in cells.items()
    ]
    return columns.table(header, rows)


def _heads(weight: np.ndarray, head_dim: int) -> list[np.ndarray]:
    """[D, heads * H] -> a matrix [D, H] for each head."""
    return np.split(weight, weight.shape[1] // head_dim, axis=1)


def _pairs(named: dict) -> list[tuple[str, str]]:
    names = list(named)
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


def _spectrum(layer: int, head: int | None, what: str, values: np.ndarray) -> Iterator[dict]:
    """Three records of one matrix: its singular values and two ranks."""
    record = {"layer": layer, "head": head, "what": what}
    yield record | {
        "metric": "singular_values", "value": float(values[0]), "values": values.tolist()
    }  # fmt: skip
    yield record | {"metric": "effective_rank", "value": spectra.effective_rank(values)}
    yield record | {"metric": "stable_rank", "value": spectra.stable_rank(values)}
