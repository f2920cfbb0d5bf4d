import pytest

from metis_kernels import HDPOConfig
from trainer.config import RECIPES, Config, ConfigError, LoraConfig, load


def test_defaults_are_those_of_the_library_but_for_the_tool_norm():
    loss = load().rl.loss.hdpo(temperature=1.0)
    assert loss == HDPOConfig(tool_norm="qualifying")


def test_a_file_that_sets_a_part_of_the_loss_keeps_the_rest():
    loss = load(None, ["rl.loss.w_tool=0.3"]).rl.loss
    assert loss == load().rl.loss.model_copy(update={"w_tool": 0.3})


def test_adapters_are_a_section_that_is_absent_or_whole():
    assert load().model.lora is None and load(None, ["model.lora=null"]).model.lora is None
    assert load(None, ["model.lora={}"]).model.lora == LoraConfig()
    lora = load(None, ["model.lora.rank=8", "model.lora.targets=[q_proj]"]).model.lora
    assert (lora.rank, lora.targets) == (8, ("q_proj",))


def test_file_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("rl:\n  lr: 2e-4\n  steps: 5\nseed: 1\n")
    config = load(path, ["seed=7", "rl.loss.w_tool=0.3", "rl.loss.logits_dtype=float32"])
    assert (config.seed, config.rl.steps, config.rl.lr) == (7, 5, 2e-4)
    assert config.rl.loss.hdpo(0.7).w_tool == 0.3
    assert config.rl.loss.hdpo(0.7).temperature == 0.7


def test_what_is_written_can_be_read_back():
    config = load(
        None, ["rl.loss.dual_clip=null", "model.dtype=bfloat16", "model.lora.targets=[v]"]
    )
    assert Config.model_validate(config.to_dict()) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.lrr=1", "did you mean 'rl.lr'"),
        ("w_tool=1", "did you mean 'rl.loss.w_tool'"),
        ("rl.loss.w_tol=1", "did you mean 'rl.loss.w_tool'"),
        ("model.lora.rnk=1", "did you mean 'model.lora.rank'"),
        ("model.lora.targets=[]", "model.lora.targets: .*at least 1 item"),
        ("model.lora.quantize=int4", "'none' or 'nf4', got 'int4'"),
        ("model={freeze_vision: false, lora: {}}", "lora trains adapters of the language model"),
        ("rl.betas=[0.9,1]", "rl.betas.1: .*less than 1, got 1"),
        ("optimizer.kind=adam", "'adamw' or 'adamw8bit', got 'adam'"),
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
    with pytest.raises(ConfigError, match="no configuration file at nowhere.yaml.*: .*tiny_cpu"):
        load("nowhere.yaml")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_by_path_and_by_name(recipe):
    assert load(recipe) == load(recipe.stem)
    assert load(recipe.stem, ["seed=3"]).seed == 3


def test_the_recipe_of_the_tiny_model_is_what_is_built_in():
    assert load("tiny_cpu") == load()


def test_the_recipe_of_80_gb_has_the_hyper_parameters_of_the_reference():
    config = load("qwen3_vl_8b_80gb")
    rl, loss = config.rl, config.rl.loss.hdpo(config.rollout.temperature)
    assert (rl.lr, rl.steps, rl.prompts, rl.group_size) == (1e-6, 200, 128, 16)
    assert rl.prompts // rl.updates == 64 and rl.max_batch_tokens == 40_960
    assert (rl.warmup, rl.decay) == (0, 0)
    assert (config.rollout.max_turns, config.rollout.max_tokens) == (10, 24_576 + 16_384)
    assert loss == HDPOConfig()  # temperature 1, clips of 0.2, w_tool 0.15, no KL
    assert config.model.lora is None and config.optimizer.kind == "adamw8bit"


def test_the_recipe_of_24_gb_is_qlora():
    model = load("qwen3_vl_8b_24gb").model
    assert model.lora.quantize == "nf4" and model.lora.dropout == 0
