import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.data.vocabularies import ByteVocabulary, vocabulary
from scaling_jax.errors import UserError
from scaling_jax.evaluation import prompts
from scaling_jax.evaluation.tasks import TaskConfig

SHARED = Path(__file__).parents[2] / ".." / "shared"
TOKENIZER = SHARED / "data" / "tokenizer" / "20B_tokenizer.json"
BYTES = ByteVocabulary()

CHOICES = [{"query": f"q{n}", "choices": ["yes", "no"], "gold": n % 2} for n in range(4)]
SCHEMAS = [
    {"context_options": [f"He{n}", f"She{n}"], "continuation": "sat", "gold": n % 2}
    for n in range(3)
]
WORDS = [{"context": f"w{n}", "continuation": f"v{n}"} for n in range(3)]


@pytest.fixture
def build(tmp_path):
    def build(kind, rows, *, max_tokens=2048, ids=BYTES, **settings):
        path = tmp_path / "task.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = TaskConfig(data=path.name, type=kind, **settings)
        return list(prompts.build(task, path, ids, max_tokens, seed=1234))

    return build


def read(prompt):
    """The texts of each choice."""
    return [
        (BYTES.decode(choice.context), BYTES.decode(choice.tokens)) for choice in prompt.choices
    ]


def test_without_shots(build):
    assert read(build("multiple_choice", CHOICES)[0]) == [("q0", " yes"), ("q0", " no")]
    asked = build("multiple_choice", CHOICES, continuation_delimiter="\nAnswer: ")
    assert read(asked[1]) == [("q1\nAnswer:", " yes"), ("q1\nAnswer:", " no")]
    assert read(build("language_modeling", WORDS)[2]) == [("w2", " v2")]


def test_shots_are_solved_and_stand_before_the_question(build):
    # random.Random(1234): sample(range(3), 2) is [1, 0], for question 1 then [0, 2], ...
    asked = build("language_modeling", WORDS, shots=2, continuation_delimiter=" = ")
    assert [read(prompt)[0] for prompt in asked] == [
        ("w1 = v1\nw2 = v2\nw0 =", " v0"),
        ("w0 = v0\nw2 = v2\nw1 =", " v1"),
        ("w0 = v0\nw1 = v1\nw2 =", " v2"),
    ]


def test_a_schema_gets_its_delimiters_only_after_shots(build):
    assert read(build("schema", SCHEMAS)[0]) == [("He0", " sat"), ("She0", " sat")]
    asked = build("schema", SCHEMAS, shots=2, continuation_delimiter=" ... ")
    start = "She1 ... sat\nHe2 ... sat\n"
    assert read(asked[0]) == [(f"{start}He0 ...", " sat"), (f"{start}She0 ...", " sat")]


def test_a_prompt_string_counts_as_something_before(build):
    assert read(build("language_modeling", WORDS, prompt_string="Go.")[0]) == [
        ("Go.\nw0", " v0"),
    ]


def test_a_continuation_that_has_its_space_gets_no_other(build):
    rows = [CHOICES[0] | {"choices": [" yes", "no"]}]
    assert [after for _, after in read(build("multiple_choice", rows)[0])] == [" yes", " no"]


def test_a_continuation_can_go_on_in_a_word(build):
    rows = [{"context": "in a wo", "continuation": "rd"}]
    plain = {"continuation_delimiter": "", "continuation_space": False}
    assert read(build("language_modeling", rows, **plain)[0]) == [("in a wo", "rd")]


def test_the_right_end_of_a_long_context_is_kept(build):
    long, short = build("multiple_choice", [CHOICES[0] | {"query": "0123456789"}], max_tokens=8)[
        0
    ].choices
    assert (BYTES.decode(long.context), long.truncated) == ("6789", True)
    assert (BYTES.decode(short.context), short.truncated) == ("56789", True)
    asked = build("multiple_choice", [CHOICES[0] | {"query": "0123"}], max_tokens=8)[0]
    assert asked.truncated == 0


def test_an_answer_is_left_out_and_room_is_left_for_the_longest(build):
    rows = [
        {
            "context": f"{n}+{n}?",
            "answer": str(2 * n),
            "aliases": ["x" * n],
            "chain_of_thought": "t",
        }
        for n in range(3, 6)
    ]
    asked = build("question_answering", rows, shots=1, continuation_delimiter=" A: ", max_tokens=9)
    assert {prompt.answer_tokens for prompt in asked} == {5}
    assert read(asked[0]) == [("? A:", "")]
    assert asked[0].aliases == ("6", "xxx")
    thinking = build("question_answering", rows, cot_delimiter=": ")
    assert thinking[0].answer_tokens == len("t: xxxxx") + 10


@pytest.mark.parametrize(
    ("rows", "max_tokens", "words"),
    [
        ([WORDS[0], {"context": "", "continuation": "v"}], 99, "question 1: nothing stands before"),
        ([{"context": "w", "continuation": "12345"}], 6, "question 0: 6 tokens .* max_tokens=6"),
    ],
)
def test_what_cannot_be_scored_is_named(build, rows, max_tokens, words):
    with pytest.raises(UserError, match=rf"task\.jsonl: {words}"):
        build("language_modeling", rows, max_tokens=max_tokens)


@given(st.integers(1, 12), st.integers(0, 14), st.integers(0, 99))
def test_shots_are_other_questions_as_many_as_there_are(count, shots, seed):
    rows = [{"context": f"w{n}", "continuation": f"v{n}"} for n in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = TaskConfig(data=path.name, type="language_modeling", shots=shots)
        for n, prompt in enumerate(prompts.build(task, path, BYTES, 2048, seed)):
            *solved, asked = read(prompt)[0][0].split("\n")
            assert asked == f"w{n}"
            assert len(set(solved)) == len(solved)
            assert f"w{n} v{n}" not in solved
            # composer gives one less where only the question itself could be drawn anew
            assert len(solved) in {min(shots, count - 1), min(shots, count - 1) - 1}


def test_a_digest_sees_ids_gold_and_where_the_context_ends(build):
    def digest(found):
        digest = prompts.Digest()
        for prompt in found:
            digest.add(prompt)
        return digest.sha256

    plain = build("multiple_choice", CHOICES)
    assert digest(plain) == digest(build("multiple_choice", CHOICES))
    other = [CHOICES[0] | {"gold": 1}, *CHOICES[1:]]
    assert digest(plain) != digest(build("multiple_choice", other))
    first = json.dumps(
        [[[c.context.tolist(), c.tokens.tolist()] for c in plain[0].choices], 0],
        separators=(",", ":"),
    )
    assert digest(plain[:1]) == hashlib.sha256(first.encode()).hexdigest()


def test_spaces_by_vocabulary():
    assert prompts.needs_space(BYTES)
    if not TOKENIZER.is_file():
        pytest.skip(f"the tokenizer of GPT-NeoX is not there: {TOKENIZER}")
    assert prompts.needs_space(vocabulary(str(TOKENIZER)))


def test_choices_share_the_memory_of_their_context(build):
    first, second = build("multiple_choice", CHOICES, shots=2)[0].choices
    assert np.shares_memory(first.context, second.context)
