import pytest

from trainer.chat import find_answer, find_call, is_formatted, system_prompt, turn_text

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
    ("text", "answer"),
    [
        (ANSWER, "2"),
        ("<answer> a </answer><answer>b</answer>", "b"),
        ("<answer>never closed", None),
        ("<answer>outer <answer>inner</answer>", "inner"),
        ("<answer></answer>", ""),
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
        (["<reason>x<answer>1</answer></reason>"], False),  # the answer is inside the reason
        ([turn_text("two", answer="1") + "<answer>2</answer>"], False),
    ],
)
def test_is_formatted(turns, formatted):
    assert is_formatted(turns) is formatted
