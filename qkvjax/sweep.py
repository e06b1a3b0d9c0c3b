"""Combinators for the grid of a study. A grid is a tuple of points, a point a dict of fields.

    product(axis("model.sharing", SHARINGS), axis("model.num_kv_heads", (4, 1)))
    zipped(axis("model.d_model", (128, 256)), axis("model.num_layers", (2, 4)))

The first point of a study is its baseline. A point may carry a "label" of its own.

What a byte of cache, a parameter or a multiply-add is worth is asked with controls. They are made
from the points that they control, a grid in and a grid out:

    tied = axis("model.sharing", ("q-k=v",))
    points = chain(axis("model.sharing", ("q-k-v",)), tied, equal_cache(tied, num_heads=4))
    points = chain(points, equal_params(points[1:], config.model, baseline=points[0]))

`equal_cache` gives the points with untied K and V whose cache is as large: QKV, Q-K=V and GQA-2
above. `equal_params` gives the same points with a wider feed-forward, which spends what a tie
saves: "Q-K=V wider" and "GQA-2 wider". `tuned` compares each point at its own best value of a
field: `config.study.tuned = tuned("optimizer.learning_rate", (1e-3, 2e-3, 4e-3), seeds=3)`.
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
BYTES = 257  # ids of the tokenizer of bytes
D_FF_MULTIPLE = 8  # of the feed-forward widths that a model has
MOST_D_FF = 2**24


def axis(field: str, values: Iterable) -> Grid:
    """One point for each value of a field such as "model.sharing"."""
    return tuple({field: value} for value in values)


def product(*grids: Grid) -> Grid:
    """Every combination; the last grid varies fastest."""
    return tuple(_merge(points) for points in itertools.product(*grids))


def zipped(*grids: Grid) -> Grid:
    """First with first, second with second; the grids must be equally long."""
    sizes = [len(grid) for grid in grids]
    if len(set(sizes)) > 1:
        raise UserError(f"zipped grids have {sizes} points: make them equal")
    return tuple(_merge(points) for points in zip(*grids))


def chain(*grids: Grid) -> Grid:
    """One grid after another."""
    return tuple(itertools.chain(*grids))


def paper_variants(channels: int) -> Grid:
    """The six variants of the paper's encoders (Kayyam et al. 2026, table 1): four sharings, and
    "+", which is score2d(channels), on the two that tie queries to keys.
    """
    score = (f"score2d({channels})",)
    plus = tuple(
        {"model.sharing": sharing, "model.score": score, "label": f"({sharing_name(sharing)})+"}
        for sharing in ("q=k-v", "q=k=v")
    )
    return axis("model.sharing", ("q-k-v", "q=k-v", "q-k=v", "q=k=v")) + plus


def equal_cache(points: Grid, *, num_heads: int) -> Grid:
    """Returns the points without a tie whose cache is as large as that of the given tied points.

    A tie of K and V stores one tensor where others store two. Its control has both tensors and
    half the key-value heads: "GQA-2" for {"model.sharing": "q-k=v"} of 4 heads, "MQA" for the same
    with 2 key-value heads. Other fields of a point stay, except model.rotary_values, which only
    ties have. Two points with the same control give it once.

    Args:
      points: points whose K and V share a projection.
      num_heads: query heads of the model; a point with a model.num_heads has its own.

    Raises:
      UserError: K and V of a point are not tied, or its key-value heads cannot be halved.
    """
    controls = [_equal_cache(point, num_heads) for point in points]
    return tuple(c for i, c in enumerate(controls) if c not in controls[:i])


def _equal_cache(point: dict, num_heads: int) -> dict:
    """The control of one point."""
    name = label(point)
    sharing = canonical_sharing(point.get("model.sharing", "q-k-v"))
    if not any({"k", "v"} <= set(block) for block in parse_sharing(sharing)):
        raise UserError(
            f"equal_cache: K and V of the point {name!r} are not tied, so no cache is saved: give"
            " it points with model.sharing 'q-k=v' or 'q=k=v'"
        )
    query_heads = point.get("model.num_heads", num_heads)
    heads = point.get("model.num_kv_heads") or query_heads
    half, rest = divmod(heads, 2)
    if rest or half < 1:
        raise UserError(
            f"equal_cache: the point {name!r} has {heads} key-value heads of {query_heads} heads,"
            " which cannot be halved: no model with untied K and V has its cache; leave the point"
            " out"
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
    """Returns the points with the feed-forward as wide as makes them as large as the baseline.

    The width is the multiple of 8 that comes nearest, set as model.mlp_ratio; what is left of the
    difference is less than the cost of 4 columns of each feed-forward. Labels get " wider" (or
    " narrower"). A point that no other width brings nearer, as the baseline, stays as it is.

    Args:
      points: the grid.
      model: the group `model` of the config that the points change.
      match: what is made equal: "parameters", or "flops", the multiply-adds of a token in a
        forward pass over a sequence of `seq_len`.
      baseline: the point to equal; None means the first of `points`.
      seq_len: `config.data.seq_len`; "flops" needs it.
      num_ids: ids of the tokenizer, which count where points change the width of the model.

    Raises:
      UserError: unknown `match`, "flops" without a length, or a point that even the narrowest
        feed-forward leaves larger than the baseline.
    """
    if match not in MATCHES:
        raise UserError(f"equal_params: match={match!r} is none of {among(match, MATCHES)}")
    if match == "flops" and seq_len is None:
        raise UserError(
            "equal_params: the multiply-adds of a token depend on the length of a sequence: give"
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
    """A point with the feed-forward that brings its cost nearest to the target."""

    def with_width(count: int) -> dict:
        return point | {"model.mlp_ratio": D_FF_MULTIPLE * count / spec.d_model}

    counts = range(1, MOST_D_FF // D_FF_MULTIPLE)
    first = bisect.bisect_left(counts, target, key=lambda count: cost(with_width(count)))
    if first == 0 and cost(with_width(1)) > target:
        raise UserError(
            f"equal_params: the point {label(point)!r} is larger than the baseline with the"
            " narrowest feed-forward: leave the point out, or choose a larger baseline"
        )
    near = [with_width(count) for count in (first, first + 1) if count >= 1]
    nearest = min(near, key=lambda other: abs(cost(other) - target))
    now = cost(point)
    if abs(now - target) <= abs(cost(nearest) - target):
        return point
    word = "wider" if cost(nearest) > now else "narrower"
    return nearest | {"label": f"{label(point)} {word}"}


def tuned(field: str, values: Iterable, seeds: int | Iterable[int]) -> dict:
    """Returns what `config.study.tuned` takes: every point is compared at its own best value.

    The study first trains every point with every value on seeds of their own, then every point with
    the value of its best mean score on the seeds that are compared (see
    `qkvjax.studies.tuning`).

    Args:
      field: such as "optimizer.learning_rate"; no point sets it.
      values: what is tried, numbers or texts.
      seeds: how many seeds tune, from `config.seed` + 100 on; or these seeds themselves, of which
        none may be compared.
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
    """Returns the value of a field that differs by setting: half of the heads of each size, say.

    {"label": "GQA half", "model.num_kv_heads": by_setting({"small": 1, "large": 4})}
    """
    return {"by_setting": dict(values)}


