"""The notebooks run from top to bottom, on little data."""

import json
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]


def execute(name, tmp_path, monkeypatch, folder=".", **variables):
    """Runs a notebook in a folder, with other values for the variables of its first code cell."""
    monkeypatch.setenv("QKVJAX_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for variable, value in variables.items():
        lines = first.source.splitlines()
        found = [i for i, line in enumerate(lines) if line.startswith(f"{variable} = ")]
        assert len(found) == 1, variable
        lines[found[0]] = f"{variable} = {value!r}"
        first.source = "\n".join(lines)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / folder)}}
    )
    return client.execute()


def text_of(notebook):
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    shown = (o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)
    return "\n".join(shown)


def num_figures(notebook):
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_first_tour(tmp_path, monkeypatch):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("for line in open(path): print(line)\n" * 400)
    notebook = execute(
        "01_first_tour.ipynb",
        tmp_path,
        monkeypatch,
        WORKDIR=str(tmp_path / "runs"),
        STEPS=6,
        SOURCE=f"text:{corpus}",
    )
    text = text_of(notebook)
    told = [line for line in text.splitlines() if line.startswith("--- ")]
    sizes = [line.split("cache ")[1].split(" bytes")[0] for line in told]
    whole, half = (int(size.replace(",", "")) for size in sizes)
    assert whole == 2 * half
    assert num_figures(notebook) == 2


@pytest.mark.parametrize("kind", ["sharing", "accuracy"])
def test_study_results(tmp_path, monkeypatch, kind):
    """On the files of a study: one of text, and one of accuracy in several settings."""
    sys.path.insert(0, str(ROOT / "tests/report"))
    import simulated_study as simulated

    sys.path.pop(0)
    workdir = getattr(simulated, f"{kind}_study")(tmp_path / "study")
    notebook = execute("03_study_results.ipynb", tmp_path, monkeypatch, WORKDIR=str(workdir))
    text = text_of(notebook)
    assert ("worse" if kind == "sharing" else "no difference shown") in text
    assert num_figures(notebook) == 1
    results = [json.loads(line) for line in (workdir / "results.jsonl").open()]
    scores = [r["score"] for r in results if r["label"] == "QKV"]
    assert f"{len(results)} finished runs" in text
    assert f"{sum(scores) / len(scores):.6f}" in text
    assert ("sort d64" in text) == (kind == "accuracy")


def test_study_results_right_after_the_quickstart(tmp_path, monkeypatch):
    """Unchanged, in its own folder, where Jupyter starts it."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "report")
    import simulated_study

    (tmp_path / "notebooks").mkdir()
    (tmp_path / "runs").mkdir()
    simulated_study.sharing_study(tmp_path / "runs" / "quickstart")
    notebook = execute("03_study_results.ipynb", tmp_path, monkeypatch, folder="notebooks")
    assert "QKV" in text_of(notebook)


@pytest.mark.slow
def test_inside_the_weights(tmp_path, monkeypatch):
    for i in range(30):  # documents, long enough to be looked at whole
        (tmp_path / f"{i}.txt").write_text(f"for line {i} in open(path): print(line)\n" * 10)
    notebook = execute(
        "02_inside_the_weights.ipynb",
        tmp_path,
        monkeypatch,
        WORKDIR=str(tmp_path / "runs"),
        STEPS=4,
        SOURCE=f"text:{tmp_path}/*.txt",
    )
    text = text_of(notebook)
    assert "W_kv" not in text.split("--- Q-K=V")[0] and "W_qk" in text.split("--- Q=K-V")[1]
    after = text.split("CKA of activations")[1].splitlines()[1:]
    lines = [line.split() for line in after if line[:1].isdecimal()]  # a row a layer and pair
    assert len(lines) == 6 and all(abs(float(line[-2])) < 0.2 for line in lines)
    assert all(0 < float(line[-1]) <= 1 for line in lines)
    assert num_figures(notebook) == 2
