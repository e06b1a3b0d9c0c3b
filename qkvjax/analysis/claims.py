"""The claims about shared projections, as data, and what a study lets us say about each.

The rule for verdicts, so that nothing here is typed by hand:

1. Exact arithmetic (cache bytes follow from the configuration) is decided at any size.
2. A measured claim is decided only by a study of the size that the claim speaks of: baseline
   parameters inside `Claim.scope`, and at least `MIN_TOKENS_PER_PARAM` training tokens per
   parameter. The paper and its follow-up speak of 300M; the article, where it names no size,
   of its own range of 100M to 7B. Elsewhere the measurement is printed and the verdict is
   "can't tell at this size".
3. The paper's figures were taken with padding scored and the follow-up's with padding masked;
   a study of the other kind measures something else, and decides nothing about them.
4. Inside its scope a claim is supported or contradicted only when the whole 95 % interval says
   so; a claim "about x" is contradicted when the interval excludes x, and supported when the
   interval contains x and excludes no effect at all.
5. What the study does not measure is "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Callable

from qkvjax.analysis import claim, curves, formats, memory
from qkvjax.analysis.claim import CANT_TELL, CONTRADICTED, SUPPORTED, Claim, Finding
from qkvjax.analysis.feedforward_claims import combines_with_experts, shared_feed_forwards
from qkvjax.analysis.sharings import field, is_uniform, pure, pure_rows
from qkvjax.analysis.statistics import Paired, paired
from qkvjax.analysis.summary import Row, Summary
from qkvjax.analysis.texts import texts


def findings(summary: Summary) -> list[tuple[Claim, Finding]]:
    """Every claim with what this study says about it."""
    result = []
    for one in CLAIMS:
        found = one.decide and one.decide(summary) or Finding()
        if found.verdict in (SUPPORTED, CONTRADICTED) and not claim.in_scope(one, summary):
            found = found._replace(verdict=CANT_TELL)
        result.append((one, found))
    return result


def _small_loss(summary: Summary) -> Finding | None:
    """A1: each sharing's loss in percent of the bits against 0.5 %."""
    pairs = {row.label: row.paired for row in pure_rows(summary)}
    return claim.losses(summary, pairs, summary.metric.of) if pairs else None


def _memory(summary: Summary) -> Finding | None:
    """A2: one batch size can only fall short of the range, not show it; several show a range.
    What was compiled for another model says nothing about this one.
    """
    own = [r for r in summary.records.memory
           if r.get("num_params") == summary.baseline.num_params]  # fmt: skip
    found = [part for _, _, _, part in memory.savings(own, "train")]
    if found:
        span = " to ".join(formats.percent(part, sign=False) for part in (min(found), max(found)))
        inside = memory.ARTICLE[0] <= max(found) <= memory.ARTICLE[1]
        text = f"compiled peak saved, over sharings, batches and contexts: {span}"
        return Finding(text, "exact", SUPPORTED if inside else CONTRADICTED)
    base = summary.baseline.measured.get("peak_bytes")
    rows = [row for row in pure_rows(summary) if row.measured.get("peak_bytes")]
    if not base or not rows:
        return None
    saved = {row.label: 1 - row.measured["peak_bytes"] / base for row in rows}
    measured = "\n".join(f"{label} {formats.percent(-part)}" for label, part in saved.items())
    verdict = CONTRADICTED if max(saved.values()) < 0.10 else CANT_TELL
    return Finding(f"compiled peak at one batch size:\n{measured}", "exact", verdict)


def _single_projection_time(summary: Summary) -> Finding | None:
    """A3: "about 15 %" is read as 10 to 20 % less time a step."""
    row = pure(summary, "q=k=v")
    ratio = row and row.measured.get("step_ratio")
    if not ratio:
        return None
    middle, low, high = ratio
    inside, outside = 0.80 <= low and high <= 0.90, high < 0.80 or low > 0.90
    verdict = SUPPORTED if inside else CONTRADICTED if outside else CANT_TELL
    return Finding(
        f"{row.label} {formats.percent(middle - 1)} time a step",
        formats.percent_span(middle - 1, low - 1, high - 1),
        verdict,
    )


def _early_convergence(summary: Summary) -> Finding | None:
    """A7: steps to the halfway loss, paired within seeds."""
    if len(summary.marks) < 2:
        return None
    base, mark = _steps_to(summary.baseline, summary.marks[0]), summary.marks[0]
    verdicts, measured, intervals = [], [], []
    for row in pure_rows(summary):
        own = _steps_to(row, mark)
        if base is None or own is None or not (result := paired(base, own)):
            continue
        start = sum(base.values()) / len(base)
        side = {"better": SUPPORTED, "worse": CONTRADICTED}.get(result.verdict, CANT_TELL)
        verdicts.append(side)
        measured.append(f"{row.label} {formats.percent(result.mean / start)}")
        intervals.append(f"{row.label} {_percent_span(result, start)}")
    if not measured:
        return None
    text = f"steps to {mark:.3f} {summary.metric.name}:\n" + "\n".join(measured)
    return Finding(text, "\n".join(intervals), claim.most(verdicts))


