"""Two processes that share a data folder, or do not: who prepares, who waits, who refuses."""

import json

import pytest
from processes import finish, start

PROGRAM = """
import json, os, pathlib, sys, time
from qkvjax.commands import cli
from qkvjax.errors import UserError
from qkvjax.parallel import distributed, folders, job

folders._Board.SIGN = 0.1
folder = pathlib.Path(os.environ["FOLDER"].replace("{process}", sys.argv[-1][-1]))
signs = []

def call(sign):
    if (folder / "prepared").exists():
        return "found"
    for _ in range(20):
        time.sleep(0.1)
        sign()
    if os.environ.get("REFUSED") == str(distributed.index()):
        raise UserError("no text", 7)
    (folder / "prepared").touch()
    return "prepared"

def body(values):
    with job.join(values):
        result = folders.by_folder(folder, call, lambda: signs.append(time.monotonic()))
        longest = max(b - a for a, b in zip(signs, signs[1:]))
        left = sorted(path.name for path in folder.iterdir())
        print(json.dumps([result, len(signs), longest, left]))
    return 0

sys.exit(cli.run(["test", *sys.argv[1:]], "", job.FLAGS, body))
"""


def run(folder, shared, **more):
    place = folder / ("data" if shared else "data{process}")
    return finish(start(folder, 2, 1, "-c", PROGRAM, FOLDER=str(place), **more))


@pytest.mark.parametrize("shared", [True, False])
def test_each_folder_is_filled_once_and_who_waits_is_alive(tmp_path, shared):
    ended = run(tmp_path, shared)
    assert [code for code, _, _ in ended] == [0, 0], ended
    results = [json.loads(out.splitlines()[-1]) for _, out, _ in ended]
    assert [result for result, *_ in results] == ["prepared", "found" if shared else "prepared"]
    for _, signs, longest, left in results:
        assert signs >= 3 and longest < 2.0  # the call alone takes two seconds
        assert left == ["prepared"]


@pytest.mark.parametrize(("shared", "refused"), [(False, 1), (True, 0)])
def test_a_refusal_is_everybodys(tmp_path, shared, refused):
    ended = run(tmp_path, shared, REFUSED=str(refused))
    assert [code for code, _, _ in ended] == [7, 7], ended
    assert "no text" in ended[0][2]  # which prints for all
