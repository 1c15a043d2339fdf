"""Edit requests are read from the usual files as they are; what is wrong in one is named by record and field."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_sparse.editing.data import EditingData
from lit_sparse.editing.requests import EditRequest, Probe, read_requests
from lit_sparse.errors import UsageError

KNOWEDIT = {
    "subject": "Wang Jipeng",
    "prompt": "The father of Wang Jipeng is",
    "target_new": "Wang Chonghua",
    "ground_truth": ["Wang Yanjun"],
    "rephrase": "Wang Jipeng's father is",
    "portability": {
        "Reasoning": [{"prompt": "The son of Wang Chonghua is", "ground_truth": [["Wang Jipeng", "W. Jipeng"]]}],
        "Subject_Aliasing": [],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The gender of Wang Jipeng is", "ground_truth": [["male", "man"], ["male"]]},
            {"prompt": ["Wang Jipeng was born in", "The birthplace is"], "ground_truth": "Jinan"},
        ]
    },
}
MEND = {
    "subject": "Ramalinaceae",
    "src": "Which family does Ramalinaceae belong to?",
    "pred": "Ramalinales",
    "rephrase": "What family are Ramalinaceae?",
    "alt": "Lamiinae",
    "answers": ["Lecanorales"],
    "loc": "nq question: types of skiing",
    "loc_ans": "Downhill",
    "cond": "Ramalinales >> Lamiinae",
    "portability": {"Recalled Relation": "(a, b, c)", "New Question": "Which order?", "New Answer": "Cerambycidae"},
}
COUNTERFACT = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native", "She spoke"],
    "neighborhood_prompts": ["Jean Gabin, a native", "The native language of Montesquieu is"],
    "attribute_prompts": [],
}
WIKIBIO = {
    "concept": "john russell reynolds",
    "text": "This is a Wikipedia passage about john russell reynolds.",
    "labels": "Reynolds was born in Romsey.",
    "locality": {"Relation_Specificity": [{"prompt": "His birthplace is", "ground_truth": [["Romsey"]]}]},
}
FLAT = {
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "rephrase_prompt": "Danielle Darrieux, a native",
    "locality_prompt": "Jean Gabin, a native",
    "locality_ground_truth": "French",
}


def write(folder: Path, records, name="edits.json") -> str:
    file = folder / name
    text = "\n".join(map(json.dumps, records)) if name.endswith(".jsonl") else json.dumps(records)
    file.write_text(text, encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("name", ["edits.json", "edits.jsonl"])
def test_knowedit(tmp_path, name):
    (request,) = read_requests(write(tmp_path, [KNOWEDIT], name))
    assert request == EditRequest(
        index=0,
        prompt="The father of Wang Jipeng is",
        target_new="Wang Chonghua",
        subject="Wang Jipeng",
        rephrases=("Wang Jipeng's father is",),
        portability={"Reasoning": (Probe("The son of Wang Chonghua is", ("Wang Jipeng", "W. Jipeng")),)},
        locality={
            "Relation_Specificity": (
                Probe("The gender of Wang Jipeng is", ("male", "man")),
                Probe("Wang Jipeng was born in", ("Jinan",)),
                Probe("The birthplace is", ("Jinan",)),
            )
        },
    )


def test_the_request_that_the_page_shows(tmp_path, recwarn):
    page = (Path(__file__).parents[2] / "docs" / "editing.md").read_text(encoding="utf-8")
    file = tmp_path / "edits.json"
    file.write_text(page.partition("```json\n")[2].partition("```")[0])
    (request,) = read_requests(file)
    assert (request.prompt, request.target_new) == ("The capital of France is", "Lyon")
    assert request.rephrases
    assert list(request.portability) == ["Reasoning"]
    assert request.locality["Neighborhood"][0] == Probe("The capital of Germany is", ("Berlin",))
    table = tmp_path / "edits.csv"
    table.write_text(page[page.index("prompt,subject,") :].partition("```")[0])
    (row,) = read_requests(table)
    assert row == replace(request, portability={})
    assert not recwarn.list


def test_texts_may_have_any_ends_of_lines_in_them(tmp_path):
    prompt = "a\u2028b\x85c\x1dd"
    file = tmp_path / "edits.jsonl"
    line = json.dumps({"prompt": prompt, "target_new": "x"}, ensure_ascii=False)
    file.write_bytes(f"{line}\n{line}\n".encode())
    assert [request.prompt for request in read_requests(file)] == [prompt] * 2


def test_zsre_of_mend(tmp_path):
    (request,) = read_requests(write(tmp_path, [MEND]))
    assert request == EditRequest(
        0,
        "Which family does Ramalinaceae belong to?",
        "Lamiinae",
        "Ramalinaceae",
        ("What family are Ramalinaceae?",),
        {"Reasoning": (Probe("Which order?", ("Cerambycidae",)),)},
        {"Neighborhood": (Probe("nq question: types of skiing", ("Downhill",)),)},
    )


def test_zsre_without_a_new_answer_is_left_out_with_a_warning(tmp_path):
    file = write(tmp_path, [MEND, {**MEND, "alt": ""}, MEND])
    with pytest.warns(UserWarning, match="1 records have an empty new answer"):
        assert [request.index for request in read_requests(file)] == [0, 2]


def test_counterfact(tmp_path):
    (request,) = read_requests(write(tmp_path, [COUNTERFACT]))
    assert request == EditRequest(
        0,
        "The mother tongue of Danielle Darrieux is",
        "English",
        "Danielle Darrieux",
        ("Danielle Darrieux, a native", "She spoke"),
        {},
        {
            "Neighborhood": (
                Probe("Jean Gabin, a native", ("French",)),
                Probe("The native language of Montesquieu is", ("French",)),
            )
        },
    )


def test_wikibio_and_flat_files(tmp_path):
    bio, flat = read_requests(write(tmp_path, [WIKIBIO, FLAT]))
    assert (bio.prompt, bio.target_new, bio.subject) == (WIKIBIO["text"], WIKIBIO["labels"], WIKIBIO["concept"])
    assert bio.locality["Relation_Specificity"][0].answers == ("Romsey",)
    assert flat.rephrases == ("Danielle Darrieux, a native",)
    assert flat.locality == {"Neighborhood": (Probe("Jean Gabin, a native", ("French",)),)}


INPUTS = {
    "prompt": "The capital of {} is",
    "target_new": "Rome",
    "subject": "France",
    "rephrase_prompts": ["The capital city of {}:", "France is governed from"],
    "locality_inputs": {
        "neighborhood": {"prompt": ["Rome is in", "Lyon is in"], "ground_truth": ["Italy", ["France", "the Republic"]]},
        "distracting": {"prompt": "The cat", "ground_truth": "sat"},
    },
    "portability_inputs": {"one_hop": {"prompt": ["Louvre is in"], "ground_truth": ["Rome"]}, "none": None},
}


def test_the_names_of_easyedits_arguments(tmp_path):
    (request,) = read_requests(write(tmp_path, [INPUTS]))
    assert request == EditRequest(
        0,
        "The capital of France is",
        "Rome",
        "France",
        ("The capital city of France:", "France is governed from"),
        {"one_hop": (Probe("Louvre is in", ("Rome",)),)},
        {
            "neighborhood": (Probe("Rome is in", ("Italy",)), Probe("Lyon is in", ("France", "the Republic"))),
            "distracting": (Probe("The cat", ("sat",)),),
        },
    )


def test_cknowedit(tmp_path):
    record = {
        "prompt": "p",
        "target_old": "old",
        "target_new": "new",
        "subject": "s",
        "rephrase": ["r"],
        "portability": [{"prompt": "q", "answer": "a"}, {"prompt": "q2", "answer": "b"}],
        "locality": [{}, {"prompt": "l", "answer": "c"}],
    }
    (request,) = read_requests(write(tmp_path, [record]))
    assert request.portability == {"por_hop": (Probe("q", ("a",)), Probe("q2", ("b",)))}
    assert request.locality == {"loc_hop": (Probe("l", ("c",)),)}


def test_braces_stay_in_the_prompt_of_a_record_without_subject(tmp_path):
    (request,) = read_requests(write(tmp_path, [{"prompt": "In Python, {} is", "target_new": "a set"}]))
    assert request.prompt == "In Python, {} is"


@pytest.mark.parametrize("record", [KNOWEDIT, MEND, COUNTERFACT, WIKIBIO, FLAT, INPUTS])
def test_fields_that_are_not_read_are_named_once(tmp_path, record, recwarn):
    read_requests(write(tmp_path, [record] * 3))
    assert not recwarn.list
    unread = {"locality_prompts": ["l"], "Portability_r": [PROBE], "note": "p", "rephrased": "", "id": 7}
    read_requests(write(tmp_path, [record, {**record, **unread}, {**record, **unread}]))
    (warning,) = recwarn.list
    assert "the fields Portability_r, locality_prompts, note are not read. docs/editing.md" in str(warning.message)


CSV = """prompt,subject,target_new,rephrase,portability_prompt,portability_ground_truth,\
locality_prompt,locality_ground_truth
The capital of {} is,France,"Lyon, of course",{} is governed from,The Louvre is in,Lyon,Rome is in,Italy
"The ""best"" film is",,None,,,,,
"""


@pytest.mark.parametrize("name", ["edits.csv", "edits.TSV"])
def test_columns_of_a_table(tmp_path, name, recwarn):
    file = tmp_path / name
    text = CSV if name.endswith(".csv") else CSV.replace(",", "\t").replace("Lyon\t of", "Lyon, of")
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second = read_requests(file)
    assert first == EditRequest(
        0,
        "The capital of France is",
        "Lyon, of course",
        "France",
        ("France is governed from",),
        {"Reasoning": (Probe("The Louvre is in", ("Lyon",)),)},
        {"Neighborhood": (Probe("Rome is in", ("Italy",)),)},
    )
    assert second == EditRequest(1, 'The "best" film is', "None")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,target_new\na,b\nc\n", "cannot be read as CSV: row 1, counted from 0, has 1 instead of 2 cells"),
        ("prompt,target_new\na,b\nc,\n", "record 1 (counted from 0), field 'target_new': must be a text"),
        ("question,answer\na,b\n", "no other format has the fields ['answer', 'question']"),
        ("prompt,target_new\n", "holds no edit request"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, message):
    file = tmp_path / "edits.csv"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        read_requests(file)
    assert message in str(error.value)


ARGUMENTS = {
    "prompts": ["The capital of {} is", "Who wrote Emma?"],
    "ground_truth": ["Paris", "Austen"],
    "target_new": ["Lyon", "Swift"],
    "subject": ["France", "Emma"],
    "rephrase_prompts": ["{} is governed from", None],
    "locality_inputs": {
        "neighborhood": {"prompt": ["Rome is in", ["a", "b"]], "ground_truth": ["Italy", ["c", "d"]]},
        "distracting": {"prompt": [None, "The cat"], "ground_truth": [None, "sat"]},
    },
    "portability_inputs": {"one_hop": {"prompt": ["The Louvre is in", ""], "ground_truth": ["Lyon", ""]}},
    "train_ds": None,
}


def test_all_arguments_of_easyedit_in_one_object(tmp_path, recwarn):
    first, second = read_requests(write(tmp_path, ARGUMENTS))
    assert (first.prompt, first.target_new, first.rephrases) == (
        "The capital of France is", "Lyon", ("France is governed from",),
    )  # fmt: skip
    assert first.locality == {"neighborhood": (Probe("Rome is in", ("Italy",)),)}
    assert first.portability == {"one_hop": (Probe("The Louvre is in", ("Lyon",)),)}
    assert (second.index, second.subject, second.rephrases, second.portability) == (1, "Emma", (), {})
    assert second.locality == {
        "neighborhood": (Probe("a", ("c",)), Probe("b", ("d",))),
        "distracting": (Probe("The cat", ("sat",)),),
    }
    assert not recwarn.list
    with pytest.warns(UserWarning, match="the fields loc_prompts are not read"):
        read_requests(write(tmp_path, {**ARGUMENTS, "loc_prompts": ["x", "y"]}))
    for change, field in (
        ({"target_new": ["Lyon"]}, "target_new"),
        ({"prompts": "a"}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"keep_original_weight": True}, "keep_original_weight"),
        ({"locality_inputs": {"n": {"prompt": ["a", "b"]}}}, "locality_inputs.n.ground_truth"),
        ({"locality_inputs": {"n": 3}}, "locality_inputs.n.prompt"),
    ):
        with pytest.raises(UsageError, match=f"field '{field}': must be a list with one entry for each of the"):
            read_requests(write(tmp_path, {**ARGUMENTS, **change}))


@pytest.mark.parametrize("name", ["edits.json", "edits.jsonl"])
def test_a_byte_order_mark(tmp_path, name):
    file = Path(write(tmp_path, [KNOWEDIT, KNOWEDIT], name))
    expected = read_requests(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_requests(file) == expected


@pytest.mark.parametrize("missing", ["rephrase", "portability", "locality", "subject", "ground_truth"])
def test_fields_may_be_missing_or_null(tmp_path, missing):
    without, null = read_requests(
        write(tmp_path, [{k: v for k, v in KNOWEDIT.items() if k != missing}, {**KNOWEDIT, missing: None}])
    )
    assert (without.index, null.index) == (0, 1)
    assert vars(without) | {"index": 1} == vars(null)


PROBE = {"prompt": "p", "ground_truth": "a"}


@pytest.mark.parametrize(
    ("record", "field", "what"),
    [
        ({**KNOWEDIT, "target_new": None}, "target_new", "must be a text; it is None"),
        ({**KNOWEDIT, "target_new": "  "}, "target_new", "must be a text"),
        ({**KNOWEDIT, "prompt": 3}, "prompt", "it is 3"),
        ({"prompt": "p"}, "target_new", "is missing; the record has ['prompt']"),
        ({"question": "p", "answer": "a"}, "prompt", "no other format has the fields ['answer', 'question']"),
        ({**KNOWEDIT, "rephrase": ["a", ""]}, "rephrase", "must be a text; it is ''"),
        ({**KNOWEDIT, "portability": "p"}, "portability", "must have kinds of probes as its keys"),
        ({**KNOWEDIT, "portability": ["p"]}, "portability.por_hop[0]", "must have prompt and ground_truth"),
        ({**KNOWEDIT, "portability_inputs": [PROBE]}, "portability_inputs", "must have kinds of probes as its keys"),
        ({**KNOWEDIT, "locality_inputs": {"n": "p"}}, "locality_inputs.n", "must have prompt and ground_truth"),
        (
            {**KNOWEDIT, "locality_inputs": {"n": {"prompt": ["p", "q"], "ground_truth": ["a"]}}},
            "locality_inputs.n.ground_truth",
            "must have 2 answers, one for each prompt",
        ),
        (
            {**KNOWEDIT, "locality_inputs": {"n": {"prompt": ["p", "q"], "ground_truth": ["a", ""]}}},
            "locality_inputs.n[1].ground_truth",
            "must be a text",
        ),
        ({**KNOWEDIT, "portability": {"Reasoning": PROBE}}, "portability.Reasoning", "must be a list of probes"),
        ({**KNOWEDIT, "locality": {"F": [PROBE, "p"]}}, "locality.F[1]", "must have prompt and ground_truth"),
        ({**KNOWEDIT, "locality": {"F": [{"prompt": "p"}]}}, "locality.F[0].ground_truth", "it is None"),
        ({**KNOWEDIT, "locality": {"F": [{**PROBE, "ground_truth": [["a", 1]]}]}}, "locality.F[0].ground_truth", "1"),
        ({**KNOWEDIT, "locality": {"F": [{**PROBE, "ground_truth": []}]}}, "locality.F[0].ground_truth", "it is []"),
        ({**KNOWEDIT, "locality": {"F": [{**PROBE, "prompt": []}]}}, "locality.F[0].prompt", "it is []"),
        ({**MEND, "portability": {"New Question": "q"}}, "portability.ground_truth", "it is None"),
        ({**MEND, "portability": "q"}, "portability", "must have New Question and New Answer"),
        ({**COUNTERFACT, "requested_rewrite": "x"}, "requested_rewrite", "must have prompt, subject and target_new"),
        ({"requested_rewrite": {"prompt": "{}", "subject": "s"}}, "target_new.str", "must be a text; it is None"),
        (
            {
                "requested_rewrite": {"prompt": "{}", "subject": "s", "target_new": {"str": "a"}},
                "neighborhood_prompts": ["n"],
            },
            "target_true.str",
            "must be a text; it is None",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_record_and_field(tmp_path, record, field, what):
    file = write(tmp_path, [KNOWEDIT, record])
    with pytest.raises(UsageError) as error:
        read_requests(file)
    message = str(error.value)
    assert f"{file}, record 1 (counted from 0), field {field!r}: " in message
    assert what in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[", "cannot be read as JSON"),
        (b"{}", "must be a list of records; it is a dict"),
        (b"[]", "holds no edit request"),
        (b"[3]", "record 0 (counted from 0), must be an object; it is 3"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_that_is_none(tmp_path, content, message):
    file = tmp_path / "edits.json"
    file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_requests(file)
    assert message in str(error.value)
    assert str(file) in str(error.value)
    with pytest.raises(UsageError, match="cannot be read"):
        read_requests(tmp_path / "absent.json")


# The data module.


def served(data: EditingData) -> list[list[list[int]]]:
    data.setup("test")
    return [[[request.index for request in group] for group in batch] for batch in data.test_dataloader()]


def test_requests_are_chosen_and_grouped(tmp_path):
    file = write(tmp_path, [KNOWEDIT] * 7)
    assert served(EditingData(file)) == [[[0], [1], [2], [3], [4], [5], [6]]]
    assert served(EditingData(file, first=2, limit=3, side_by_side=1)) == [[[2]], [[3]], [[4]]]
    assert served(EditingData(file, first=1, batch_size=4)) == [[[1, 2, 3, 4], [5, 6]]]
    assert served(EditingData(file, batch_size=2, side_by_side=3)) == [[[0, 1], [2, 3], [4, 5]], [[6]]]
    with pytest.raises(UsageError, match="has 7 requests, and first is 7: none is left"):
        served(EditingData(file, first=7))


@pytest.mark.parametrize("side_by_side", [1, 2, 10])
@pytest.mark.parametrize(("count", "processes"), [(7, 2), (2, 2), (8, 3), (23, 2)])
def test_processes_share_requests_without_repeating_any(tmp_path, count, processes, side_by_side):
    data = EditingData(write(tmp_path, [KNOWEDIT] * count), side_by_side=side_by_side)
    shares = []
    for rank in range(processes):
        data.trainer = SimpleNamespace(world_size=processes, global_rank=rank)
        batches = served(data)
        assert len(data.test_dataloader()) == len(batches) > 0
        assert max(map(len, batches)) <= side_by_side
        shares.append([index for batch in batches for group in batch for index in group])
    assert sorted(index for share in shares for index in share) == list(range(count))


def test_more_processes_than_edits_are_refused(tmp_path):
    data = EditingData(write(tmp_path, [KNOWEDIT] * 4), batch_size=2)
    data.trainer = SimpleNamespace(world_size=3, global_rank=2)
    with pytest.raises(UsageError, match="There are 2 edits to make of 4 requests, and 3 processes"):
        served(data)


@pytest.mark.parametrize(("argument", "value"), [("first", -1), ("limit", 0), ("batch_size", 0), ("side_by_side", 0)])
def test_arguments_outside_their_range(argument, value):
    with pytest.raises(UsageError, match=f"{argument} .*got {value}"):
        EditingData("x.json", **{argument: value})


# The published files, where they are.

FILES = {
    "ZsRE-test-all.json": ({"Reasoning", "Logical_Generalization", "Subject_Aliasing"}, {"Relation_Specificity"}),
    "recent_test.json": (
        {"Reasoning", "Logical_Generalization", "Subject_Aliasing"},
        {"Relation_Specificity", "Forgetfulness"},
    ),
    "recent_train.json": (
        {"Reasoning", "Logical_Generalization", "Subject_Aliasing"},
        {"Relation_Specificity", "Forgetfulness"},
    ),
    "test_cf.json": (
        {"Reasoning", "Logical_Generalization", "Subject_Aliasing"},
        {"Relation_Specificity", "Forgetfulness"},
    ),
    "train_cf.json": (
        {"Reasoning", "Logical_Generalization", "Subject_Aliasing"},
        {"Relation_Specificity", "Forgetfulness"},
    ),
    "zsre_mend_eval_portability_gpt4.json": ({"Reasoning"}, {"Neighborhood"}),
}


@pytest.mark.parametrize("name", FILES)
def test_published_files(name):
    folder = os.environ.get("LIT_SPARSE_EDITING_DATA")
    if folder is None:
        pytest.skip("set LIT_SPARSE_EDITING_DATA to a folder with KnowEdit's and EasyEdit's files")
    requests = read_requests(Path(folder) / name)
    assert len(requests) == 300
    assert ({k for r in requests for k in r.portability}, {k for r in requests for k in r.locality}) == FILES[name]
