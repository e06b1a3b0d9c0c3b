"""The tasks of a study, and what of them is done."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from qkvjax import config as configs
from qkvjax import sweep
from qkvjax.errors import UserError
from qkvjax.training.metrics import read_json, read_lines, require_keys, write_json

MOST_SEEDS = 10_000


@dataclasses.dataclass(frozen=True)
class Task:
    """One run: a point of the grid with one seed.

    Attributes:
      number: what --point takes.
      label: the variant's name.
      overrides: the fields that differ from the base.
      seed: replaces `config.seed`.
      config: the resolved configuration.
      identity: hash of the label and of the fields that fix the run. Two labels may stand for
        the same run: what both measure is the noise between equals.
    """

    number: int
    label: str
    overrides: dict
    seed: int
    config: object
    identity: str

    @property
    def folder(self) -> str:
        """The run's workdir, relative to the study's."""
        return f"runs/{sweep.slug(self.label)}-s{self.seed}-{self.identity[:8]}"


class Study:
    """A grid of runs in one workdir.

    Args:
      config: base configuration with a `study` group.
      workdir: of the study.

    Raises:
      UserError: no grid, twins in it, or a point that is no legal configuration.
    """

    def __init__(self, config, workdir: Path):
        self.workdir = workdir
        options = configs.plain(config.get("study", {}))
        if not options.get("points"):
            raise UserError(
                "the config has no grid: its group `study` needs points (see qkvjax.sweep), as in"
                " configs/quickstart.py"
            )
        self._digests: dict[tuple, str | None] = {}
        self.title = options.get("title", "A study")
        self.prompt = options.get("prompt", "")
        seeds = options.get("seeds", 3)
        if not isinstance(seeds, int) or not 1 <= seeds <= MOST_SEEDS:
            raise UserError(
                f"study.seeds={seeds!r} must be at least 1 and at most {MOST_SEEDS:,}: it counts"
                " seeds"
            )
        self.seeds = [config.seed + i for i in range(seeds)]
        self.base = {k: v for k, v in configs.to_dict(config).items() if k != "study"}
        if config.train.max_seconds is not None:
            raise UserError(
                "train.max_seconds would give slower variants fewer steps: unset it, and use the"
                " study's own --max_seconds"
            )
        points = options["points"]
        if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
            raise UserError(
                f"study.points={points!r} is no grid: make it with qkvjax.sweep, one dict a point"
            )
        for point in points:
            if not all(isinstance(name, str) for name in point) or not isinstance(
                point.get("label", ""), str
            ):
                raise UserError(f"the grid's point {point!r}: fields and label are texts")
        if any("seed" in point for point in points):
            raise UserError("a point of the grid sets `seed`: study.seeds says how many there are")
        self.points = points
        self.labels = [sweep.label(point) for point in self.points]
        twins = {label for label in self.labels if self.labels.count(label) > 1}
        if twins:
            raise UserError(f"two points of the grid are called {sorted(twins)[0]!r}: give labels")
        # Seed by seed, so that a study cut short has whole rows.
        self.tasks = [
            self._task(number, label, point, seed)
            for number, (seed, (label, point)) in enumerate(
                (seed, pair) for seed in self.seeds for pair in zip(self.labels, self.points)
            )
        ]

    def _task(self, number: int, label: str, point: dict, seed: int) -> Task:
        overrides = {name: value for name, value in point.items() if name != "label"}
        config = configs.from_dict(self.base)
        try:
            for name, value in overrides.items():
                if name in config or name.count(".") == 0:
                    raise UserError(f"{name!r} is no field: write one such as 'model.sharing'")
                configs.set_field(config, name, value)
            config.seed = seed
            configs.validate(config)
        except (UserError, TypeError, AttributeError) as error:
            raise UserError(
                f"the grid's point {label!r} is no legal configuration: {error}"
            ) from None
        identity = sweep.identity_hash(configs.identity(config) | {"label": label})
        return Task(number, label, overrides, seed, config, identity)

    def configs(self) -> dict[str, object]:
        """The first seed's config of each point, by label; the baseline first."""
        return {task.label: task.config for task in self.tasks if task.seed == self.seeds[0]}

    @functools.cached_property
    def dataset(self):
        """The base's data set, prepared once before any process needs it."""
        from qkvjax.data.dataset import prepare

        data = configs.from_dict(self.base).data
        return prepare(data.source, data.tokenizer, data.seq_len, data.score_pads, log=print)

    def digest(self, task: Task) -> str | None:
        """The digest of a task's data; None when it cannot be prepared, which its run will tell."""
        if not any(name.startswith("data.") for name in task.overrides):
            return self.dataset.digest
        from qkvjax.data.dataset import prepare

        data = task.config.data
        key = (data.source, data.tokenizer, data.seq_len, data.score_pads)
        if key not in self._digests:
            try:
                self._digests[key] = prepare(*key).digest
            except UserError:
                self._digests[key] = None
        return self._digests[key]

    @property
    def results(self) -> Path:
        return self.workdir / "results.jsonl"

    def lines(self) -> list[dict]:
        """The lines of results.jsonl, each with what identifies its run."""
        return read_lines(self.results, status=str, identity=str, data_digest=str)

    def done(self) -> dict[str, dict]:
        """Identity -> the line of each finished run on its data as they are now."""
        digests = {task.identity: self.digest(task) for task in self.tasks}
        return {
            line["identity"]: line
            for line in self.lines()
            if line["status"] == "done" and line["data_digest"] == digests.get(line["identity"])
        }

    def pending(self) -> list[Task]:
        """Tasks that are not finished."""
        done = self.done()
        return [task for task in self.tasks if task.identity not in done]

    def listing(self) -> str:
        """A line a task: number, state, seed, identity, label, folder."""
        done = self.done()
        failed = {line["identity"] for line in self.lines() if line["status"] == "failed"}
        width = max(len(label) for label in self.labels)
        lines = [f"point  state    seed  identity      {'label':<{width}}  folder"]
        for task in self.tasks:
            state = (
                "done" if task.identity in done else "failed" if task.identity in failed else "-"
            )
            lines.append(
                f"{task.number:5d}  {state:7s}  {task.seed:4d}  {task.identity}"
                f"  {task.label:<{width}}  {task.folder}"
            )
        return "\n".join(lines)

    def claim(self, command: str, keep_command: bool = False) -> None:
        """Refuses a workdir of another study, then writes study.json for the report.

        Args:
          command: what was typed, for those who want to repeat it.
          keep_command: leave the command that is there.
        """
        path = self.workdir / "study.json"
        old = read_json(path)
        if old:
            require_keys(str(path), old, config=dict, data=dict, command=str)
            require_keys(f"{path}: data", old["data"], digest=str)
            before, now = (
                configs.identity(configs.from_dict(values)) for values in (old["config"], self.base)
            )
            lines = configs.differing(before, now)
            if old["data"]["digest"] != self.dataset.digest:
                lines.append(f"data: {old['data']['digest'][:12]} -> {self.dataset.digest[:12]}")
            if lines and self.lines():
                raise UserError(
                    f"{self.workdir} holds runs of a study with another base; choose another"
                    " --workdir, delete this one, or go on with its own values:\n  "
                    + "\n  ".join(lines)
                )
        measured = read_json(self.workdir / "measurements.json")
        dataset = self.dataset
        record = {
            "title": self.title,
            "baseline": self.labels[0],
            "points": [
                {"label": label, "overrides": {k: v for k, v in point.items() if k != "label"}}
                for label, point in zip(self.labels, self.points)
            ],
            "seeds": self.seeds,
            "config": self.base,
            "command": old["command"] if old and keep_command else command,
            "environment": measured.get("environment") or old.get("environment") or {},
            "data": {
                "source": self.base["data"]["source"],
                "description": dataset.description,
                "digest": dataset.digest,
                "num_documents": dataset.num_documents,
                "num_train_tokens": dataset.num_train_tokens,
                "num_validation_tokens": dataset.num_validation_tokens,
            },
        }
        write_json(path, record)
