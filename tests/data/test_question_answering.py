"""lit_sparse.data.question_answering: windows, where the answer is in them, and what the user is told."""

import json

import pytest
import torch
from backbones import save_tiny_causal_tokenizer
from datasets import Dataset
from transformers import AutoTokenizer

from lit_sparse import QuestionAnsweringData, UsageError
from lit_sparse.data.windows import answer_tokens

CONTEXT = "The dog was in a house by the river; the cat sat in a tree. Zoe-Ann likes the film of 1984, and it is good."


def row(number, answer, context=CONTEXT, question="What was it?"):
    answers = {"text": [], "answer_start": []}
    if answer is not None:
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
    return {"id": f"q{number}", "question": question, "context": context, "answers": answers}


ROWS = [row(0, "a house"), row(1, "1984"), row(2, "oe-Ann li"), row(3, "one cat", "The man has one cat.")]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return save_tiny_causal_tokenizer(tmp_path_factory.mktemp("gpt2"), add_bos=False, pad_token="<pad>")  # noqa: S106


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write_rows


def prepared(rows, write, tokenizer, stage="validate", **arguments):
    files = dict.fromkeys(("train", "validation", "predict"), write(rows))
    arguments = {"stride": 4, "max_length": 20, "length_grouped": False, **arguments}
    data = QuestionAnsweringData(data_files=files, tokenizer=tokenizer, **arguments)
    data.setup(stage)
    return data


def only_batch(rows, write, tokenizer, **arguments):
    (batch,) = prepared(rows, write, tokenizer, **arguments).val_dataloader()
    return batch


def windows_by_hand(question, context, tokenizer, width, stride):
    """Windows as lists of ids, and for each token of the context its characters, cut step by step."""
    question_ids = tokenizer(question, add_special_tokens=False)["input_ids"]
    whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    tokens = list(zip(whole["input_ids"], whole["offset_mapping"], strict=True))
    head = [tokenizer.cls_token_id, *question_ids, tokenizer.sep_token_id]
    room = width - len(head) - 1
    made, start = [], 0
    while True:
        part = tokens[start : start + room]
        ids = [*head, *(token for token, _ in part), tokenizer.sep_token_id]
        made.append((ids, [(-1, -1)] * len(head) + [place for _, place in part] + [(-1, -1)]))
        if start + room >= len(tokens):
            return made
        start += room - stride


