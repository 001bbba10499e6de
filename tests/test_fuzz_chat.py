"""Damaged rows of conversations and of multiple choice end in messages or in BadInput, and commands that read them end
well."""
import json
import math

import pytest
from fuzzing import FUZZ, damaged_bytes, damaged_json, ends_well, fuzz
from hypothesis import strategies as st
from test_chat_forms import CHOICES, FORMS
from test_finetune import QUESTIONS, answer_row

import evaluate
import finetune
from conftest import train_tiny
from runtime.config import BadInput
from tasks.chat_rows import parse_row
from tasks.multiple_choice import parse_choice
from text.messages import check_messages
from tokenizer import ROLES, Tokenizer

CHAT_ROWS = [json.loads(json.dumps(row)) for row, _ in FORMS.values()]
CHOICE_ROWS = [row for row, *_ in CHOICES.values()]
BYTES = Tokenizer.from_ranks({bytes([byte]): byte for byte in range(256)}, "gpt2")


def damaged_one_of(rows: list) -> st.SearchStrategy:
    return st.sampled_from(rows).flatmap(damaged_json).filter(lambda row: isinstance(row, dict))


@FUZZ
def test_rows_of_conversations(n):
    def check(row):
        try:
            messages, unused = parse_row(row)
            check_messages(messages, ROLES)
        except BadInput as error:
            assert len(str(error)) < 2000
            return
        ids, assistant_mask = BYTES.encode_chat(messages)
        assert len(ids) == len(assistant_mask)
        json.dumps([messages, unused], ensure_ascii=False).encode()  # no lone surrogates in what is kept
    fuzz(n * 5, check, row=damaged_one_of(CHAT_ROWS))


@FUZZ
def test_rows_of_choices(n):
    def check(row):
        try:
            choice = parse_choice(row, "here")
        except BadInput as error:
            assert len(str(error)) < 2000
            return
        assert 0 <= choice.label < len(choice.endings) >= 2 and all(choice.endings)
        json.dumps([choice.context, choice.endings, choice.contexts], ensure_ascii=False).encode()
    fuzz(n * 5, check, row=damaged_one_of(CHOICE_ROWS))


@pytest.fixture(scope="module")
def model(data_path, tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("fuzzed") / "gpt.pt", data_path, "--max_iter=1", "--block_size=48")


def write_rows(path, rows: list):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.integration
@FUZZ
def test_evaluations_of_damaged_rows(n, model, tmp_path):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    flags = [f"--checkpoint_path={model}", f"--dataset={path}", f"--out_path={out}", "--overwrite", "--device=cpu"]
    skips = st.sampled_from(["--skip_errors=0", "--skip_errors=1"])

    def check(task, good, row, skip):
        write_rows(path, [good, row, good])
        ends_well(evaluate.main, [*flags, f"--task={task}", skip], keep=[path, model])
    fuzz(n // 2, lambda row, skip: check("choice", CHOICE_ROWS[0], row, skip), row=damaged_one_of(CHOICE_ROWS), skip=skips)
    fuzz(n // 2, lambda row, skip: check("answers", QUESTIONS[0], row, skip), row=damaged_one_of(CHAT_ROWS), skip=skips)


@pytest.mark.integration
@FUZZ
def test_finetunings_on_damaged_files(n, model, tmp_path):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out" / "gpt.pt"
    flags = [f"--checkpoint_path={model}", f"--dataset={path}", f"--out_path={out}", "--overwrite", "--device=cpu",
             "--max_iter=1", "--batch_size=2", "--dtype=fp32", "--answer_tokens=2"]

    def check(row, skip, verbose):  # the report takes a second to draw
        write_rows(path, [*QUESTIONS[:4], row])
        ends_well(finetune.main, [*flags, f"--skip_errors={skip}", f"--verbose={verbose}"], keep=[path, model])
    rows, skip = damaged_one_of(CHAT_ROWS), st.integers(0, 1)
    fuzz(math.ceil(n / 15), check, row=rows, skip=skip, verbose=st.just(1))
    fuzz(math.ceil(n / 3), check, row=rows, skip=skip, verbose=st.just(0))

    def check_bytes(data):
        path.write_bytes(data)
        ends_well(finetune.main, [*flags, "--skip_errors", "--verbose=0"], keep=[path, model])
    write_rows(path, QUESTIONS[:4])
    fuzz(math.ceil(n / 6), check_bytes, data=damaged_bytes(path.read_bytes()))


@FUZZ
def test_answers_of_earlier_steps(n, tmp_path):
    """A resumed run reads them, and its report."""
    path, rows = tmp_path / "answers.jsonl", [answer_row(0, "x"), answer_row(2, "a")]

    def check(rows):
        write_rows(path, rows if isinstance(rows, list) else [rows])
        finetune.write_answers(path, 5, [answer_row(5, "a")])
        answers = finetune.read_answers(path)
        finetune.compare_answers([{"step": 0, "val_loss": 5.0}, {"step": 5, "val_loss": 1.0}], answers)
        assert [row["step"] for row in answers][-1] == 5
    fuzz(n * 2, check, rows=damaged_json(rows))
