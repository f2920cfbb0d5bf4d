import pytest

from metis_kernels import HDPOConfig
from trainer.config import Config, ConfigError, load


def test_defaults_are_those_of_the_library_but_for_the_tool_norm():
    loss = load().rl.loss.hdpo(temperature=1.0)
    assert loss == HDPOConfig(tool_norm="qualifying")


def test_file_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("rl:\n  lr: 2e-4\n  steps: 5\nseed: 1\n")
    config = load(path, ["seed=7", "rl.loss.w_tool=0.3", "rl.loss.logits_dtype=float32"])
    assert (config.seed, config.rl.steps, config.rl.lr) == (7, 5, 2e-4)
    assert config.rl.loss.hdpo(0.7).w_tool == 0.3
    assert config.rl.loss.hdpo(0.7).temperature == 0.7


def test_what_is_written_can_be_read_back():
    config = load(None, ["rl.loss.dual_clip=null", "model.dtype=bfloat16"])
    assert Config.model_validate(config.to_dict()) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.lrr=1", "did you mean 'rl.lr'"),
        ("w_tool=1", "did you mean 'rl.loss.w_tool'"),
        ("rl.loss.w_tol=1", "did you mean 'rl.loss.w_tool'"),
        ("rl.lr=-1", "rl.lr: .*greater than 0, got -1"),
        ("rl.loss.w_tool=-1", "w_tool must be .* >= 0, got -1"),
        ("rl.loss.ratio=word", "'token' or 'sequence', got 'word'"),
        ("rl.steps=many", "valid integer.*got 'many'"),
        ("nonsense", "section.key=value"),
        ("sft=3", "sft: "),
        ("seed.x=1", "seed: "),
    ],
)
def test_a_wrong_setting_is_named_with_its_mend(override, message):
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


def test_a_value_is_not_a_section():
    with pytest.raises(ConfigError, match="seed is a value"):
        load(None, ["seed=1", "seed.x=1"])


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [", "\0"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="run.yaml"):
        load(path)


def test_a_missing_file():
    with pytest.raises(ConfigError, match="no configuration file at nowhere.yaml"):
        load("nowhere.yaml")
