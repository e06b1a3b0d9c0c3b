"""The report of a study: what a researcher would show a colleague.

`write_report` turns the files of a study's workdir into results.csv, report.md, report.html and
plots/. It trains nothing and imports no jax, so that a report can be written anywhere.
"""

from __future__ import annotations

from pathlib import Path

from qkvjax.analysis import claim, claims, columns, decisions, formats, memory, plots, records
from qkvjax.analysis import document as d
from qkvjax.analysis.answer import answer, measured_difference
from qkvjax.analysis.appendix import what_was_run
from qkvjax.analysis.inside_report import draw_spectra, look_inside
from qkvjax.analysis.report_html import render as html
from qkvjax.analysis.report_md import render as markdown
from qkvjax.analysis.settings import by_setting
from qkvjax.analysis.sharings import is_sharing_study
from qkvjax.analysis.statistics import BETTER, WORSE
from qkvjax.analysis.summary import Row, Summary, summarize, write_csv
from qkvjax.analysis.texts import texts

TONES = {BETTER: "good", WORSE: "bad", claim.SUPPORTED: "good", claim.CONTRADICTED: "bad"}
_SYMBOLS = {BETTER: "▲", WORSE: "▼", claim.SUPPORTED: "✓", claim.CONTRADICTED: "✗",
            claim.CANT_TELL: "?", claim.NOT_MEASURED: "–"}  # fmt: skip


def write_report(workdir: Path) -> Path:
    """Writes results.csv, report.md, report.html and plots/*.svg from a study's files.

    Returns:
      The path of report.html.

    Raises:
      UserError: the workdir holds no readable study.json.
    """
    workdir = Path(workdir)
    summary = summarize(records.read(workdir))
    figures = plots.draw(summary, spectra=draw_spectra, memory=memory.draw)
    parts = build(summary, figures)
    write_csv(summary, workdir / "results.csv")
    plots.write(figures, workdir / "plots")
    (workdir / "report.md").write_text(markdown(parts), encoding="utf-8")
    page = workdir / "report.html"
    page.write_text(html(parts), encoding="utf-8")
    return page


def build(summary: Summary, figures: dict[str, str]) -> list:
    """The report as the parts of document.py, in order."""
    return [
        d.Title(str(summary.study.get("title") or "A study"), _subtitle(summary)),
        *_warnings(summary),
        d.Heading("The answer"), *_answer(summary),
        d.Heading("What each variant costs and loses"), *_tables(summary), *by_setting(summary),
        *_plots(summary, figures), *look_inside(summary, figures),
        *memory.memory_parts(summary, figures),
        *_decisions(summary), *_samples(summary), *_claims(summary), *what_was_run(summary),
    ]  # fmt: skip


def closing_lines(workdir: Path) -> list[str]:
    """A small table for the terminal: a line a variant, and how it compares."""
    summary = summarize(records.read(Path(workdir)))
    metric, rows = summary.metric, []
    for row in summary.rows:
        score = metric.text(row.score.mean) if row.score else formats.NONE
        told, word = "", "baseline" if row is summary.baseline else "no finished run"
        if row.paired:
            told, word = measured_difference(summary, row), row.paired.verdict
            word = word if row.paired.low is not None else "no interval"
        rows.append([row.label, told, score, word])
    header = [("", "variant"), ("difference", metric.of), ("", metric.name), ("", "verdict")]
    return columns.table(header, rows)


def verdict(word: str) -> d.Cell:
    """A verdict as symbol and word, so that it does not hang on colour."""
    return d.Cell(f"{_SYMBOLS.get(word, '○')} {word}", tone=TONES.get(word, "quiet"))


def _subtitle(summary: Summary) -> str:
    environment = summary.study.get("environment") or {}
    ended = sum(len(row.results) for row in summary.rows)
    planned = len(summary.rows) * summary.planned
    parts = []
    if summary.baseline.num_params and not summary.settings:
        parts.append(f"{formats.count(summary.baseline.num_params)} parameters")
    tokens = {result.get("tokens") for result in summary.results} - {None}
    if tokens:
        ends = sorted({formats.count(min(tokens)), formats.count(max(tokens))})
        parts.append(f"{' to '.join(ends)} training tokens a run")
    variants = f"{len(summary.rows)} variants" if len(summary.rows) > 1 else "1 variant"
    times = f" × {len(summary.settings)} settings" if summary.settings else ""
    parts.append(f"{variants}{times} × {formats.seeds(len(summary.study['seeds']))}")
    if ended != planned:
        parts.append(f"{ended} of {planned} runs finished")
    if environment.get("device"):
        number = environment.get("num_devices") or 1
        parts.append(f"{number} × {environment['device']}" if number > 1 else environment["device"])
    if environment.get("date"):
        parts.append(str(environment["date"])[:10])
    return " · ".join(parts)


