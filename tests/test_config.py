"""The configuration: fields, checks, what is saved."""

import json
import math

import ml_collections
import pytest

from qkvjax import config as configs
from qkvjax.errors import UserError

# ---- fields ---------------------------------------------------------------------------------


def test_fields_are_few_and_explained():
    assert len(configs.FIELDS) <= 70
    for name, field in configs.FIELDS.items():
        assert field.text and "\n" not in field.text and len(field.text) < 100, name
    flat = configs.flatten(configs.to_dict(configs.default()))
    assert {name for name in flat if not name.startswith("evals.")} == configs.FIELDS.keys()


def test_the_default_is_valid_and_fresh():
    one, two = configs.default(), configs.default()
    configs.resolve(one)
    one.model.num_kv_heads, one.train.steps = 2, "2ep"
    assert two.model.num_kv_heads is None and two.train.steps == 1000


def test_saved_and_read_again(tmp_path):
    config = configs.default()
    config.model.layer_overrides = ({"window": 8}, {})
    config.model.num_kv_heads = 2
    config.train.steps = "10M tokens"
    config.evals.second = ml_collections.ConfigDict({"kind": "bits_per_byte", "split": "train"})
    saved = configs.to_dict(config)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = configs.load(tmp_path / "config.json")
    assert configs.to_dict(loaded) == saved
    assert loaded.model.layer_overrides == ({"window": 8}, {})


def test_an_older_file_gets_the_defaults_of_newer_fields(tmp_path):
    values = configs.to_dict(configs.default())
    del values["model"]["qk_norm"], values["mesh"]
    loaded = configs.from_dict(values)
    assert configs.to_dict(loaded) == configs.to_dict(configs.default())


def test_evaluators_are_those_that_were_saved():
    assert list(configs.from_dict({"evals": {}}).evals) == []


NASTY = {
    int: [0, -1, 1, 3, 2**31, 10**30],
    float: [0.0, -1.0, 0.5, 1.0, 1e300, math.nan, math.inf, -math.inf],
    str: ["", "nonsense", "q=k", "\x00", "q-k=v"],
    bool: [True, False],
    tuple: [(), ({},), (1,), ({"window": 0},), ({"sharing": 3},), ({"nonsense": 3},), "text"],
    object: [0, -1, None, "", "5%", "nonsense", 10**30],
}


@pytest.mark.parametrize("name", configs.FIELDS)
def test_no_value_gives_a_traceback(name):
    """Any value of any field passes or is a UserError that can be read."""
    for value in [*NASTY[configs.FIELDS[name].kind], None, "text", 3, 2.5, [1], {"a": 1}]:
        config = configs.default()
        try:
            configs.set_field(config, name, value)
            configs.resolve(config)
        except UserError as error:
            assert len(str(error)) > 15 and "Traceback" not in str(error)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.sharng", "q", "no field 'model.sharng'; did you mean 'model.sharing'"),
        ("modle.sharing", "q", "did you mean 'model.sharing'"),
        ("model.d_model", "wide", "config.model.d_model='wide' is not of type int"),
        ("model.d_model", None, "config.model.d_model cannot be unset"),
        ("model", 3, "config.model=3 is not a group"),
        ("bogus", 3, "no field 'bogus'"),
    ],
)
def test_set_field_refuses(name, value, message):
    with pytest.raises(UserError, match=message):
        configs.set_field(configs.default(), name, value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", -1, "seed=-1 must be at least 0 and below 2147483648"),
        ("seed", 2**31, "below 2147483648"),  # jax would take it for another seed
        ("optimizer.b1", 1.0, "optimizer.b1=1.0 must be at least 0 and below 1"),
        ("optimizer.learning_rate", math.nan, "learning_rate=nan"),
        ("optimizer.learning_rate", 0.0, "trains nothing"),
        ("optimizer.decay", "none", "is not one of matrices, all"),
        ("optimizer.name", "sgd", "is not one of adamw"),
        ("train.compute_dtype", "float16", "did you mean 'bfloat16'"),
        ("train.accumulation", 3, "does not divide data.batch_size=16"),
        ("evals.eval.kind", "f1", "is not one of bits_per_byte"),
        ("evals.eval.max_labels", 0, "must be at least 1"),
        ("evals.eval.splt", "train", "no field 'splt'.*did you mean 'split'"),
        ("model.layer_overrides", ({"num_heads": "x"},), "num_heads='x' is not of type int"),
    ],
)
def test_validate_refuses(name, value, message):
    config = configs.default()
    with config.unlocked():
        configs.set_field(config, name, value)
    with pytest.raises(UserError, match=message):
        configs.resolve(config)


# ---- what fixes a run -----------------------------------------------------------------------


def test_identity_keys():
    flat = configs.identity(configs.resolve(configs.default()))
    groups = {name.split(".")[0] for name in flat}
    assert groups == {"seed", "model", "data", "optimizer", "train"}
    kept = {name for name in flat if name.startswith("train.")}
    dtypes = {"train.compute_dtype", "train.param_dtype"}
    assert kept == {"train.steps", "train.accumulation"} | dtypes
    changed = configs.default()
    changed.train.gradient_dtype = "bfloat16"
    assert configs.differing(flat, configs.identity(configs.resolve(changed))) == [
        "train.gradient_dtype: None -> 'bfloat16'"
    ]


