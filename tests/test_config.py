"""Configs are typed and complete; every mistake is one line with file, key and nearest key."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import yaml

from scaling_jax import config as configs
from scaling_jax.config import ModelConfig, RunConfig, TestbedConfig
from scaling_jax.data.catalog import SourceConfig
from scaling_jax.errors import UserError
from scaling_jax.evaluation.tasks import TasksConfig
from scaling_jax.models import counting
from scaling_jax.testbeds import grid

RUN = """
model: {width: 32, layers: 1, heads: 2, vocabulary_size: 264, sequence_length: 64}
data: {dataset: python_code, validation: [python_code]}
batch_size: 8
token_multiplier: 20
"""
PACKAGED = Path(configs.__file__).parents[1] / "configs"


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def test_overrides_reach_nested_keys(run_file):
    config = configs.load(RunConfig, run_file, ["model.width=64", "optimizer.learning_rate=1e-3"])
    assert config.model.width == 64
    assert config.optimizer.learning_rate == 1e-3


def test_the_written_config_is_complete_and_reads_back_the_same(run_file, tmp_path):
    config = configs.load(RunConfig, run_file)
    configs.write(config, tmp_path / "resolved.yaml")
    assert configs.load(RunConfig, tmp_path / "resolved.yaml") == config
    content = yaml.safe_load((tmp_path / "resolved.yaml").read_text())
    assert content["optimizer"]["beta2"] == 0.95


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.width=3", "unknown key 'modle'.*did you mean 'model'"),
        ("model.widht=64", "unknown key 'model.widht'.*did you mean 'width'"),
        ("optimizer.warmup=3", "unknown key 'optimizer.warmup'.*did you mean 'warmup_steps'"),
        ("model.width=wide", "model.width.*not 'wide'"),
        ("model.width=-2", "model.width: .*greater than 0"),
        ("model.heads=3", "heads=3 does not divide width=32"),
        ("model.heads=32", "head.* odd"),
        ("batch_size=2.5", "batch_size"),
        ("tokens=100", "either tokens or token_multiplier"),
        ("microbatches=3", "microbatches=3 does not divide batch_size=8"),
        ("mesh.data=0", "mesh"),
        ("data.validation=[]", "at least one"),
        ("data.dataset=../up", "data.dataset"),
        ("data.validation=[a/b/c]", "data.validation"),
        ("data.mixture={a: 0}", "data.mixture.a"),
        ("data.mixture={../up: 1}", "data.mixture"),
        ("model.remat=all", "model.remat"),
        ("seed", "write it as key.key=value"),
        ("batch_size.x=1", "'batch_size' is a value, not a section"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_key(run_file, override, message):
    with pytest.raises(UserError, match=message) as caught:
        configs.load(RunConfig, run_file, [override])
    assert "\n" not in str(caught.value)
    assert str(run_file) in str(caught.value) or override in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not valid YAML"),
        ("- 1", "mapping of keys"),
        (RUN + "batch_size: 9\n", "'batch_size' appears twice"),
        ("batch_size: 8", "key 'model' is missing"),
        ("x: run.yaml", "includes itself"),
        (RUN + "seed: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        configs.load(RunConfig, path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_gets_the_nearest_packaged_one():
    with pytest.raises(UserError, match=r"did you mean 'testbeds/quickstart\.yaml'"):
        configs.load(TestbedConfig, "testbeds/quickstrat.yaml")


def test_a_section_may_be_another_file(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN.replace(RUN.splitlines()[1], "model: models/11m.yaml"))
    assert configs.load(RunConfig, tmp_path / "run.yaml").model.width == 96


def test_the_name_of_another_config_stays_a_name_and_is_looked_for_beside(tmp_path, monkeypatch):
    (tmp_path / "beds" / "quiz").mkdir(parents=True)
    tasks = tmp_path / "beds" / "quiz" / "own.yaml"
    tasks.write_text("tasks: {quiz: {data: quiz.jsonl, type: schema}}\n")
    asked = RUN + "evaluation: {tasks: {config: quiz/own.yaml}}\n"
    (tmp_path / "beds" / "run.yaml").write_text(asked)
    monkeypatch.chdir(tmp_path)
    config = configs.load(RunConfig, "beds/run.yaml")
    assert config.evaluation.tasks is not None
    assert config.evaluation.tasks.config == str(tasks)
    configs.write(config, tmp_path / "resolved.yaml")
    tasks.unlink()
    assert configs.load(RunConfig, tmp_path / "resolved.yaml") == config
    (tmp_path / "beds" / "run.yaml").write_text(asked.replace("quiz/own.yaml", "quickstart"))
    found = configs.load(RunConfig, "beds/run.yaml").evaluation.tasks
    assert found is not None
    assert found.config == "quickstart"


def test_the_identity_changes_with_the_result_and_with_nothing_else(run_file):
    def identity(*overrides: str) -> str:
        return configs.load(RunConfig, run_file, overrides).identity

    same = ["mesh.fsdp=2", "checkpoint.keep=9", "microbatches=2", "model.remat=block"]
    same += ["data.folder=elsewhere", "evaluation.sequences=3", "data.validation=[a]"]
    assert {identity(override) for override in same} == {identity()}
    constant = identity("optimizer.schedule=constant")
    assert identity("optimizer.schedule=constant", "branch_from=elsewhere") == constant
    other = ["seed=1", "model.width=64", "batch_size=16", "optimizer.beta1=0.8", "z_loss_weight=0"]
    other += ["optimizer.schedule=constant", "optimizer.schedule=warmup_stable_decay"]
    other += ["data.dataset=python_docs", "token_multiplier=21", "model.rope_base=100"]
    other += ["data.mixture={a: 1}", "data.mixture={a: 1, b: 2}"]
    assert identity("data.mixture={b: 2, a: 1}") == identity("data.mixture={a: 1, b: 2}")
    assert len({identity(), *map(identity, other)}) == len(other) + 1


def test_the_first_steps_depend_on_all_but_the_end_of_a_run(run_file):
    def first_steps(*overrides: str) -> dict:
        return configs.load(RunConfig, run_file, overrides).first_steps

    same = ["token_multiplier=21", "optimizer.schedule=constant", "optimizer.decay_fraction=0.5"]
    same += ["optimizer.decay_shape=one_minus_sqrt", "optimizer.minimum_learning_rate=0"]
    same += ["mesh.fsdp=2", "data.folder=elsewhere", "checkpoint.keep=9"]
    assert all(first_steps(override) == first_steps() for override in same)
    other = ["seed=1", "model.width=64", "batch_size=16", "optimizer.learning_rate=1"]
    other += ["optimizer.learning_rate_floor=0.1", "optimizer.warmup_steps=7"]
    for override in other:
        changed = first_steps(override).items() - first_steps().items()
        assert [key for key, _ in changed] == [override.partition("=")[0]]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("11m", 10_569_312),
        ("79m", 78_914_048),
        ("154m", 153_677_376),
        ("411m", 411_616_256),
        ("1b", 1_439_795_200),
        ("7b", 6_889_410_560),
    ],
)
def test_the_papers_sizes_count_as_published(name, params):
    model = configs.load(ModelConfig, f"models/{name}.yaml")
    assert counting.nominal_params(model) == params


@pytest.mark.parametrize("path", sorted(PACKAGED.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_packaged_config_loads_and_says_what_it_is_for(path):
    kinds = {"evaluations": TasksConfig, "models": ModelConfig}
    kinds |= {"data": SourceConfig, "runs": RunConfig, "testbeds": TestbedConfig}
    assert path.read_text().startswith("# ")
    config = configs.load(kinds[path.parent.name], path)
    if isinstance(config, TestbedConfig):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "warm-up")  # six of the paper's runs are so short
            assert grid.expand(config)


def test_configs_are_frozen(run_file):
    config = configs.load(RunConfig, run_file)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]
