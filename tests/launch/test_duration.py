"""The duration of the quickstart in the docs is the measured one."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = {"four": 4, "five": 5, "six": 6, "seven": 7}
PATTERNS = {
    "README.md": r"prints where the report is: about (\w+)\s+minutes",
    "launch/quickstart.sh": r"about (\w+) minutes on 2 CPU cores, installation included",
    "configs/quickstart.py": r"About (\w+)\s+minutes on two CPU cores, installation included",
}


def test_every_file_gives_the_measured_minutes():
    lines = (ROOT / "benchmarks/results/quickstart.jsonl").read_text().splitlines()
    minutes = json.loads(lines[-1])["seconds"] / 60
    assert minutes < 6
    for name, pattern in PATTERNS.items():
        match = re.search(pattern, (ROOT / name).read_text())
        assert match, name
        number = WORDS.get(match[1]) or int(match[1])
        assert abs(number - minutes) <= 0.5, name