def _warnings(summary: Summary) -> list:
    boxes = []
    if summary.score_pads:
        fraction = max(result.get("pad_fraction") or 0 for result in summary.results)
        text = (
            f" {formats.percent(fraction, sign=False)} of the scored labels are padding, which a"
            " model predicts almost for nothing: it lowers every score and draws the variants"
            " together. These scores are not comparable with anything else."
        )
        boxes.append(d.Box([d.Strong("Padding was scored."), text], "alarm"))
    boxes += [d.Box(note, "note") for note in summary.notes]
    return boxes


def _answer(summary: Summary) -> list:
    first, *rest = answer(summary)
    parts = [d.Paragraph(first, "lead"), *(d.Paragraph(text) for text in rest)]
    if is_sharing_study(summary):
        parts.insert(0, d.Paragraph("Does this transformer need three projections?", "question"))
    return parts


def _tables(summary: Summary) -> list:
    quality = d.Table(
        ["Variant", summary.metric.name.capitalize(), "Difference", "Difference, %", "Verdict",
         "Detectable", "Val. − train"],
        [_quality(summary, row) for row in summary.rows],
        left=("Variant", "Verdict"),
        caption="Quality. Lower is better; the small lines are 95 % intervals. “Detectable”: the"
        " true difference that these seeds find four times in five.",
    )  # fmt: skip
    costs = d.Table(
        ["Variant", "Parameters", "FLOPs / token", "Cache / token", "Step time", "Peak memory",
         "Decode time"],
        [_costs(summary, row) for row in summary.rows],
        left=("Variant",),
        caption=_cost_caption(summary),
    )  # fmt: skip
    if summary.settings:  # each has costs of its own
        return [quality]
    parts = [quality, costs]
    if summary.marks:
        heads = ["Variant"]
        for mark in summary.marks:
            heads += [f"Steps to {mark:.3f}", f"Time to {mark:.3f}"]
        where = "what the worst variant ended with"
        if len(summary.marks) > 1:
            where = "what the worst variant had halfway through its steps, and ended with"
        parts.append(
            d.Table(
                heads,
                [[row.label, *_races(row)] for row in summary.rows],
                left=("Variant",),
                caption=f"Steps and training wall-clock to common losses: {where}. On the mean"
                " curve over seeds, by straight lines between evaluations. Wall-clock is of runs"
                " that may have shared the machine.",
            )
        )
    return parts


def _quality(summary: Summary, row: Row) -> list:
    planned, score, pair = summary.planned, row.score, row.paired
    text = summary.metric.text
    short = 0 < len(row.results) < planned
    name = d.Cell(row.label, f"{len(row.results)} of {summary.runs(planned)}" if short else "")
    if score is None:
        return [name, *["–"] * 3, d.Cell("✗ no finished run", tone="bad"), *["–"] * 2]
    bits = d.Cell(text(score.mean), formats.span(score.low, score.high, text))
    gap = formats.difference(row.train_validation_gap)
    if row is summary.baseline:
        return [name, bits, "–", "–", d.Cell("baseline", tone="quiet"), "–", gap]
    if pair is None:
        return [name, bits, "–", "–", d.Cell("○ no common seed", tone="quiet"), "–", gap]
    middle, low, high = map(summary.relative, (pair.mean, pair.low, pair.high))
    span = "no interval" if pair.low is None else formats.span(pair.low, pair.high)
    part = "no interval" if pair.low is None else formats.percent_span(middle, low, high)
    effect = pair.smallest_detectable_effect
    detectable = d.Cell("–") if effect is None else d.Cell(
        formats.percent(summary.relative(effect), sign=False), f"{effect:.4f}"
    )  # fmt: skip
    return [
        name, bits,
        d.Cell(formats.difference(pair.mean), span), d.Cell(formats.percent(middle), part),
        verdict(pair.verdict) if pair.low is not None else d.Cell("○ no interval", tone="quiet"),
        detectable, gap,
    ]  # fmt: skip


def _costs(summary: Summary, row: Row) -> list:
    saved = summary.cache_saved(row) if row is not summary.baseline else None
    below = "" if saved is None else f"{formats.saved(saved)} saved"
    measured, is_base = row.measured, row is summary.baseline
    return [
        row.label,
        formats.count(row.num_params),
        formats.count(row.flops_per_token),
        d.Cell(formats.num_bytes(row.cache_bytes_per_token), below),
        _ratio(measured.get("step_ratio"), measured.get("step_seconds"), is_base),
        _peak(summary, row),
        _ratio(measured.get("decode_ratio"), measured.get("decode_seconds"), is_base),
    ]


def _ratio(ratio, seconds: float | None, is_baseline: bool) -> d.Cell:
    """A time ratio with its interval; the baseline shows its seconds."""
    if not ratio and seconds is None:
        return d.Cell(formats.NOT_MEASURED, tone="quiet")
    if is_baseline or not ratio:
        return d.Cell(formats.duration(seconds))
    middle, low, high = ratio
    return d.Cell(formats.ratio(middle), formats.span(low, high, lambda v: f"{v:.2f}"))


