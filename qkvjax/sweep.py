"""Builds the grid of a study: a tuple of points, each a dict of field names and values.

    product(axis("model.sharing", SHARINGS), axis("model.num_kv_heads", (4, 1)))
    zipped(axis("model.d_model", (128, 256)), axis("model.num_layers", (2, 4)))

The first point of a study is its baseline. The key "label" of a point replaces its usual name.

Controls answer what a byte of cache, a parameter or a multiply-add is worth. Two functions make
them from the points that they control:

    tied = axis("model.sharing", ("q-k=v",))
    points = chain(axis("model.sharing", ("q-k-v",)), tied, equal_cache(tied, num_heads=4))
    points = chain(points, equal_params(points[1:], config.model, baseline=points[0]))

`equal_cache` makes points with untied K and V and the same cache size as the tied ones, above
"GQA-2" for "Q-K=V". `equal_params` widens the feed-forward until the parameters that a tie saves
are spent again: "Q-K=V wider" and "GQA-2 wider". `tuned` compares each point at its own best value
of a field: `config.study.tuned = tuned("optimizer.learning_rate", (1e-3, 2e-3, 4e-3), seeds=3)`.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping

from qkvjax.attention.spec import canonical_sharing, parse_sharing, sharing_name
from qkvjax.errors import UserError, among
from qkvjax.fields import Model
from qkvjax.models.spec import ModelSpec, model_spec

Grid = tuple[dict, ...]

MATCHES = ("parameters", "flops")
BYTES = 257  # number of ids of the byte tokenizer
D_FF_MULTIPLE = 8  # feed-forward widths are multiples of it
MOST_D_FF = 2**24


def axis(field: str, values: Iterable) -> Grid:
    """Returns one point for each value of a field such as "model.sharing"."""
    return tuple({field: value} for value in values)


def product(*grids: Grid) -> Grid:
    """Returns every combination of the grids' points; the last grid varies fastest.

    Raises:
      UserError: a field is in two grids.
    """
    return tuple(_merge(points) for points in itertools.product(*grids))


def zipped(*grids: Grid) -> Grid:
    """Returns the first points merged, the second points merged, and so on.

    Raises:
      UserError: the grids have different lengths, or a field is in two of them.
    """
    sizes = [len(grid) for grid in grids]
    if len(set(sizes)) > 1:
        raise UserError(f"zipped grids have {sizes} points: make them equally long")
    return tuple(_merge(points) for points in zip(*grids))


def chain(*grids: Grid) -> Grid:
    """Returns one grid after another."""
    return tuple(itertools.chain(*grids))


def paper_variants(channels: int) -> Grid:
    """Returns the six variants of the paper's encoders (Kayyam et al. 2026, table 1).

    Four sharings, and the two that tie queries to keys again with "+", the score modifier
    score2d(channels).
    """
    score = (f"score2d({channels})",)
    plus = tuple(
        {"model.sharing": sharing, "model.score": score, "label": f"({sharing_name(sharing)})+"}
        for sharing in ("q=k-v", "q=k=v")
    )
    return axis("model.sharing", ("q-k-v", "q=k-v", "q-k=v", "q=k=v")) + plus


def equal_cache(points: Grid, *, num_heads: int) -> Grid:
    """Returns points with untied K and V and the cache size of the given tied points.

    A tie of K and V caches one tensor instead of two. Its control caches two tensors of half as
    many key-value heads: "GQA-2" for {"model.sharing": "q-k=v"} with 4 heads, "MQA" for the same
    with 2 key-value heads. Other fields of a point stay, except model.rotary_values, which exists
    only with K=V. A control that several points share is returned once.

    Args:
      points: points whose K and V share a projection.
      num_heads: query heads of the model; a point with a model.num_heads has its own.

    Raises:
      UserError: K and V of a point are not tied, or its key-value heads cannot be halved.
    """
    controls = [_equal_cache(point, num_heads) for point in points]
    return tuple(control for i, control in enumerate(controls) if control not in controls[:i])


def _equal_cache(point: dict, num_heads: int) -> dict:
    """Returns the control of one point."""
    name = label(point)
    sharing = canonical_sharing(point.get("model.sharing", "q-k-v"))
    if not any({"k", "v"} <= set(block) for block in parse_sharing(sharing)):
        raise UserError(
            f"equal_cache: K and V of the point {name!r} are not tied, so it saves no cache: pass"
            " points with model.sharing 'q-k=v' or 'q=k=v'"
        )
    query_heads = point.get("model.num_heads", num_heads)
    heads = point.get("model.num_kv_heads") or query_heads
    half, rest = divmod(heads, 2)
    if rest or half < 1:
        raise UserError(
            f"equal_cache: the point {name!r} has {heads} key-value heads of {query_heads} heads,"
            " which cannot be halved, so no model with untied K and V has the same cache size:"
            " leave the point out"
        )
    replaced = ("label", "model.sharing", "model.num_kv_heads", "model.rotary_values")
    others = {field: value for field, value in point.items() if field not in replaced}
    words = ["MQA" if half == 1 else f"GQA-{half}"]
    if others:
        words.append(label(others))
    return {"label": " ".join(words), **others, "model.num_kv_heads": half}


def equal_params(
    points: Grid,
    model: Mapping,
    match: str = "parameters",
    *,
    baseline: dict | None = None,
    seq_len: int | None = None,
    num_ids: int = BYTES,
) -> Grid:
    """Returns the points with a feed-forward width that makes them as large as the baseline.

    The width is a multiple of 8, set by model.mlp_ratio; the remaining difference is at most the
    cost of 4 columns of each feed-forward. Labels get " wider" or " narrower". A point stays as it
    is if no other width comes nearer to the baseline.

    Args:
      points: the grid.
      model: the group `model` of the config that the points change.
      match: what to make equal: "parameters", or "flops", the multiply-adds per token of a forward
        pass over a sequence of `seq_len` tokens.
      baseline: the point to match; None means the first of `points`.
      seq_len: `config.data.seq_len`, required for "flops".
      num_ids: number of ids of the tokenizer; it matters if points change the model width.

    Raises:
      UserError: `match` is unknown, "flops" comes without `seq_len`, or a point is larger than the
        baseline even with the narrowest feed-forward.
    """
    if match not in MATCHES:
        raise UserError(f"equal_params: match={match!r} is not one of {among(match, MATCHES)}")
    if match == "flops" and seq_len is None:
        raise UserError(
            "equal_params: the multiply-adds per token depend on the sequence length: set"
            " seq_len=config.data.seq_len"
        )
    length = seq_len or dict(model).get("max_length") or 1

    def spec_of(point: dict) -> ModelSpec:
        return model_spec(_model_of(point, model), num_ids, length)

    def cost(point: dict) -> int:
        spec = spec_of(point)
        return spec.num_params if match == "parameters" else spec.forward_macs(length)

    if not points:
        return ()
    target = cost(points[0] if baseline is None else baseline)
    return tuple(_widened(point, spec_of(point), cost, target) for point in points)


def _model_of(point: dict, model: Mapping) -> Model:
    """Returns the group `model` of a point's config."""
    fields = {
        name.removeprefix("model."): value
        for name, value in point.items()
        if name.startswith("model.")
    }
    return Model(**{**model, **fields})