def test_windows_overlap_and_belong_to_their_question(write, bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    batch = only_batch(ROWS, write, bert)
    expected = [
        (number, *window)
        for number, r in enumerate(ROWS)
        for window in windows_by_hand(r["question"], r["context"], tokenizer, 20, 4)
    ]
    assert len(expected) > 2 * len(ROWS)
    assert batch["question"].tolist() == [number for number, _, _ in expected]
    for i, (_, ids, offsets) in enumerate(expected):
        padding = batch["input_ids"].shape[1] - len(ids)
        assert batch["input_ids"][i].tolist() == ids + [tokenizer.pad_token_id] * padding
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * padding
        assert [tuple(pair) for pair in batch["offsets"][i].tolist()] == offsets + [(-1, -1)] * padding
    assert batch["null_positions"].tolist() == [0] * len(expected)
    assert batch["row"].tolist() == [0, 1, 2, 3]
    assert batch["id"] == ["q0", "q1", "q2", "q3"]
    assert batch["context"] == [r["context"] for r in ROWS]
    assert batch["answers"] == [r["answers"]["text"] for r in ROWS]


def test_answers_are_the_tokens_that_hold_them(write, bert):
    """Of each window that holds the answer, the text between the labelled tokens; elsewhere the labels are CLS."""
    batch = only_batch(ROWS, write, bert)
    seen = [0] * len(ROWS)
    for i, question in enumerate(batch["question"].tolist()):
        context, answer = ROWS[question]["context"], ROWS[question]["answers"]
        first, last = int(batch["start_positions"][i]), int(batch["end_positions"][i])
        inside = [pair for pair in batch["offsets"][i].tolist() if pair[0] >= 0]
        start, behind = answer["answer_start"][0], answer["answer_start"][0] + len(answer["text"][0])
        if inside[0][0] <= start and behind <= inside[-1][1]:
            seen[question] += 1
            begin, end = int(batch["offsets"][i][first][0]), int(batch["offsets"][i][last][1])
            # Zoe is spelt, a token a letter; "likes" is one token, which "li" takes whole.
            assert context[begin:end] == ("oe-Ann likes" if question == 2 else answer["text"][0])
        else:
            assert (first, last) == (0, 0)
    assert min(seen) >= 1
    assert sum(seen) < len(batch["question"])


def test_answer_tokens_against_every_pair_of_tokens():
    """The smallest span of tokens whose characters cover the answer, by trying all."""
    offsets = [(-1, -1), (-1, -1), (3, 5), (5, 6), (7, 10), (12, 13), (13, 16), (-1, -1)]
    for first in range(20):
        for behind in range(first + 1, 20):
            spans = [
                (j - i, i, j)
                for i in range(2, 7)
                for j in range(i, 7)
                # Characters between tokens belong to none, so covering them cannot be asked for.
                if not any(offsets[k][0] < behind and offsets[k][1] > first for k in range(2, 7) if not i <= k <= j)
            ]
            touched = any(offsets[k][0] < behind and offsets[k][1] > first for k in range(2, 7))
            expected = min(spans)[1:] if touched and first >= 3 and behind <= 16 else None
            assert answer_tokens(offsets, ("x" * (behind - first), first)) == expected, (first, behind)
    assert answer_tokens(offsets, None) is None
    assert answer_tokens([(-1, -1)] * 3, ("x", 0)) is None


def test_training_is_on_single_windows(write, bert):
    data = prepared(ROWS, write, bert, "fit", batch_size=3)
    (evaluated,) = prepared(ROWS, write, bert, eval_batch_size=4).val_dataloader()
    batches = list(data.train_dataloader())
    wanted = ["attention_mask", "end_positions", "input_ids", "start_positions", "token_type_ids"]
    assert all(sorted(batch) == wanted and len(batch["input_ids"]) <= 3 for batch in batches)

    def windows(batches):
        return sorted(
            (ids[mask == 1].tolist(), int(start), int(end))
            for batch in batches
            for ids, mask, start, end in zip(
                *(batch[k] for k in ("input_ids", "attention_mask", "start_positions", "end_positions")), strict=True
            )
        )

    assert windows(batches) == windows([evaluated])


def test_the_windows_of_a_question_are_held_out_together(write, bert, tmp_path):
    rows = [row(n, word, f"{word} " + "a film of the man " * 6) for n, word in enumerate("abcdefghijkl")]
    data = QuestionAnsweringData(write(rows), tokenizer=bert, validation_fraction=0.25, stride=4, max_length=20)
    data.setup("fit")
    (batch,) = data.val_dataloader()
    held_out = batch["row"].tolist()
    assert len(held_out) == 3
    assert [rows[n]["id"] for n in held_out] == batch["id"]
    per_question = (batch["question"] == 0).sum().item()
    assert per_question > 1
    assert sum(len(b["input_ids"]) for b in data.train_dataloader()) == 9 * per_question


def test_prediction_needs_no_answers(write, bert):
    rows = [{k: v for k, v in r.items() if k != "answers"} for r in ROWS]
    data = prepared(rows, write, bert, "predict", eval_batch_size=3)
    first, second = data.predict_dataloader()
    assert not {"answers", "start_positions", "end_positions"} & set(first)
    assert [*first["id"], *second["id"]] == ["q0", "q1", "q2", "q3"]
    assert second["question"].unique().tolist() == [0]


def nested(rows):
    """Rows as SQuAD's own files have them: two articles, the questions below their paragraphs."""
    articles = []
    for number, part in enumerate((rows[:2], rows[2:])):
        paragraphs = {}
        for r in part:
            starts = zip(r["answers"]["text"], r["answers"]["answer_start"], strict=True)
            answers = [{"text": text, "answer_start": start} for text, start in starts]
            question = {"id": r["id"], "question": r["question"], "answers": answers, "is_impossible": not answers}
            if not answers:
                question["plausible_answers"] = [{"text": "The", "answer_start": 0}]
            paragraphs.setdefault(r["context"], []).append(question)
        listed = [{"context": context, "qas": qas} for context, qas in paragraphs.items()]
        articles.append({"title": str(number), "paragraphs": listed})
    return articles


@pytest.mark.parametrize("version", [{"version": "v2.0"}, {}])
def test_squads_own_files_are_the_same_rows(write, bert, tmp_path, version):
    rows = [*ROWS, row(4, None, ROWS[3]["context"])]
    expected = only_batch(rows, write, bert, unanswerable=True)
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({**version, "data": nested(rows)}))
    arguments = {"tokenizer": bert, "stride": 4, "max_length": 20, "unanswerable": True}
    data = QuestionAnsweringData(data_files={"validation": str(tmp_path / "dev-v2.0.json")}, **arguments)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value


