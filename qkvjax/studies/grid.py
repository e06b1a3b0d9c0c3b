"""The runs of a study as numbered tasks, and which of them are finished."""

from __future__ import annotations

import functools
from pathlib import Path

from qkvjax import config as configs
from qkvjax import sweep
from qkvjax.data.dataset_like import dataset_record
from qkvjax.errors import UserError
from qkvjax.fields import Config
from qkvjax.files import read_json, read_lines, require_keys, write_json
from qkvjax.studies.points import read_points
from qkvjax.studies.task import Part, Task, make_task
from qkvjax.studies.tuning import COMPARE, TUNE, read_tuning
from qkvjax.training.identity import LOCATIONS

MOST_SEEDS = 10_000


class Study:
    """A grid of runs in one workdir.

    Args:
      config: base configuration with a `study` group.
      workdir: folder of the study; each run has a workdir below it.

    Raises:
      UserError: the grid is missing, two points have the same label, or a point is not a valid
        configuration.
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
                f"study.seeds={seeds!r} must be at least 1 and at most {MOST_SEEDS:,}: it is the"
                " number of seeds"
            )
        self.seeds = [config.seed + i for i in range(seeds)]
        self.base = {k: v for k, v in configs.to_dict(config).items() if k != "study"}
        if config.train.max_seconds is not None:
            raise UserError(
                "train.max_seconds would give slower variants fewer steps: unset it, and use the"
                " study's own --max_seconds"
            )
        self.locations = self._locations()
        self.points, self.labels = read_points("points", options["points"])
        # Every point is trained in every setting, and compared with the baseline there.
        settings, names = read_points("settings", options.get("settings") or [{}])
        self.settings = dict(zip(names, settings)) if len(settings) > 1 else {"": settings[0]}
        self.setting = names[0] if len(settings) == 1 and settings[0] else None
        self.reference = options.get("reference")
        grids = [*self.points, *self.settings.values()]
        self.tuning = read_tuning(options.get("tuned"), self.seeds, grids)
        self._parts = self._all_parts()
        self._made: dict[tuple, Task] = {}
        self._check_parts()

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self._parts)

    def task(self, number: int) -> Task:
        """Returns task `number` without building the others, as the process of one run needs it."""
        part = self._parts[number]
        if part.phase == COMPARE:
            return self._compared(number, self.chosen([(part.label, part.setting)]))
        return self._make(number, part)

    @property
    def tasks(self) -> list[Task]:
        """All tasks; those whose tuning runs are finished already have the chosen value."""
        chosen = self.chosen() if self.tuning else {}
        return [
            self._compared(number, chosen) if part.phase == COMPARE else self._make(number, part)
            for number, part in enumerate(self._parts)
        ]

    def _all_parts(self) -> list[Part]:
        """Returns what each task number stands for.

        Seed by seed: a study that is stopped early has every variant for its first seeds.
        """
        phases = [("", self.seeds, [None])]
        if self.tuning:
            phases = [
                (TUNE, self.tuning.seeds, self.tuning.values),
                (COMPARE, self.seeds, [None]),
            ]
        return [
            Part(
                phase,
                label,
                sweep.in_setting(point, name or self.setting or ""),
                name,
                setting,
                seed,
                value,
            )
            for phase, seeds, values in phases
            for name, setting in self.settings.items()
            for seed in seeds
            for label, point in zip(self.labels, self.points)
            for value in values
        ]

    def _check_parts(self) -> None:
        """Raises UserError where a point or a setting is not a valid configuration.

        Builds each point once and the baseline in each setting, not every combination.
        """
        first_setting = next(iter(self.settings))
        first_seeds = {self.seeds[0], *(self.tuning.seeds[:1] if self.tuning else ())}
        for number, part in enumerate(self._parts):
            sample = part.setting == first_setting or part.label == self.labels[0]
            if sample and part.seed in first_seeds:
                self._make(number, part)

    def chosen(self, groups: list[tuple[str, str]] | None = None) -> dict[tuple[str, str], object]:
        """Returns {(label, setting): best value} for groups whose tuning runs are all finished.

        Args:
          groups: pairs (label, setting) to look at; None means all.
        """
        if groups is None:
            groups = [(label, setting) for setting in self.settings for label in self.labels]
        runs = {group: self.tuning_runs(*group) for group in groups}
        done = self.done([task for tasks in runs.values() for task in tasks])
        best = {}
        for group, tasks in runs.items():
            if all(task.identity in done for task in tasks):
                scores: dict = {}
                for task in tasks:
                    scores.setdefault(task.value, []).append(done[task.identity]["score"])
                best[group] = self.tuning.best(scores)
        return best

    def tuning_runs(self, label: str, setting: str) -> list[Task]:
        """Returns the tuning runs that decide the value of one point in one setting."""
        return [
            self._make(number, part)
            for number, part in enumerate(self._parts)
            if part.phase == TUNE and (part.label, part.setting) == (label, setting)
        ]

    def _compared(self, number: int, chosen: dict[tuple[str, str], object]) -> Task:
        """Returns a task of phase "compare"; it waits if its value is not in `chosen` yet."""
        part = self._parts[number]
        return self._make(number, part._replace(value=chosen.get((part.label, part.setting))))

    def _make(self, number: int, part: Part) -> Task:
        """Returns the task of a part, from a cache after the first call."""
        key = (number, part.value)
        if key not in self._made:
            field = self.tuning.field if self.tuning else ""
            self._made[key] = make_task(number, part, self.base, self.locations, field)
        return self._made[key]

    def _locations(self) -> dict[str, str]:
        """Returns the fields that locate the data, as the first runs of this workdir wrote them.

        Paths enter the identity of a run as text. If the same data are now at another path, the old
        path keeps the identities of finished runs valid. Whether the data really are the same is
        checked by digest (`done`, `claim`).
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
        """Name of the metric that compares variants, from the evaluator `eval`; lower is better.

        Raises:
          UserError: config.evals has no `eval`.
        """
        if "eval" not in self.base["evals"]:
            raise UserError("the study needs an evaluator called `eval`: see config.evals")
        kind = self.base["evals"]["eval"].get("kind", "bits_per_byte")
        return {"bits_per_byte": "bits_per_byte", "accuracy": "error"}[kind]

    def configs(self) -> dict[str, object]:
        """Returns {label: config} of the first seed in the first setting, the baseline first."""
        first = next(n for n, part in enumerate(self._parts) if part.phase != TUNE)
        return {
            label: self._make(first + i, self._parts[first + i]).config
            for i, label in enumerate(self.labels)
        }

    def _base_config(self) -> Config:
        """Returns the resolved configuration that all points change."""
        return configs.resolve(configs.from_dict(self.base))

    @functools.cached_property
    def dataset(self):
        """The data set of the base config, prepared here once before the runs need it."""
        from qkvjax.data.open import open_dataset

        return open_dataset(self._base_config(), log=print)

    def digest(self, task: Task) -> str | None:
        """Returns the digest of a task's data, None if the data cannot be prepared.

        In the second case the run itself reports the error.
        """
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
        """Returns the lines of results.jsonl: one per attempt of a run."""
        return read_lines(self.results, status=str, identity=str, data_digest=str)

    def done(self, tasks: list[Task] | None = None) -> dict[str, dict]:
        """Returns {identity: line of results.jsonl} of finished runs whose data are unchanged.

        Args:
          tasks: which tasks to look at; None means all.
        """
        tasks = self.tasks if tasks is None else tasks
        by_identity = {task.identity: task for task in tasks}
        finished = [line for line in self.lines() if line["status"] == "done"]
        return {
            line["identity"]: line
            for line in finished
            if line["identity"] in by_identity
            and line["data_digest"] == self.digest(by_identity[line["identity"]])
        }

    def pending(self) -> list[Task]:
        """Returns the tasks that are not finished."""
        tasks = self.tasks
        done = self.done(tasks)
        return [task for task in tasks if task.identity not in done]

    def _environment(self) -> dict:
        """Returns the device and versions from run.json of the first run that has them."""
        for line in self.lines():
            run = read_json(self.workdir / str(line.get("workdir")) / "run.json")
            if run.get("environment"):
                return run["environment"]
        return {}

    def listing(self) -> str:
        """Returns a table, one line per task: number, state, seed, identity, label, folder.

        The lines of a tuned study name the phase too.
        """
        tasks = self.tasks
        done = self.done(tasks)
        failed = {line["identity"] for line in self.lines() if line["status"] == "failed"}
        width = max(len(task.name) for task in tasks)
        phases = {"": "", TUNE: f"{TUNE:7s}  ", COMPARE: f"{COMPARE}  "}
        head = f"{'phase':7s}  " if self.tuning else ""
        lines = [f"point  {head}state    seed  identity      {'label':<{width}}  folder"]
        for task in tasks:
            state = "failed" if task.identity in failed else "-"
            state = "done" if task.identity in done else state
            state = "waits" if task.waits else state
            lines.append(
                f"{task.number:5d}  {phases[task.phase]}{state:7s}  {task.seed:4d}"
                f"  {task.identity or '-':12s}  {task.name:<{width}}"
                f"  {'-' if task.waits else task.folder}"
            )
        return "\n".join(lines)

    def remarks(self) -> list[str]:
        """Returns one sentence for each best value that lies at the edge of the tried values."""
        if not self.tuning:
            return []
        remarks = [self.tuning.remark(*group, value) for group, value in self.chosen().items()]
        return [remark for remark in remarks if remark]

    def _tuned(self) -> dict:
        """Returns the entry of study.json about tuning, {} for a study that tunes nothing."""
        if not self.tuning:
            return {}
        chosen = [
            {"label": label, "setting": setting, "value": value}
            for (label, setting), value in self.chosen().items()
        ]
        return {"tuned": {**self.tuning._asdict(), "chosen": chosen}}

    def _check_base(self, path: Path, old: dict) -> None:
        """Raises UserError if the workdir has results of another base configuration or data.

        Args:
          path: of study.json.
          old: its content.
        """
        require_keys(str(path), old, config=dict, data=dict, command=str)
        require_keys(f"{path}: data", old["data"], digest=str)
        before = configs.identity(configs.resolve(configs.from_dict(old["config"])))
        after = configs.identity(self._base_config())
        same_data = old["data"]["digest"] == self.dataset.digest
        if same_data:
            before |= {name: after[name] for name in LOCATIONS}
        if self.tuning:
            # An untuned study may have trained the tuning runs here, from another base seed.
            before |= {"seed": after["seed"]}
        differences = configs.differing(before, after)
        if not same_data:
            differences.append(f"data: {old['data']['digest'][:12]} -> {self.dataset.digest[:12]}")
        if differences and self.lines():
            raise UserError(
                f"{self.workdir} has runs of a study with another base; choose another"
                " --workdir, delete this one, or continue with its values:\n  "
                + "\n  ".join(differences)
            )

    def claim(self, command: str, keep_command: bool = False) -> None:
        """Writes study.json, which the report reads.

        Args:
          command: the command line, so that readers of the report can repeat it.
          keep_command: keep the command that study.json has already.

        Raises:
          UserError: the workdir has results of a study with another base configuration or with
            other data.
        """
        path = self.workdir / "study.json"
        old = read_json(path)
        if old:
            self._check_base(path, old)
        measured = read_json(self.workdir / "measurements.json")
        points = [
            {"label": label, **sweep.overrides_of(point)}
            for label, point in zip(self.labels, self.points)
        ]
        environment = measured.get("environment") or old.get("environment") or self._environment()
        data = dataset_record(self.dataset)
        write_json(
            path,
            {
                "title": self.title,
                "baseline": self.labels[0],
                "points": points,
                "settings": [name for name in self.settings if name],
                "setting": self.setting,
                "reference": self.reference,
                "seeds": self.seeds,
                **self._tuned(),
                "config": self.base,
                "locations": self.locations,
                "command": old["command"] if old and keep_command else command,
                "environment": environment,
                "data": {"source": self.base["data"]["source"]} | data,
            },
        )