def _peak(summary: Summary, row: Row) -> d.Cell:
    peak, base = row.measured.get("peak_bytes"), summary.baseline.measured.get("peak_bytes")
    if peak is None:
        return d.Cell(formats.NOT_MEASURED, tone="quiet")
    below = "" if not base or row is summary.baseline else formats.percent(peak / base - 1)
    return d.Cell(formats.num_bytes(peak), below)


def _cost_caption(summary: Summary) -> str:
    measured = summary.records.measured
    text = "Costs. Parameters, FLOPs (forward and backward) and decode cache are exact."
    if not summary.records.measurements:
        return f"{text} Times and memory were not measured."
    decode = measured.get("decode") or {}
    text += " Times are ratios to the baseline"
    if measured.get("rounds"):
        text += f", measured in turns in one process ({measured['rounds']} rounds"
        text += f", {measured['device']})" if measured.get("device") else ")"
    text += ", with 95 % intervals; memory is the peak that the compiler plans for a training step"
    if measured.get("tokens_per_step"):
        text += f" of {measured['tokens_per_step']:,} tokens"
    if decode.get("length"):
        text += (
            f"; decoding is timed per token at {decode['length']:,} cached tokens, batch"
            f" {decode.get('batch', '?')}, {decode.get('cache_dtype', 'unknown')} cache"
        )
    return text + "."


def _races(row: Row) -> list[str]:
    cells = []
    for steps, seconds in zip(row.steps_to, row.seconds_to, strict=True):
        cells += [formats.NONE if steps is None else f"{steps:,.0f}", formats.duration(seconds)]
    return cells


def _plots(summary: Summary, figures: dict[str, str]) -> list:
    captions = texts("captions.toml")
    paper = captions.pop("paper") if is_sharing_study(summary) and summary.metric.relative else ""
    over = "seeds; the bands reach from the best to the worst seed"
    over = "settings and seeds" if summary.settings else over
    words = {"base": summary.baseline.label, "over": over, "paper": paper}
    told = {name: text.format(**words) for name, text in captions.items()}
    shown = [d.Figure(name, figures[name], told[name]) for name in figures if name in told]
    return [d.Heading("Plots"), *shown] if shown else []


def _decisions(summary: Summary) -> list:
    found = decisions.decisions(summary)
    if not found:
        return []
    tones = ["good" if one.decided else "quiet" for one in found]
    rows = [[f.wish, d.Cell(f.choice, tone=tone), f.reason] for f, tone in zip(found, tones)]
    caption = (
        "For this model, on this data and device. A variant is named only where its intervals"
        " separate it from the other candidates; seeds are estimated for 80 % power."
    )
    table = d.words(["If you want", "take", "because"], rows, caption)
    return [d.Heading("Which one to take"), table]


def _samples(summary: Summary) -> list:
    blocks = []
    for row in summary.rows:
        seed = min((s for s, r in row.results.items() if r.get("sample")), default=None)
        if seed is not None:
            sample = row.results[seed]["sample"]
            prompt, text = str(sample.get("prompt") or ""), str(sample.get("text") or "")
            title = f"{row.label}, seed {seed}"
            blocks.append(d.Code(text.removeprefix(prompt) if prompt else text, title, prompt))
    if not blocks:
        return []
    return [d.Heading("A sample of each model"), *blocks]


def _claims(summary: Summary) -> list:
    found = claims.findings(summary)
    tokens = {result.get("tokens") for result in summary.results} - {None}
    environment = summary.study.get("environment") or {}
    size = summary.baseline.num_params
    here = [f"{formats.count(size)} parameters"] if size else []
    here += [f"{formats.count(max(tokens))} tokens"] if tokens else []
    here += [str(environment["device"])] if environment.get("device") else []
    seen = [(c, f) for c, f in found if f.verdict != claim.NOT_MEASURED]
    unseen = [(c, f) for c, f in found if f.verdict == claim.NOT_MEASURED]
    parts = [
        d.Heading("The claims"),
        d.Paragraph(
            "What has been said about shared projections, by the news article that prompted this"
            " project (A), the paper arXiv 2606.04032 (P) and its authors’ follow-ups (F), and"
            " what this study says about it. A measured claim is decided only by a study of the"
            " size that the claim speaks of; elsewhere the measurement stands and the verdict is"
            f" “{claim.CANT_TELL}”. All measurements here: {', '.join(here)}."
        ),
    ]
    if seen:
        rows = [[c.id, c.claim, f.measured, f.interval, verdict(f.verdict)] for c, f in seen]
        parts.append(d.words(["", "Claim", "Measured here", "95 % interval", "Verdict"], rows))
    rows = [[c.id, c.claim, c.measured_by, verdict(f.verdict)] for c, f in unseen]
    table = d.words(["", "Claim", "Would be measured by", "Verdict"], rows)
    parts.append(d.Fold(f"{len(unseen)} claims that this study does not measure", [table]))
    return parts
