import pytest

from trainer.chat import (
    SpecialTokens,
    attempts_call,
    find_answer,
    find_call,
    find_calls,
    is_formatted,
    system_prompt,
    turn_text,
)

CALL = turn_text("look", call=("python", {"code": "1 + 1"}))
ANSWER = turn_text("done", answer="2")


def test_system_prompt_lists_the_schemas_or_asks_for_direct_answers():
    schema = {"type": "function", "function": {"name": "python"}}
    with_tools, without = system_prompt([schema]), system_prompt([])
    assert '"name": "python"' in with_tools and "<tool_call>" in with_tools
    assert "tool_call" not in without and "<answer>" in without


def test_find_call_takes_the_call_that_ends_the_turn():
    assert find_call(CALL) == '{"name": "python", "arguments": {"code": "1 + 1"}}'
    assert find_call(ANSWER) is None
    assert find_call("<tool_call>{}</tool_call> and then prose") is None
    assert find_call("no opening tag</tool_call>") is None


@pytest.mark.parametrize(
    ("turn", "calls", "fault"),
    [
        (CALL, 1, None),
        (ANSWER, 0, None),
        ("", 0, None),
        ("<reason>no <tool_call> here</reason><answer>1</answer>", 0, None),
        ("before <tool_call>1</tool_call>", 1, None),
        ("<tool_call>1</tool_call> \n", 1, None),
        ("<tool_call>1</tool_call><tool_call>2</tool_call>", 2, None),
        ("<tool_call>1</tool_call>2", 1, "text behind"),
        ("<tool_call>1</tool_call><tool_call>2", 1, "never closed"),
        ("1</tool_call>", 0, "without a <tool_call>"),
        ("</tool_call><tool_call>1</tool_call>", 0, "without a <tool_call>"),
        ('<tool_call>{"a": "</tool_call>\\"</tool_call>"}</tool_call>', 1, None),
        ('<tool_call>{"a": "b}</tool_call>', 1, None),  # no JSON, but a call
        ("</reason><tool_call>1</tool_call>", 1, None),
    ],
)
def test_find_calls(turn, calls, fault):
    found, problem = find_calls(turn)
    assert len(found) == calls
    assert problem is None if fault is None else fault in problem
    assert attempts_call(turn) is bool(calls or fault)
    assert find_call(turn) == (found[0] if calls == 1 and fault is None else None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (ANSWER, "2"),
        ("<answer> a </answer><answer>b</answer>", "b"),
        ("<answer>never closed", None),
        ("<answer>outer <answer>inner</answer>", "inner"),
        ("<answer></answer>", ""),
        ("<answer>a</answer> <answer>never closed", "a"),
        ("<answer>a</answer> b </answer>", "a"),
        ("</answer><answer>", None),
        ("", None),
    ],
)
def test_find_answer(text, answer):
    assert find_answer(text) == answer


@pytest.mark.parametrize(
    ("turns", "formatted"),
    [
        ([ANSWER], True),
        ([CALL, ANSWER], True),
        ([], False),
        ([CALL], False),  # no answer
        ([CALL, "<answer>2</answer>"], False),  # the second turn does not reason
        (["<reason>a</reason><reason>b<answer>2</answer>"], False),  # unbalanced
        ([turn_text("empty", answer="")], False),
        (["<reason> </reason><answer>2</answer>"], False),  # says nothing
        (["<reason>x<answer>1</answer></reason>"], False),  # the answer is inside the reason
        ([turn_text("two", answer="1") + "<answer>2</answer>"], False),
    ],
)
def test_is_formatted(turns, formatted):
    assert is_formatted(turns) is formatted


def _tokenizer(*added, normalizer=None, words=("a", "b")):
    """A small tokenizer of whole words, of which none is special by itself."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0} | {word: n for n, word in enumerate(words, 1)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer is not None:
        backend.normalizer = getattr(normalizers, normalizer)()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenizer.add_tokens(list(added))
    return tokenizer


def test_special_tokens_are_markup_and_not_words_or_spaces():
    tokenizer = _tokenizer("<tool_call>", "    ", "\u2581\u2581", "neologism", "[INST]")
    special = SpecialTokens(tokenizer)
    assert {tokenizer.convert_ids_to_tokens(index) for index in special.ids} == {
        "<tool_call>",
        "[INST]",
    }
    assert special.escape("a    neologism [INST] <tool_call>") == (
        "a    neologism [ INST] < tool_call>"
    )


def test_a_space_that_completes_another_special_token_is_no_way_through():
    tokenizer = _tokenizer("<|x|>", "< |x|>", "<  |x|>", "\u2603")
    special = SpecialTokens(tokenizer)
    for text in ("<|x|>", "< |x|>", "<  |x|>", "a\u2603b", "<<|x|>|x|>"):
        escaped = special.escape(text)
        ids = tokenizer(escaped, add_special_tokens=False)["input_ids"]
        assert special.ids.isdisjoint(ids), escaped


def test_a_tokenizer_that_folds_text_before_it_looks_for_tokens():
    from tokenizers import AddedToken

    tokenizer = _tokenizer(AddedToken("<end>", normalized=True), normalizer="Lowercase")
    special = SpecialTokens(tokenizer)
    assert not special.ids.isdisjoint(tokenizer("a <END> b")["input_ids"])
    escaped = special.escape("a <END> b")
    assert special.ids.isdisjoint(tokenizer(escaped)["input_ids"]) and "END" in escaped.replace(
        " ", ""
    )