def _regularising(summary: Summary) -> Finding | None:
    """A8 needs many epochs on little data, and each sharing with its best dropout; a gap alone
    decides nothing."""
    tuned = _tuned(summary)
    if len(tuned) > 1:
        base = tuned.pop("q-k-v")
        pairs = {row.label: paired(base.scores, row.scores) for row in tuned.values()}
        pairs = {label: pair for label, pair in pairs.items() if pair}
        won = any(pair.verdict == "better" for pair in pairs.values())
        what = f"best dropout of each, against {base.label}"
        return claim.losses(summary, pairs, what, SUPPORTED if won else CANT_TELL)
    rows = [summary.baseline, *pure_rows(summary)]
    gaps = [f"{r.label} {formats.difference(r.train_validation_gap)}"
            for r in rows if r.train_validation_gap is not None]  # fmt: skip
    if len(gaps) < 2:
        return None
    text = f"validation minus training {summary.metric.name}:\n" + "\n".join(gaps)
    return Finding(text, verdict=CANT_TELL)


def _tuned(summary: Summary) -> dict[str, Row]:
    """sharing -> the row of its best dropout, where a study varies both; QKV among them."""
    best: dict[str, Row] = {}
    for row in summary.rows:
        if row.score is None or not set(row.changed) <= {"model.sharing", "model.dropout"}:
            continue
        sharing = row.settings.get("model.sharing")
        if sharing not in best or row.score.mean < best[sharing].score.mean:
            best[sharing] = row
    varied = any("model.dropout" in row.changed for row in summary.rows)
    return best if varied and "q-k-v" in best else {}


def _half_cache(summary: Summary) -> Finding | None:
    """P1, the cache: exact."""
    row = pure(summary, "q-k=v")
    saved = summary.cache_saved(row) if row else None
    if saved is None or not is_uniform(summary):
        return None
    verdict = SUPPORTED if saved == 0.5 else CONTRADICTED
    return Finding(f"{row.label} saves {formats.saved(saved)}", "exact", verdict)


def _head_sharing_cache(summary: Summary) -> Finding | None:
    """P2: K=V with g key-value heads saves 1 - g / 2N of the cache of N untied heads."""
    heads = field(summary, summary.baseline, "model.num_heads")
    own = field(summary, summary.baseline, "model.num_kv_heads")
    untied = field(summary, summary.baseline, "model.sharing") == "q-k-v"
    if not heads or own not in (None, heads) or not untied or not is_uniform(summary):
        return None
    texts, verdicts = [], []
    for row in summary.others:
        groups, saved = field(summary, row, "model.num_kv_heads"), summary.cache_saved(row)
        tied = field(summary, row, "model.sharing") == "q-k=v"
        if tied and groups and groups < heads and saved is not None:
            texts.append(f"{row.label} saves {formats.saved(saved)} ({groups} of {heads} heads)")
            verdicts.append(math.isclose(saved, 1 - groups / (2 * heads), abs_tol=1e-12))
    if not texts:
        return None
    return Finding("\n".join(texts), "exact", SUPPORTED if all(verdicts) else CONTRADICTED)


def _perplexity(*expected: tuple[str, float]) -> Callable[[Summary], Finding | None]:
    """Perplexity ratios of sharings against the figures claimed for them."""

    def decide(summary: Summary) -> Finding | None:
        texts, intervals, verdicts = [], [], []
        for sharing, figure in expected:
            row = pure(summary, sharing)
            result = row and paired(_log_perplexity(summary.baseline), _log_perplexity(row))
            if not result:
                continue
            ratio = math.expm1(result.mean)
            bits = summary.relative(row.paired.mean if row.paired else None)
            texts.append(
                f"{row.label} {formats.percent(ratio)} perplexity ({formats.percent(bits)} of the"
                " bits)"
            )
            low, high = (None if v is None else math.expm1(v) for v in (result.low, result.high))
            intervals.append(f"{row.label} {formats.percent_span(ratio, low, high)}")
            verdicts.append(claim.about(figure, low, high, no_effect=0.0))
        if not texts:
            return None
        verdict = CANT_TELL
        if CONTRADICTED in verdicts:
            verdict = CONTRADICTED  # a claim of two figures falls with either
        elif verdicts == [SUPPORTED] * len(expected):
            verdict = SUPPORTED
        pads = "padding scored" if summary.score_pads else "no padding scored"
        return Finding("\n".join([*texts, pads]), "\n".join(intervals), verdict)

    return decide


def _log_perplexity(row: Row) -> dict[int, float]:
    return {s: math.log(r["perplexity"]) for s, r in row.results.items() if r.get("perplexity")}


def _steps_to(row: Row, mark: float) -> dict[int, float] | None:
    """seed -> steps to the mark; None when some seed never reaches it."""
    if row.curve is None:
        return None
    line = row.curve
    steps = {s: curves.reach(line.steps, v, mark) for s, v in zip(line.seeds, line.values)}
    return None if None in steps.values() else steps


def _percent_span(result: Paired, start: float) -> str:
    low, high = (None if v is None else v / start for v in (result.low, result.high))
    return formats.percent_span(result.mean / start, low, high)


