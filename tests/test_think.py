"""think.py: batches, the curriculum, a short run as a command, resuming."""
import numpy as np
import pytest
import torch

import think
from conftest import assert_same, run_rows, saved_training
from dataloader import IGNORE_INDEX
from tasks.checkable import THOUGHT_END
from tasks.thinking import TASKS
from think import ThinkConfig, ThoughtLoader, byte_tokenizer, context_of, encode_answer, pack_rows

BYTES = byte_tokenizer()
TINY = ["--size=3", "--n_layer=1", "--n_head=2", "--head_size=8", "--batch_size=4", "--eval_questions=4", "--device=cpu",
        "--threads=1", "--log_intervals=1"]


def test_only_the_answer_is_a_target():
    context = [{"role": "system", "content": "at once"}, {"role": "user", "content": "1+1"}]
    ids, targets = encode_answer(BYTES, context, "7#2")
    role_ids, end_id = BYTES.chat_token_ids()
    own = [target for target in targets if target != IGNORE_INDEX]
    assert own == [*b"7#2", end_id] and targets[-len(own):] == own
    assert ids[ids.index(role_ids["assistant"]):] == [role_ids["assistant"], *b"7#2"] and len(ids) == len(targets)


def test_rows_are_padded_at_their_end_without_targets():
    idx, targets = pack_rows([([1, 2, 3], [9, 2, 3]), ([4], [5])], 7)
    assert idx.tolist() == [[1, 2, 3], [4, 7, 7]] and targets.tolist() == [[9, 2, 3], [5, IGNORE_INDEX, IGNORE_INDEX]]


@pytest.mark.parametrize("name", TASKS)
def test_batches_hold_right_answers_that_fit_into_the_context(name):
    task, config = TASKS[name], ThinkConfig(task=name, size=TASKS[name].size, batch_size=32)
    loader = ThoughtLoader(config, BYTES, 0)
    for _ in range(4):
        idx, targets = loader.next_batch()
        assert idx.shape == targets.shape and idx.size(1) <= context_of(task, task.size)
        for wanted in targets.tolist():
            text = BYTES.decode_bytes([target for target in wanted if target != IGNORE_INDEX][:-1]).decode()
            assert text.count(THOUGHT_END) == 1
    assert {level.name for level in loader.levels()} == {level.name for level in task.levels}


def test_the_curriculum_adds_a_level_at_a_time_and_no_thoughts_are_one_level():
    config = ThinkConfig(task="addition", size=4)
    loader, n = ThoughtLoader(config, BYTES, 100), len(TASKS["addition"].levels)
    found = []
    for loader.n_batches in range(130):
        found.append(len(loader.levels()))
    assert found == sorted(found) and set(found) == set(range(1, n + 1)) and found[100] == n > found[99]
    assert [level.name for level in ThoughtLoader(ThinkConfig(task="addition", size=4, thoughts=False), BYTES, 100).levels()
            ] == ["at once"]


@pytest.mark.parametrize("flags", [[], ["--loops=2", "--sampled_loops", "--n_layer=3"]], ids=str)
def test_a_run_resumes_bit_for_bit(tmp_path, flags):
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    for path, steps in ((whole, (6,)), (part, (3, 6))):
        for i, n in enumerate(steps):
            more = ["--resume_checkpoint"] if i else ["--task=addition", *TINY, *flags]
            think.main([f"--out_path={path}", f"--max_iter={n}", "--val_intervals=3", "--curriculum_iter=4",
                        "--warmup_iter=0", "--cooldown_frac=0", "--weight_decay=0.1", *more])
    assert_same(list(saved_training(whole)), list(saved_training(part)))
    a, b = run_rows(whole), run_rows(part)
    assert [row["train_loss"] for row in a if "train_loss" in row] == [row["train_loss"] for row in b if "train_loss" in row]
    assert (tmp_path / "whole" / "thinking.html").read_text().count("<svg") == 1
    assert {"exact_match", "exact_match/every 1", "exact_match/at once"} <= a[-1].keys()


def test_a_model_learns_to_add_two_digits_with_their_carry(tmp_path):
    path = tmp_path / "sum.pt"
    torch.manual_seed(0)
    think.main(["--task=addition", "--size=2", f"--out_path={path}", "--max_iter=400", "--val_intervals=400", "--device=cpu",
                "--threads=1", "--n_layer=2", "--batch_size=32", "--curriculum_iter=0", "--eval_questions=40",
                "--verbose=0"])
    last = run_rows(path)[-1]
    assert last["exact_match"] > 0.4 > 0.1 > run_rows(path)[0]["exact_match"]
    assert np.isfinite(last["train_loss"])


@pytest.mark.parametrize("flags, words", [
    ([], ["--task: say what to learn: permutations"]), (["--task=poems"], ["--task=poems: choose one of permutations"]),
    (["--task=addition", "--size=9", "--block_size=20"], ["--block_size=20", "--size=9", "give more"]),
    (["--task=addition", "--size=1"], ["--size=1: must be at least 2"]),
    (["--task=addition", "--size=200"], ["--size=200", "at most"])])
def test_bad_input_is_one_line(tmp_path, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        think.main([*flags, *([f"--out_path={tmp_path / 'a.pt'}"] if flags else [])])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error and all(word in error for word in words), error
    assert not (tmp_path / "a.pt").exists()
