"""How long the quickstart takes is said once, and is what was measured."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = {"four": 4, "five": 5, "six": 6, "seven": 7}
SAID = {
    "README.md": r"prints where the report is: about (\w+)\s+minutes",
    "launch/quickstart.sh": r"about (\w+) minutes on 2 CPU cores, installation included",
    "configs/quickstart.py": r"About (\w+)\s+minutes on two CPU cores, installation included",
}


def test_every_place_says_the_measured_minutes():
    lines = (ROOT / "benchmarks/results/quickstart.jsonl").read_text().splitlines()
    minutes = json.loads(lines[-1])["seconds"] / 60
    assert minutes < 6
    for name, pattern in SAID.items():
        said = re.search(pattern, (ROOT / name).read_text())
        assert said, name
        number = WORDS.get(said[1]) or int(said[1])
        assert abs(number - minutes) <= 0.5, name
