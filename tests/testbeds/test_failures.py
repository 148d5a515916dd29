"""A run whose loss is no number is given up once; the others are finished without it."""

import pytest

from scaling_jax import config as configs
from scaling_jax.config import TestbedConfig
from scaling_jax.errors import NonFiniteLossError
from scaling_jax.testbeds import failures, grid, runner

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:walk. .* tokens need the data"),
]


@pytest.fixture(scope="module")
def runs(data_folder):
    model = {"width": 16, "layers": 1, "heads": 2, "vocabulary_size": 40, "sequence_length": 8}
    content = {
        "name": "seeds",
        "run": {
            "model": model,
            "data": {"validation": ["walk"], "folder": str(data_folder)},
            "batch_size": 8,
            "optimizer": {"warmup_steps": 1},
            "evaluation": {"sequences": 8, "batch_size": 8, "bootstrap_samples": 10},
        },
        "sizes": {"s": {}},
        "grid": [
            {
                "role": "fit",
                "datasets": ["walk"],
                "sizes": ["s"],
                "token_multipliers": [1],
                "seeds": [0, 1, 2],
            }
        ],
    }
    return grid.expand(configs.build(TestbedConfig, content, source="seeds.yaml"))


@pytest.fixture
def diverging(monkeypatch, runs):
    """The second seed's loss is no number; how often it was trained."""
    train, tries = runner.train_and_evaluate, []

    def maybe(config, folder, *others):
        if config.seed == 1:
            tries.append(folder)
            folder.mkdir(parents=True, exist_ok=True)
            raise NonFiniteLossError("step 3: loss nan")
        return train(config, folder, *others)

    monkeypatch.setattr(runner, "train_and_evaluate", maybe)
    return tries


def test_the_others_are_finished_and_it_is_not_tried_again(diverging, runs, tmp_path):
    bad = runs[1]
    for _ in range(2):
        finished, told = [], []
        with pytest.raises(NonFiniteLossError, match=f"{bad.name}: step 3: loss nan"):
            finished += runner.run_all(runs, tmp_path, given_up=lambda *a, to=told: to.append(a))
        assert told == [(bad, "step 3: loss nan")]
    assert len(diverging) == 1
    assert [runner.status(run, tmp_path).word for run in runs] == ["done", "failed", "done"]
    assert set(runner.write_table(runs, tmp_path)["seed"]) == {0, 2}


def test_without_the_note_it_is_tried_again(diverging, runs, tmp_path):
    for _ in range(2):
        with pytest.raises(NonFiniteLossError):
            list(runner.run_all([runs[1]], tmp_path))
        (runs[1].folder(tmp_path) / failures.FAILED_FILE).unlink()
    assert len(diverging) == 2


def test_a_damaged_note_counts_as_none(tmp_path, caplog):
    assert failures.reason(tmp_path) is None
    failures.note(tmp_path, "step 3: loss nan")
    assert failures.reason(tmp_path) == "step 3: loss nan"
    (tmp_path / failures.FAILED_FILE).write_text('{"reason": "none"}')
    assert failures.reason(tmp_path) is None
    assert "damaged and not used" in caplog.text