def _widened(point: dict, spec: ModelSpec, cost: Callable[[dict], int], target: int) -> dict:
    """Returns a point with the feed-forward width that brings its cost nearest to the target."""

    def with_width(count: int) -> dict:
        return point | {"model.mlp_ratio": D_FF_MULTIPLE * count / spec.d_model}

    counts = range(1, MOST_D_FF // D_FF_MULTIPLE)
    first = bisect.bisect_left(counts, target, key=lambda count: cost(with_width(count)))
    if first == 0 and cost(with_width(1)) > target:
        raise UserError(
            f"equal_params: even with the narrowest feed-forward the point {label(point)!r} is"
            " larger than the baseline: leave the point out, or choose a larger baseline"
        )
    near = [with_width(count) for count in (first, first + 1) if count >= 1]
    nearest = min(near, key=lambda other: abs(cost(other) - target))
    now = cost(point)
    if abs(now - target) <= abs(cost(nearest) - target):
        return point
    word = "wider" if cost(nearest) > now else "narrower"
    return nearest | {"label": f"{label(point)} {word}"}


def tuned(field: str, values: Iterable, seeds: int | Iterable[int]) -> dict:
    """Returns the value of `config.study.tuned`: each point is compared at its own best value.

    The study first trains every point with every value, on tuning seeds. Then it trains every point
    with the value of the best mean score, on the seeds that are compared (see
    `qkvjax.studies.tuning`).

    Args:
      field: such as "optimizer.learning_rate"; no point may set it.
      values: numbers or texts to try.
      seeds: number of tuning seeds, which then start at `config.seed` + 100; or a list of seeds,
        none of which may be compared.
    """
    return {
        "field": field,
        "values": tuple(values),
        "seeds": seeds if isinstance(seeds, int) else tuple(seeds),
    }


def tuned_label(name: str, field: str, value: object) -> str:
    """Returns the name of a point with a value of a tuned field: "Q-K=V learning_rate=0.002"."""
    return f"{name} {last_part(field)}={value}"


def last_part(field: str) -> str:
    """Returns "learning_rate" for "optimizer.learning_rate"."""
    return field.rpartition(".")[2]


def by_setting(values: Mapping[str, object]) -> dict:
    """Returns a value for a point's field that differs from setting to setting.

    For example half of the heads of each model size:

        {"label": "GQA half", "model.num_kv_heads": by_setting({"small": 1, "large": 4})}
    """
    return {"by_setting": dict(values)}


def overrides_of(point: dict) -> dict:
    """Returns a point as study.json has it.

    "overrides" has the fields with one value. "by_setting", if there are any, has those whose
    value differs from setting to setting.
    """
    fields = {field: value for field, value in point.items() if field != "label"}
    differing = {field: value["by_setting"] for field, value in fields.items() if _differs(value)}
    same = {field: value for field, value in fields.items() if field not in differing}
    return {"overrides": same} | ({"by_setting": differing} if differing else {})


def in_setting(point: dict, setting: str) -> dict:
    """Returns a point with the values that it has in one setting.

    Raises:
      UserError: a field has no value for this setting.
    """
    return {field: _value_in(field, value, setting) for field, value in point.items()}


def _value_in(field: str, value: object, setting: str) -> object:
    if not _differs(value):
        return value
    values = value["by_setting"]
    if setting not in values:
        raise UserError(
            f"{field} has no value for the setting {setting!r}: it has one for"
            f" {among(setting, values)}"
        )
    return values[setting]


def _differs(value: object) -> bool:
    """Returns whether a field's value was made by `by_setting`."""
    return isinstance(value, dict) and value.keys() == {"by_setting"}


def _merge(points: Iterable[dict]) -> dict:
    """Returns one point with the fields of all."""
    merged: dict = {}
    for point in points:
        twice = merged.keys() & point.keys()
        if twice:
            raise UserError(
                f"{sorted(twice)[0]} is on two axes of the grid: remove it from one of them"
            )
        merged |= point
    return merged


def label(point: dict) -> str:
    """Returns the name of a point in tables, such as "Q-K=V num_kv_heads=2"."""
    if "label" in point:
        return point["label"]
    parts = [
        sharing_name(value) if field == "model.sharing" else f"{last_part(field)}={value}"
        for field, value in point.items()
    ]
    return " ".join(parts) or "base"


def slug(text: str) -> str:
    """Returns a label as the name of a folder."""
    return re.sub(r"[^a-z0-9._=-]+", "-", text.lower()).strip("-.=") or "run"


def identity_hash(identity: dict) -> str:
    """Returns 12 hex digits that stand for the fields that fix a run."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
