"""The recipes of studies: their points are valid, and finished runs keep their identities."""

import pytest

from qkvjax import sweep
from qkvjax.models.spec import model_spec
from qkvjax.studies.grid import Study

EQUAL_CACHE = (
    "QKV",
    "Q-K=V",
    "GQA-2",
    "MQA",
    "Q-K=V GQA-2",
    "Q-K=V wider",
    "GQA-2 wider",
    "MQA wider",
    "Q-K=V GQA-2 wider",
)
# recipe: (runs, identities of its first ones)
RECIPES = {
    "quickstart": (
        15,
        ("2f56b6e5f7bd", "94e78ab1bbb3", "6d685eee2c00", "c3e0adbb459f", "ee2e92bba8e3"),
    ),
    "studies/equal_cache": (
        72,
        (
            "2f56b6e5f7bd",
            "94e78ab1bbb3",
            "6d685eee2c00",
            "ff9ae624e9fd",
            "2613f283e437",
            "161e96c59886",
            "24a65f55c5d4",
            "a6c2580cd0bd",
            "52fade50f567",
        ),
    ),
    "studies/learning_rate": (
        100,
        ("537b9c9e50c8", "947a8773e744", "94c2f4232e5a", "83aa05af4200", "504422172658"),
    ),
    "studies/rotary_values": (
        70,
        ("2f56b6e5f7bd", "02890fc56dfe", "5907ee1d2c94", "ec8bcd13148a", "cd2282d71f9a"),
    ),
    "studies/tokens": (45, ("adcfd94430c9", "a44b30f92f57", "05fcb3620302")),
    "studies/size": (36, ("135e4bb457b7", "d39037c87d7a", "a81f5bcd2c22")),
    "studies/padding": (30, ("90c3e1fcfea9", "a6fedbdd065b", "7bcad329624d")),
}


@pytest.fixture
def study(recipe, tmp_path):
    """study("size", "seeds=1") of a recipe, in an empty workdir."""
    return lambda name, arg=None: Study(recipe(f"configs/{name}.py", arg), tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_all_points_are_valid_and_runs_keep_their_identities(study, name):
    count, identities = RECIPES[name]
    tasks = study(name).tasks
    assert len(tasks) == count
    assert tuple(task.identity for task in tasks[: len(identities)]) == identities
    known = [task.identity for task in tasks if not task.waits]
    assert len(set(known)) == len(known)


def test_the_quickstart_has_a_control_with_the_same_cache(study):
    made = study("quickstart")
    assert made.labels == ["QKV", "Q-K=V", "GQA-2", "Q=K-V", "Q=K=V"]
    assert made.title == "What is the best use of these bytes of cache?"


def test_every_size_of_cache_and_of_parameters_has_its_rivals(study):
    made = study("studies/equal_cache")
    assert tuple(made.labels) == EQUAL_CACHE
    specs = {
        label: model_spec(config.model, 257, config.data.seq_len)
        for label, config in made.configs().items()
    }
    cache = {label: spec.cache_bytes_per_token() for label, spec in specs.items()}
    assert cache["QKV"] == 2 * cache["Q-K=V"] == 2 * cache["GQA-2"]
    assert cache["QKV"] == 4 * cache["MQA"] == 4 * cache["Q-K=V GQA-2"]
    for label in EQUAL_CACHE[5:]:
        assert cache[label] == cache[label.removesuffix(" wider")]
        assert abs(specs[label].num_params / specs["QKV"].num_params - 1) < 0.01


def test_one_field_alone_varies_where_the_learning_rate_is_tuned(study):
    tasks = study("studies/learning_rate").tasks
    assert {task.config.optimizer.final_learning_rate for task in tasks} == {0.0}
    assert {task.seed for task in tasks[:75]} == {100, 101, 102}
    assert {task.seed for task in tasks[75:]} == {0, 1, 2, 3, 4}


def test_the_tuning_of_small_data_is_the_grid_of_before(recipe, study):
    """Sharings x dropouts x seeds 0, 1 and 2, as an ordinary study."""
    made = study("small_data")
    tuned = made.tasks
    config = recipe("configs/small_data.py")
    config.seed = 0
    config.study.seeds = 3
    dropouts = sweep.axis("model.dropout", config.study.tuned["values"])
    config.study.points = sweep.product(config.study.points, dropouts)
    del config.study["tuned"]
    grid = Study(config, made.workdir).tasks
    assert [task.identity for task in tuned[:60]] == [task.identity for task in grid]
    assert [task.folder for task in tuned[:60]] == [task.folder for task in grid]
    assert [task.label for task in grid[:2]] == ["QKV dropout=0.0", "QKV dropout=0.3"]
    assert [task.seed for task in tuned[60::5]] == [3, 4, 5, 6, 7]


def test_the_same_tokens_for_all_variants(study):
    made = study("studies/tokens")
    budgets = {}
    for task in made.tasks:
        data = task.config.data
        tokens = int(task.config.train.steps.removesuffix(" tokens"))
        budgets.setdefault(task.setting, set()).add(tokens)
        assert tokens // (data.batch_size * data.seq_len) >= 300
    assert budgets == {
        f"{n} token{'s' * (n > 1)} a parameter": {n * 435_968} for n in (1, 3, 10, 30, 100)
    }
    assert list(study("studies/tokens", "largest=3").settings) == list(budgets)[:2]


def test_the_sizes_are_those_of_the_docstring(study):
    made = study("studies/size")
    for task in made.tasks:
        config = task.config
        spec = model_spec(config.model, 257, config.data.seq_len)
        assert spec.layers[0].head_dim == 32
        if task.label == "QKV":
            assert config.train.steps == f"{20 * spec.num_params} tokens"
            whole = spec.cache_bytes_per_token()
        else:
            assert spec.cache_bytes_per_token() * 2 == whole
    assert list(study("studies/size", "largest=0.4M").settings) == ["0.1M", "0.4M"]


def test_rotary_values_of_ties_alone(study):
    made = study("studies/rotary_values")
    assert made.labels[:2] == ["QKV", "QKV, no qk-norm"] and len(made.labels) == 14
    for task in made.tasks[:14]:
        attention = model_spec(task.config.model, 257, 128).layers[0]
        words = attention.rotary_values.replace("_", " ")
        assert ("no qk-norm" in task.label) == (not attention.qk_norm)
        assert task.label.startswith("QKV") or f" {words}" in task.label
