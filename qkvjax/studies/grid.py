"""The tasks of a study, and what of them is done."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from qkvjax import config as configs
from qkvjax import sweep
from qkvjax.attention.spec import canonical_sharing
from qkvjax.errors import UserError
from qkvjax.models.spec import model_spec
from qkvjax.training.metrics import read_json, read_lines, require_keys, write_json
from qkvjax.training.workdir import LOCATIONS

MOST_SEEDS = 10_000


class Task(NamedTuple):
    """One run: a point of the grid in one setting with one seed.

    Attributes:
      number: what --point takes.
      label: the variant's name.
      setting: the setting's name; "" where there is only one.
      overrides: the fields that differ from the base, the setting's first.
      seed: replaces `config.seed`.
      config: the resolved configuration.
      identity: hash of the label and of the fields that fix the run and are not at their
        default. Two labels may stand for the same run: what both measure is the noise between
        equals.
    """

    number: int
    label: str
    setting: str
    overrides: dict
    seed: int
    config: object
    identity: str

    @property
    def folder(self) -> str:
        """The run's workdir, relative to the study's."""
        name = sweep.slug(f"{self.label} {self.setting}")
        return f"runs/{name}-s{self.seed}-{self.identity[:8]}"

    @property
    def work(self) -> float:
        """How long a run should take, in multiply-adds of its model's blocks: what runs of one
        study compare by. A duration that is no number of steps counts as one step.
        """
        c = self.config
        spec = model_spec(configs.plain(c.model), 256, c.data.seq_len)
        steps = c.train.steps if isinstance(c.train.steps, int) else 1
        return steps * c.data.batch_size * spec.forward_macs(c.data.seq_len)


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
        self.locations = self._locations()
        self.points, self.labels = _grid("points", options["points"])
        # Every point is trained in every setting, and compared with the baseline there.
        settings, names = _grid("settings", options.get("settings") or [{}])
        self.settings = dict(zip(names, settings)) if len(settings) > 1 else {"": settings[0]}
        self.setting = names[0] if len(settings) == 1 and settings[0] else None
        self.reference = options.get("reference")
        # Seed by seed, so that a study cut short has whole rows.
        self._parts = [
            (label, point, name, setting, seed)
            for name, setting in self.settings.items()
            for seed in self.seeds
            for label, point in zip(self.labels, self.points)
        ]
        first = range(len(self.points))
        for number in (*first, *range(0, len(self), len(self.seeds) * len(first))):
            self.task(number)

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self._parts)

    def task(self, number: int) -> Task:
        """Task `number`, which a run of its own makes without the others."""
        return self._task(number, *self._parts[number])

    @functools.cached_property
    def tasks(self) -> list[Task]:
        """All of them."""
        return [self.task(number) for number in range(len(self))]

    def _task(
        self, number: int, label: str, point: dict, setting: str, fields: dict, seed: int
    ) -> Task:
        twice = (fields.keys() & point.keys()) - {"label"}
        if twice:
            raise UserError(f"{sorted(twice)[0]} stands in a point and in a setting of the grid")
        both = {**fields, **point}
        overrides = {field: value for field, value in both.items() if field != "label"}
        config = configs.from_dict(self.base)
        try:
            for name, value in overrides.items():
                if name in config or name.count(".") == 0:
                    near = configs.near_field(name)
                    raise UserError(
                        f"{name!r} is not a field: write one such as 'model.sharing'{near}"
                    )
                configs.set_field(config, name, value)
            config.seed = seed
            configs.validate(config)
        except (UserError, TypeError, AttributeError) as error:
            told = f"the grid's point {label!r} is no legal configuration: {error}"
            raise UserError(told) from None
        # Fields at their default are left out: one that is added later leaves old runs what they
        # are. A base whose default has changed is told by `claim`, which compares all of them.
        fixed = configs.identity(config)
        for name in self.locations.keys() - overrides.keys():
            fixed[name] = self.locations[name]
        given = {name: value for name, value in fixed.items() if value != _defaults().get(name)}
        identity = sweep.identity_hash(given | {"label": label})
        return Task(number, label, setting, overrides, seed, config, identity)

    def _locations(self) -> dict[str, str]:
        """Where the data lie, as the first runs of this workdir wrote it.

        Paths enter the identity of a run as text. The same data by another path stay the same
        study: its runs keep their identities, and their results say by digest which data they had.
        """
        flat = configs.flatten(self.base)
        new = {name: flat[name] for name in LOCATIONS}
        path = self.workdir / "study.json"
        old = read_json(path)
        if not old or not self.lines():
            return new
        require_keys(str(path), old, config=dict)
        old_flat = configs.flatten(old["config"])
        return {name: old_flat.get(name, new[name]) for name in LOCATIONS} | {
            name: value for name, value in (old.get("locations") or {}).items() if name in new
        }

    @property
    def metric(self) -> str:
        """What variants are compared by: the evaluator called `eval` says; lower is better.

        Raises:
          UserError: there is none.
        """
        if "eval" not in self.base["evals"]:
            raise UserError("the study needs an evaluator called `eval`: see config.evals")
        kind = self.base["evals"]["eval"].get("kind", "bits_per_byte")
        return {"bits_per_byte": "bits_per_byte", "accuracy": "error"}[kind]

    def configs(self) -> dict[str, object]:
        """The first seed's config of each point in the first setting, by label; the baseline
        first."""
        return {label: self.task(i).config for i, label in enumerate(self.labels)}

    @functools.cached_property
    def dataset(self):
        """The base's data set, prepared once before any process needs it."""
        from qkvjax.data.open import open_dataset

        return open_dataset(configs.from_dict(self.base), log=print)

    def digest(self, task: Task) -> str | None:
        """The digest of a task's data; None when it cannot be prepared, which its run will tell."""
        data_fields = ("data.", "model.kind", "model.patch_size")
        if not any(name.startswith(data_fields) for name in task.overrides):
            return self.dataset.digest
        from qkvjax.data.open import open_dataset

        config = task.config
        key = (config.model.kind, config.model.patch_size, *configs.plain(config.data).values())
        if key not in self._digests:
            try:
                self._digests[key] = open_dataset(config).digest
            except UserError:
                self._digests[key] = None
        return self._digests[key]

    @property
    def results(self) -> Path:
        return self.workdir / "results.jsonl"

    def lines(self) -> list[dict]:
        """The lines of results.jsonl, each with what identifies its run."""
        return read_lines(self.results, status=str, identity=str, data_digest=str)

    def done(self, tasks: list[Task] | None = None) -> dict[str, dict]:
        """Identity -> the line of each finished run, of `tasks` or of all, on its data as they
        are now."""
        tasks = self.tasks if tasks is None else tasks
        digests = {task.identity: self.digest(task) for task in tasks}
        return {
            line["identity"]: line
            for line in self.lines()
            if line["status"] == "done" and line["data_digest"] == digests.get(line["identity"])
        }

    def pending(self) -> list[Task]:
        """Tasks that are not finished."""
        done = self.done()
        return [task for task in self.tasks if task.identity not in done]

    def _environment(self) -> dict:
        """Where the first run that ended was trained, as it told itself."""
        for line in self.lines():
            facts = read_json(self.workdir / str(line.get("workdir")) / "run.json")
            if facts.get("environment"):
                return facts["environment"]
        return {}

    def listing(self) -> str:
        """A line a task: number, state, seed, identity, label, folder."""
        done = self.done()
        failed = {line["identity"] for line in self.lines() if line["status"] == "failed"}
        width = max(len(label) for label in self.labels)
        lines = [f"point  state    seed  identity      {'label':<{width}}  folder"]
        for task in self.tasks:
            state = "failed" if task.identity in failed else "-"
            state = "done" if task.identity in done else state
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
            both = map(configs.from_dict, (old["config"], self.base))
            before, after = map(configs.identity, both)
            if old["data"]["digest"] == self.dataset.digest:
                before |= {name: after[name] for name in LOCATIONS}
            lines = configs.differing(before, after)
            if old["data"]["digest"] != self.dataset.digest:
                lines.append(f"data: {old['data']['digest'][:12]} -> {self.dataset.digest[:12]}")
            if lines and self.lines():
                raise UserError(
                    f"{self.workdir} holds runs of a study with another base; choose another"
                    " --workdir, delete this one, or go on with its own values:\n  "
                    + "\n  ".join(lines)
                )
        measured = read_json(self.workdir / "measurements.json")
        points = [
            {"label": label, "overrides": {k: v for k, v in point.items() if k != "label"}}
            for label, point in zip(self.labels, self.points)
        ]
        environment = measured.get("environment") or old.get("environment") or self._environment()
        counts = ("num_documents", "num_train_tokens", "num_validation_tokens")
        data = {name: getattr(self.dataset, name) for name in ("description", "digest", *counts)}
        write_json(path, {
            "title": self.title, "baseline": self.labels[0], "points": points,
            "settings": [name for name in self.settings if name], "setting": self.setting,
            "reference": self.reference,
            "seeds": self.seeds, "config": self.base, "locations": self.locations,
            "command": old["command"] if old and keep_command else command,
            "environment": environment, "data": {"source": self.base["data"]["source"]} | data,
        })  # fmt: skip


@functools.cache
def _defaults() -> dict:
    return configs.identity(configs.default())


def _grid(name: str, points) -> tuple[list[dict], list[str]]:
    """The points of a grid of the config, checked, and their labels."""
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise UserError(
            f"study.{name}={points!r} is no grid: make it with qkvjax.sweep, one dict a point"
        )
    for point in points:
        if not all(isinstance(text, str) for text in (*point, point.get("label", ""))):
            raise UserError(f"the grid's point {point!r}: fields and label are texts")
    if any("seed" in point for point in points):
        raise UserError("a point of the grid sets `seed`: study.seeds says how many there are")
    points = [
        {field: canonical_sharing(value) if field == "model.sharing" else value
         for field, value in point.items()}
        for point in points
    ]  # fmt: skip
    labels = [sweep.label(point) for point in points]
    twins = {label for label in labels if labels.count(label) > 1}
    if twins:
        raise UserError(f"two points of the grid are called {sorted(twins)[0]!r}: give labels")
    return points, labels