def test_parquet_and_other_column_names(write, bert, tmp_path):
    expected = only_batch(ROWS, write, bert)
    renamed = [{"n": r["id"], "q": r["question"], "text": r["context"], "a": r["answers"]} for r in ROWS]
    Dataset.from_list(renamed).to_parquet(tmp_path / "validation.parquet")
    names = {"id": "n", "question": "q", "context": "text", "answers": "a"}
    data = QuestionAnsweringData(str(tmp_path), tokenizer=bert, stride=4, max_length=20, **names)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert torch.equal(batch["start_positions"], expected["start_positions"])


def test_unanswerable_questions_point_to_cls(write, bert):
    batch = only_batch([*ROWS, row(4, None)], write, bert, unanswerable=True)
    own = batch["question"] == 4
    assert batch["answers"][4] == []
    assert batch["start_positions"][own].tolist() == [0] * int(own.sum())
    assert batch["end_positions"][own].tolist() == [0] * int(own.sum())


def test_a_tokenizer_without_cls_denies_by_its_first_token(write, gpt2):
    batch = only_batch(ROWS[3:], write, gpt2, max_length=40)
    assert batch["null_positions"].tolist() == [0] * len(batch["question"])
    labelled = batch["start_positions"] > 0
    offsets = batch["offsets"][labelled][0]
    first, last = int(batch["start_positions"][labelled][0]), int(batch["end_positions"][labelled][0])
    assert ROWS[3]["context"][int(offsets[first, 0]) : int(offsets[last, 1])].strip() == "one cat"


def refused(rows, write, tokenizer, match, **arguments):
    with pytest.raises(UsageError, match=match) as caught:
        prepared(rows, write, tokenizer, **arguments)
    assert "\n" not in str(caught.value)


def test_answers_that_do_not_fit_are_named(write, bert):
    def answered(texts, starts):
        return [*ROWS, {**ROWS[0], "answers": {"text": texts, "answer_start": starts}}]

    shifted = (
        r"Row 4 .* 'validation' has the answer 'dog' at character 5, where the context has 'og ': mend answer_start"
    )
    refused(answered(["dog"], [5]), write, bert, shifted)
    refused(answered(["dog"], [-3]), write, bert, "Row 4 .* at character -3, where the context has None")
    refused(answered(["dog"], [999]), write, bert, "Row 4 .* at character 999, where the context has ''")
    refused(answered([""], [4]), write, bert, "Row 4 .* has the answer '' at character 4")
    refused(answered(["dog", "a"], [4]), write, bert, "Row 4 .* with as many starts as texts")
    refused(answered([], []), write, bert, "Row 4 .* no answer in the column 'answers': .* set unanswerable to true")
    refused([{**ROWS[0], "answers": "dog"}], write, bert, r"Row 0 .* has 'dog' in the column 'answers', which must be")
    refused([{**ROWS[0], "answers": None}], write, bert, r"Row 0 .* has None in the column 'answers'")


def test_rows_that_do_not_fit_are_named(write, bert):
    found = r"no column 'title'; its columns are \['id', 'question', 'context', 'answers'\]"
    refused(ROWS, write, bert, found, context="title")
    refused([*ROWS, row(4, None, " ")], write, bert, "Row 4 .* no text in the column 'context'", unanswerable=True)
    refused([*ROWS, row(4, "dog", question="")], write, bert, "Row 4 .* no text in the column 'question'")
    long = [*ROWS, row(4, "dog", question="what is it " * 4)]
    room = r"Row 4 .* a question of 12 tokens, which leaves 5 of max_length=20 .*, but stride=5 .*: raise max_length"
    refused(long, write, bert, room, stride=5)
    prepared(long, write, bert, stride=4)
    with pytest.raises(UsageError, match="stride must be at least 0; got -1"):
        QuestionAnsweringData("rows", stride=-1)


def test_nested_files_of_another_form_are_refused(bert, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"data": [{"context": "a dog", "question": "who"}]}))
    data = QuestionAnsweringData(str(tmp_path / "rows.json"), tokenizer=bert, validation_fraction=0.5)
    with pytest.raises(UsageError, match="must have SQuAD's format, data → paragraphs → qas; this one differs"):
        data.setup("fit")