def _spans(summary: Summary, rows: list[Row]) -> str:
    parts = [[summary.relative(v) for v in (r.paired.mean, r.paired.low, r.paired.high)]
             for r in rows]  # fmt: skip
    return "\n".join(f"{r.label} {formats.percent_span(*part)}" for r, part in zip(rows, parts))


def _baseline_inside(summary: Summary, *names: str) -> list[str]:
    """Measures of the baseline's models, over their runs."""
    lines = [line["inside"] for line in summary.baseline.results.values() if line.get("inside")]
    texts = []
    for name in names:
        values = [line[name] for line in lines if name in line]
        if values:
            texts.append(f"{name.replace('_', ' ')} {sum(values) / len(values):.3g}")
    return texts


def _redundant(summary: Summary) -> Finding | None:
    """A6 names no measure: ranks are printed, and decide nothing."""
    ranks = _baseline_inside(summary, "rank_q", "rank_k", "rank_v")
    width = field(summary, summary.baseline, "model.d_model")
    text = f"effective ranks, width {width}:\n" + "\n".join(ranks)
    return Finding(text, verdict=CANT_TELL) if ranks else None


def _cosines(summary: Summary) -> Finding | None:
    """P7 names no estimator: both are printed, and decide nothing."""
    found = _baseline_inside(summary, "cosine_k_v", "cka_k_v", "rank_k", "rank_v")
    return Finding("\n".join(found), verdict=CANT_TELL) if found else None


def _accuracies(summary: Summary, *words: str) -> bool:
    """Whether this is a study of accuracy on data whose source has one of these words."""
    sources = {line.get("overrides", {}).get("data.source") for line in summary.results}
    sources.add(field(summary, summary.baseline, "data.source"))
    return summary.metric.key == "error" and any(w in str(s) for s in sources for w in words)


def _by_variant(summary: Summary) -> str:
    rows = [row for row in summary.rows if row.score]
    return "mean accuracy:\n" + "\n".join(f"{r.label} {1 - r.score.mean:.3f}" for r in rows)


def _synthetic_averages(summary: Summary) -> Finding | None:
    """P4 averages over lengths 16, 64 and 128 too, and its re-run gave other figures."""
    if not _accuracies(summary, "synthetic:") or not summary.compared:
        return None
    return Finding(_by_variant(summary), _spans(summary, summary.compared), CANT_TELL)


def _equal_vision(summary: Summary) -> Finding | None:
    """P5: every variant's paired interval inside, or one wholly outside, of half a point."""
    images = _accuracies(summary, "mnist", "cifar")
    if not images or not summary.compared or _accuracies(summary, "anomaly:"):
        return None
    spans = [(row.paired.low, row.paired.high) for row in summary.compared]
    verdict = CANT_TELL
    if any(low is not None and (low > 0.005 or high < -0.005) for low, high in spans):
        verdict = CONTRADICTED
    elif all(low is not None and -0.005 <= low <= high <= 0.005 for low, high in spans):
        verdict = SUPPORTED
    return Finding(_by_variant(summary), _spans(summary, summary.compared), verdict)


def _plus(summary: Summary) -> Finding | None:
    """P8: each variant with score2d against the same sharing without. A gain does not say why:
    score2d also starts the scores near zero.
    """
    rows = {
        (field(summary, row, "model.sharing"), str(field(summary, row, "model.score") or "")): row
        for row in summary.rows
    }
    measured, intervals, verdicts = [], [], []
    for (sharing, score), row in rows.items():
        plain = rows.get((sharing, "")) or rows.get((sharing, "[]"))
        pair = plain and plain is not row and "score2d" in score
        pair = paired(plain.scores, row.scores) if pair else None
        if pair:
            measured.append(f"{row.label} {formats.percent(pair.mean)} {summary.metric.of}")
            intervals.append(f"{row.label} {formats.percent_span(pair.mean, pair.low, pair.high)}")
            verdicts.append(CONTRADICTED if pair.verdict == "worse" else CANT_TELL)
    if not measured or summary.metric.relative:
        return None
    text = "against the same sharing without:\n" + "\n".join(measured)
    return Finding(text, "\n".join(intervals), claim.most(verdicts))


# What decides a claim; a claim that is missing here is measured by no study of this kind.
_DECIDE = {
    "A1": _small_loss, "A2": _memory, "A3": _single_projection_time, "A6": _redundant,
    "A7": _early_convergence, "A8": _regularising, "A14": combines_with_experts,
    "A18": shared_feed_forwards, "P1": _half_cache, "P1b": _perplexity(("q-k=v", 0.031)),
    "P2": _head_sharing_cache, "P3": _perplexity(("q=k-v", 0.049), ("q=k=v", 0.25)),
    "P4": _synthetic_averages, "P5": _equal_vision, "P7": _cosines, "P8": _plus,
    "F1": _perplexity(("q-k=v", 0.022)),
}  # fmt: skip
CLAIMS = tuple(Claim(id=i, decide=_DECIDE.get(i), **c) for i, c in texts("claims.toml").items())