def test_differing_lines():
    assert configs.differing({"a": 1, "b": "x"}, {"b": "y", "a": 1, "c": None}) == ["b: 'x' -> 'y'"]
    assert configs.differing({"a": 1}, {}) == ["a: 1 -> None"]


@pytest.mark.parametrize(
    ("schedule", "old", "new", "allowed"),
    [
        ("wsd", 10, 20, True),
        ("constant", 10, 20, True),
        ("cosine", 10, 20, False),
        ("wsd", 20, 10, False),
        ("constant", "1ep", "2ep", False),
        ("cosine", 10, 10, True),
    ],
)
def test_steps_may_grow_under_schedules_that_do_not_know_the_end(
    tmp_path, schedule, old, new, allowed
):
    from qkvjax.files import write_json
    from qkvjax.training.identity import check_workdir

    config = configs.default()
    config.optimizer.schedule, config.train.steps = schedule, old
    check_workdir(tmp_path, config, "digest")
    write_json(tmp_path / "config.json", configs.to_dict(config))
    config.train.steps = new
    if allowed:
        check_workdir(tmp_path, config, "digest")
    else:
        with pytest.raises(UserError, match=f"train.steps: {old!r} -> {new!r}"):
            check_workdir(tmp_path, config, "digest")


# ---- recipes --------------------------------------------------------------------------------


def test_items_split_at_the_first_equals_sign():
    found = configs.parse_arg("size=124m,sharing=q-k=v", size=None, sharing="q-k-v", depth=2)
    assert found.to_dict() == {"size": "124m", "sharing": "q-k=v", "depth": 2}
    assert configs.parse_arg(None, depth=2).depth == 2
    assert configs.parse_arg("", rate=0.5).rate == 0.5
    assert configs.parse_arg("rate=1e-3,depth=4", rate=0.5, depth=2).to_dict() == {
        "rate": 1e-3,
        "depth": 4,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise=3", "no argument 'sise'.*NAME=VALUE with one of size, depth; did you mean 'size'"),
        ("size", "no argument 'size'"),
        ("=3", "no argument ''"),
        ("depth=x", "depth='x' is not of type int"),
    ],
)
def test_bad_recipe_arguments(text, message):
    with pytest.raises(UserError, match=message):
        configs.parse_arg(text, size=None, depth=2)


@pytest.mark.parametrize(
    "arg",
    [
        "",
        "depth=2",
        "size=30m",
        "size=124m,sharing=q=k=v",
        "size=300m,recipe=paper",
        "size=1.2b,num_kv_heads=4",
        "size=7b",
        "size=70b,sharing=q-k=v",
    ],
)
def test_recipes_are_valid(recipe, arg):
    configs.resolve(recipe("configs/lm.py", arg))


def test_the_quickstart_is_a_valid_study(recipe):
    config = recipe("configs/quickstart.py", "seeds=2,depth=1,steps=5")
    configs.resolve(config)
    assert len(config.study.points) == 5 and config.study.seeds == 2


@pytest.mark.parametrize(
    ("arg", "source", "length", "epochs", "settings", "reference"),
    [
        (None, "digits", 17, "20ep", 4, False),
        ("dataset=mnist", "tfds:mnist", 50, "20ep", 4, True),
        ("dataset=fashion_mnist,source=idx:x", "idx:x", 50, "20ep", 4, False),
        ("dataset=cifar100,epochs=2,width=64", "tfds:cifar100", 65, "2ep", 2, True),
        ("dataset=tiny_imagenet", "tfds:tiny_imagenet", 257, "20ep", 1, True),
        ("source=npz:x,size=14,patch=7", "npz:x", 5, "20ep", 4, False),
    ],
)
def test_data_sets_of_the_vision_study(recipe, arg, source, length, epochs, settings, reference):
    config = recipe("configs/paper/vision.py", arg)
    configs.resolve(config)
    assert (config.data.source, config.data.seq_len) == (source, length)
    assert config.train.steps == epochs and len(config.study.settings) == settings
    assert config.data.augment == ("crop_flip" if "cifar" in source else "none")
    assert bool(config.study.reference) == reference
    if reference:
        names = {setting["label"] for setting in config.study.settings}
        assert names <= set(configs.plain(config.study.reference)["values"])


def test_a_data_set_that_the_paper_does_not_have(recipe):
    with pytest.raises(UserError, match="dataset='minst' is none of mnist.*did you mean 'mnist'"):
        recipe("configs/paper/vision.py", "dataset=minst")


@pytest.mark.parametrize("path", ["configs/lm.py", "configs/paper/lm.py"])
def test_recipes_with_a_size_use_all_devices(recipe, path):
    import jax

    from qkvjax.parallel.mesh import idle_devices, make_mesh

    config = recipe(path, "size=300m")
    config = configs.resolve(config)
    assert idle_devices(config.mesh.sizes, 8) is None
    mesh = make_mesh(config.mesh.sizes, jax.devices()[:1])
    assert mesh.size == 1
    one = configs.changed(config, mesh={"fsdp": 1})
    assert configs.identity(one) == configs.identity(config)
    assert recipe("configs/lm.py", "depth=2").mesh.fsdp == 1