def overrides_of(point: dict) -> dict:
    """Returns {"overrides": its fields}, and under "by_setting" those that differ by setting."""
    fields = {field: value for field, value in point.items() if field != "label"}
    differing = {field: value["by_setting"] for field, value in fields.items() if _differs(value)}
    same = {field: value for field, value in fields.items() if field not in differing}
    return {"overrides": same} | ({"by_setting": differing} if differing else {})


def in_setting(point: dict, setting: str) -> dict:
    """Returns a point with its values in one setting.

    Raises:
      UserError: a field has no value for this setting.
    """
    return {field: _value_in(field, value, setting) for field, value in point.items()}


def _value_in(field: str, value: object, setting: str) -> object:
    if not _differs(value):
        return value
    known = value["by_setting"]
    if setting not in known:
        raise UserError(
            f"{field} has no value for the setting {setting!r}: it has one for"
            f" {among(setting, known)}"
        )
    return known[setting]


def _differs(value: object) -> bool:
    """Whether a point's value is made by `by_setting`."""
    return isinstance(value, dict) and value.keys() == {"by_setting"}


def _merge(points: Iterable[dict]) -> dict:
    merged: dict = {}
    for point in points:
        twice = merged.keys() & point.keys()
        if twice:
            raise UserError(f"{sorted(twice)[0]} stands on two axes of the grid")
        merged |= point
    return merged


def label(point: dict) -> str:
    """The point's name in tables: the sharing as reports write it, then other fields."""
    if "label" in point:
        return point["label"]
    parts = [
        sharing_name(value) if field == "model.sharing" else f"{last_part(field)}={value}"
        for field, value in point.items()
    ]
    return " ".join(parts) or "base"


def slug(text: str) -> str:
    """A label as a folder's name."""
    return re.sub(r"[^a-z0-9._=-]+", "-", text.lower()).strip("-.=") or "run"


def identity_hash(identity: dict) -> str:
    """12 hex digits of the fields that fix a run."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
