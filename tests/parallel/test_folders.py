"""Two processes that share a data folder, or do not: which one prepares, waits, fails."""

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
        return "reused"
    for _ in range(20):
        time.sleep(0.1)
        sign()
    if os.environ.get("FAILING") == str(distributed.index()):
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
    data = folder / ("data" if shared else "data{process}")
    return finish(start(folder, 2, 1, "-c", PROGRAM, FOLDER=str(data), **more))


@pytest.mark.parametrize("shared", [True, False])
def test_each_folder_is_filled_once_and_a_waiting_process_counts_as_alive(tmp_path, shared):
    ended = run(tmp_path, shared)
    assert [result.code for result in ended] == [0, 0], ended
    results = [json.loads(result.out.splitlines()[-1]) for result in ended]
    assert [result for result, *_ in results] == ["prepared", "reused" if shared else "prepared"]
    for _, signs, longest, left in results:
        assert signs >= 3
        assert longest < 2.0  # seconds between two signs; the call alone takes two seconds
        assert left == ["prepared"]


@pytest.mark.parametrize(("shared", "failing"), [(False, 1), (True, 0)])
def test_an_error_of_one_process_is_raised_by_all(tmp_path, shared, failing):
    ended = run(tmp_path, shared, FAILING=str(failing))
    assert [result.code for result in ended] == [7, 7], ended
    assert "no text" in ended[0].err  # process 0 prints for all
