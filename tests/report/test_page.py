"""The report as HTML and Markdown: whole, identical in content, escaped, reproducible."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import simulated_study as simulated

from qkvjax import formats
from qkvjax.report import drawing, files, page, plots, rendering, tables
from qkvjax.report.summary import summarize

VOID = {"meta", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, texts and the addresses that a page loads."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids, self.texts, self.loads = [], [], [], []
        self.feed(text)
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.loads += [v for k, v in attributes.items() if k in ("src", "href") and v[:1] != "#"]
        assert tag not in ("script", "iframe"), tag
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    simulated.sharing_study(folder, fail={("q=k-v", 2)}, tail='{"label"')
    assert page.write_report(folder) == folder / "report.html"
    return folder


def test_the_page_is_whole_and_loads_nothing(workdir):
    page = Page((workdir / "report.html").read_text(encoding="utf-8"))
    assert page.loads == []
    assert len(page.ids) == len(set(page.ids)), "ids of two plots collide"
    text = (workdir / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)|@import", text)


def test_the_sections_stand_in_order(workdir):
    markdown = (workdir / "report.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert heads == [
        "The answer",
        "What each variant costs and loses",
        "Plots",
        "Which variant to choose",
        "A sample from each model",
        "What was run",
    ]
    assert "the loss is \\<nan\\> at step 310" in markdown and "cut short" in markdown


def test_plots_are_files_that_parse_and_are_linked(workdir):
    markdown = (workdir / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert linked == [f"plots/{name}.svg" for name in ("forest", "pareto", "curves", "gap")]
    for path in linked:
        ElementTree.parse(workdir / path)


def test_both_forms_say_the_same(workdir):
    summary = summarize(files.read(workdir))
    words = page.context(summary, plots.draw(summary))
    html = " ".join(" ".join(Page(rendering.render("report.html.j2", words)).texts).split())
    markdown = re.sub(r"\\(?=[^A-Za-z0-9\s])", "", rendering.render("report.md.j2", words))
    markdown = " ".join(markdown.split())

    def check(value):
        match value:
            case tables.Table():
                check([list(value.columns), value.rows, value.caption])
            case tables.Cell():
                check([value.text, value.below])
            case dict():
                check([part for name, part in value.items() if name not in ("svg", "name")])
            case list() | tuple():
                for part in value:
                    check(part)
            case str():
                text = " ".join(value.split())
                assert text in html and text in markdown, text

    check(words)


def test_reports_of_one_study_are_identical(workdir):
    names = ("report.html", "report.md", "results.csv", "plots/gap.svg")
    before = [(workdir / name).read_bytes() for name in names]
    page.write_report(workdir)
    assert before == [(workdir / name).read_bytes() for name in names]


def test_texts_from_files_are_escaped(tmp_path):
    evil = "<script>alert('$x$ & |')</script>"
    labels = {f"base {evil}": {}, evil: {"data.source": evil}}
    lines = [simulated.result(label, o, s) for label, o in labels.items() for s in (0, 1)]
    for line in lines:
        line["sample"] = {"prompt": "```", "text": f"{evil}\n```"}
    lines.append(simulated.failed(evil, {}, 2, evil))
    study = simulated.study(labels, f"base {evil}", [0, 1, 2])
    study |= {"title": evil, "command": evil, "environment": {evil: evil}, "data": {evil: evil}}
    workdir = simulated.write(tmp_path, study, lines, {"device": evil, "rows": []}, tail=evil)
    html = page.write_report(workdir).read_text(encoding="utf-8")
    assert "<script" not in html
    Page(html)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    fenced = re.sub(r"^(`{3,})text\n.*?\n\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?<!\\)<script", fenced) and "````text\n" in markdown
    assert all(line.count(r"|") >= 3 for line in markdown.splitlines() if line.startswith("|"))


def test_scored_padding_raises_an_alarm(tmp_path):
    simulated.sharing_study(tmp_path, 2, pad_fraction=0.66, score_pads=True)
    html = page.write_report(tmp_path).read_text(encoding="utf-8").replace(formats.NBSP, " ")
    assert html.index('class="box alarm"') < html.index("<h2>")
    assert "66 % of the scored labels are padding" in html


def test_no_padding_no_alarm(workdir):
    assert "box alarm" not in (workdir / "report.html").read_text(encoding="utf-8")


def test_absent_measurements_say_so(tmp_path):
    simulated.sharing_study(tmp_path, 2, sharings=("q-k-v", "q-k=v"), measurements=None)
    markdown = page.write_report(tmp_path).with_suffix(".md").read_text(encoding="utf-8")
    row = next(line for line in markdown.splitlines() if line.startswith("| Q-K=V | 3.15M"))
    assert row.count("not measured") == 3


@pytest.mark.parametrize(
    "seeds,sharings,fail",
    [
        (1, ("q-k-v", "q-k=v"), ()),
        (2, ("q-k-v",), ()),
        (2, ("q-k-v", "q-k=v"), {("q-k-v", 0), ("q-k-v", 1)}),
        (1, ("q-k-v", "q-k=v"), {("q-k-v", 0), ("q-k=v", 0)}),
    ],
)
def test_thin_studies_still_have_a_report(tmp_path, seeds, sharings, fail):
    simulated.sharing_study(tmp_path, seeds, sharings=sharings, fail=fail)
    Page(page.write_report(tmp_path).read_text(encoding="utf-8"))


def test_results_without_optional_fields_still_have_a_report(tmp_path):
    keep = ("label", "seed", "status", "score")
    labels = {"A": {}, "B": {"seed": 1}}
    lines = [simulated.result(label, {}, s) for label in labels for s in (0, 1)]
    study = {"baseline": "A", "points": [{"label": "A"}, {"label": "B"}], "seeds": [0, 1]}
    simulated.write(tmp_path, study, [{k: line[k] for k in keep} for line in lines])
    Page(page.write_report(tmp_path).read_text(encoding="utf-8"))


def test_the_report_imports_no_jax():
    code = "import sys, qkvjax.report.page; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_labels_are_spread_without_changing_order():
    wanted = [1.0, 1.01, 1.02, 3.0]
    spread = drawing.spread(wanted, 0.1)
    assert np.all(np.diff(spread) >= 0.1 - 1e-6) and spread[3] == 3.0
    assert drawing.spread([2.0, 1.0], 0.1) == [2.0, 1.0]


@pytest.mark.parametrize(
    "text,expected",
    [
        (formats.num_bytes(81_920), "80 KiB"),
        (formats.num_bytes(2560), "2.5 KiB"),
        (formats.num_bytes(768), "768 B"),
        (formats.count(2_134_000), "2.13M"),
        (formats.count(950), "950"),
        (formats.duration(200), "3 min 20 s"),
        (formats.duration(0.0031), "3.10 ms"),
        (formats.percent(-0.0131), "−1.3 %"),
        (formats.percent(0.0), "0 %"),
        (formats.saved(0.96875), "96.9 %"),
        (formats.difference(0.0213), "+0.0213"),
        (formats.listed(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_numbers_read_well(text, expected):
    assert text.replace(formats.NBSP, " ") == expected


def test_the_report_looks_inside(tmp_path):
    workdir = simulated.sharing_study(tmp_path)
    lines = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    for line in lines:
        ranks = {"rank_q": 100.4, "rank_k": 99.0, "rank_scores": 28.0, "cka_k_v": 0.7}
        line["inside"] = (ranks if line["label"] == "QKV" else {"rank_qkv": 90.0}) | {
            "diagonal_mass": 0.1 + line["seed"] / 10
        }
        line["spectra"] = {"q": [1.0, 0.5, 0.1]} if line["seed"] == 0 else None
    (workdir / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page.write_report(workdir)
    text = (workdir / "report.md").read_text()
    assert "## Inside the models" in text and "q\u00a0100, k\u00a099" in text
    assert "0.1\u00a0to\u00a00.3" in text and "CKA k, v" in text
    assert (workdir / "plots/spectra.svg").is_file()


def test_the_subtitle_says_how_many_labels_were_scored(workdir):
    subtitle = (workdir / "report.md").read_text(encoding="utf-8").splitlines()[2]
    assert "200k labels scored" in subtitle


def test_runs_of_other_data_or_length_raise_a_warning(tmp_path):
    lines = [
        simulated.result("A", {}, 0),
        simulated.result("A", {}, 1) | {"data_digest": "other", "steps": 7},
    ]
    simulated.write(tmp_path, simulated.study({"A": {}}, "A", [0, 1]), lines)
    text = page.write_report(tmp_path).with_suffix(".md").read_text(encoding="utf-8")
    assert "not comparable" in text and "The runs of A have different lengths (7, 1000" in text


def test_the_figures_of_the_paper_stand_beside_ours(workdir):
    text = (workdir / "report.md").read_text(encoding="utf-8").replace(formats.NBSP, " ")
    row = next(
        line for line in text.splitlines() if line.startswith("| Q=K=V |") and "+14 %" in line
    )
    assert row.endswith("| Q=K=V |")


def test_a_tuned_study_shows_its_values(tmp_path):
    labels = {"QKV": {}, "Q-K=V": {"model.sharing": "q-k=v"}}
    lines = []
    for label, overrides in labels.items():
        for value in (0.001, 0.002, 0.004):
            worse = 9 * abs(value - 0.002) if label == "QKV" else 9 * (0.004 - value)
            tuned = {"phase": "tune", "tuned": value}
            lines.append(simulated.result(label, overrides, 100, worse) | tuned)
        lines += [simulated.result(label, overrides, seed) for seed in (0, 1, 2)]
    study = simulated.study(labels, "QKV", [0, 1, 2])
    field = {"field": "optimizer.learning_rate", "values": [0.001, 0.002, 0.004], "seeds": [100]}
    simulated.write(tmp_path, study | {"tuned": field}, lines)
    text = page.write_report(tmp_path).with_suffix(".md").read_text(encoding="utf-8")
    assert "| Variant | 0.001 | 0.002 | 0.004 |" in text and "the largest tried" in text
    assert (tmp_path / "plots/tuning.svg").is_file()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_tables_do_not_scroll_at_a_thousand_pixels(workdir):
    """Nothing in the page is wider than its room: the browser says so in the page's title."""
    text = (workdir / "report.html").read_text(encoding="utf-8")
    probe = (
        "<script>document.title = [...document.querySelectorAll('.scroll')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1).length</script></body>"
    )
    copy = workdir / "probe.html"
    copy.write_text(text.replace("</body>", probe), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,900"]
    done = subprocess.run(
        [*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert re.search(r"<title>0</title>", done.stdout), done.stdout[:300]
