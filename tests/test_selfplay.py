"""selfplay.py: whole runs, resuming, what is said and refused, and a game in a real terminal."""
import os
import pty
import re
import shutil
import signal
import time

import commands
import numpy as np
import pytest
import torch

import rollouts
import selfplay
from conftest import REPO, assert_same, run_rows, saved_training, stderr_lines, train_tiny
from runtime.checkpoint import load_checkpoint, run_folder
from selfplay import describe_collapse, read_matches, spread

TINY = ["--game=nim", "--board=1x2x3", "--n_layer=1", "--n_head=2", "--head_size=8", "--rollout_games=16",
        "--val_intervals=3", "--log_intervals=1", "--warmup_iter=1", "--rating_games=0", "--verbose=0", "--device=cpu",
        "--threads=0"]
RATED = "--rating_games=4"


@pytest.fixture
def run_selfplay(tmp_path):
    """run_selfplay("--max_iter=3", …) -> path of the checkpoint."""
    def run(*flags: str, checkpoint: str = "run.pt"):
        path = tmp_path / checkpoint
        resumes = any(flag.startswith("--resume_checkpoint") for flag in flags)
        tiny = [] if resumes else TINY[2 * any(flag.startswith("--game=") for flag in flags):]
        selfplay.main([f"--out_path={path}", *tiny, *flags])
        return path
    return run


@pytest.fixture(scope="module")
def kuhn(tmp_path_factory):
    """A model of Kuhn poker, likewise."""
    path = tmp_path_factory.mktemp("selfplay") / "kuhn.pt"
    selfplay.main([f"--out_path={path}", "--game=kuhn", *TINY[2:], "--max_iter=1"])
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of Nim that tests share and must leave as it is."""
    path = tmp_path_factory.mktemp("selfplay") / "nim.pt"
    selfplay.main([f"--out_path={path}", *TINY, "--max_iter=3"])
    return path


# -- whole runs -------------------------------------------------------------------------------------------------------

@pytest.mark.integration
def test_nim_is_learnt_from_its_rules_alone(run_selfplay):
    """From random weights to perfect play in seconds. The second player wins this game, so none of its lines is lost."""
    path = run_selfplay("--n_layer=2", "--n_head=4", "--rollout_games=64", "--val_intervals=60", "--max_iter=120",
                        "--average=0.8", "--learning_rate=0.02")
    first, last = (row for row in run_rows(path) if row["step"] in (0, 120))
    assert first["optimal_moves"] < 0.9 < 0.95 < last["optimal_moves"] and last["value_accuracy"] > 0.9
    assert first["lost_lines_second"] > 0 == last["lost_lines_second"]


@pytest.mark.parametrize("flags", [["--mixer=gated_delta"], ["--mlp=grkan"]])
def test_other_architectures_play(run_selfplay, flags):
    path = run_selfplay(*flags, "--max_iter=1")
    before, after = (load_checkpoint(file)["model"] for file in (run_folder(path) / "previous.pt", path))
    assert not torch.equal(before["embed.weight"], after["embed.weight"])
    assert {"optimal_moves", "games", "distinct_games", "perfect_score"} <= run_rows(path)[-1].keys()


def test_a_run_writes_what_it_says(run_selfplay, capsys):
    path = run_selfplay("--max_iter=3", "--verbose=1", RATED)
    out = capsys.readouterr().out
    assert "nim on 1x2x3: looking ahead (one_ply)" in out and "| optimal moves | higher |" in out and "--play" in out
    folder = run_folder(path)
    page = (folder / "selfplay.html").read_text()
    assert "Against exact truth" in page and "Rating among" in page
    assert [row["step"] for row in read_matches(folder)] == [3]
    assert sorted(file.name for file in (folder / "snapshots").iterdir()) == ["00000000.pt", "00000003.pt"]
    assert load_checkpoint(path)["game"] == {"name": "nim", "board": [1, 2, 3]}


def test_games_set_the_length_of_a_run(run_selfplay):
    path = run_selfplay("--games=64", "--updates=2")
    rows = run_rows(path)
    assert rows[-1]["step"] == 8 and rows[-1]["games"] == 64
    assert load_checkpoint(path)["training"]["settings"]["max_iter"] == 8


def test_training_starts_from_a_model_of_the_same_game(run_selfplay, trained):
    path = run_selfplay("--max_iter=1", "--learning_rate=1e-9")
    fresh = load_checkpoint(path)["model"]
    selfplay.main([f"--out_path={path.with_name('b.pt')}", "--game=nim", "--board=1x2x3", f"--checkpoint_path={trained}",
                   "--max_iter=1", "--learning_rate=1e-9", "--verbose=0", "--rollout_games=4", "--batch_size=4"])
    selfplay.main([f"--out_path={path.with_name('b.pt')}", "--resume_checkpoint", "--max_iter=2", "--verbose=0"])
    started, old = load_checkpoint(path.with_name("b.pt"))["model"], load_checkpoint(trained)["model"]
    torch.testing.assert_close(started["embed.weight"], old["embed.weight"], atol=1e-6, rtol=0)
    assert not torch.allclose(fresh["embed.weight"], old["embed.weight"], atol=1e-3)


# -- resuming ---------------------------------------------------------------------------------------------------------

def test_a_stopped_run_goes_on_bit_for_bit(run_selfplay, monkeypatch):
    flags = "--max_iter=9", "--search=puct", "--simulations=3"
    whole = run_selfplay(*flags, checkpoint="whole.pt")
    loss_fn, calls = rollouts.play_loss, iter(range(10 ** 6))

    def watched(model, batch):
        if next(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return loss_fn(model, batch)
    monkeypatch.setattr(selfplay, "play_loss", watched)
    with pytest.raises(SystemExit):
        run_selfplay(*flags, checkpoint="part.pt")
    monkeypatch.undo()
    part = run_selfplay("--resume_checkpoint", checkpoint="part.pt")
    for a, b in zip(saved_training(part), saved_training(whole)):
        assert_same(a, b)


class Killed(BaseException):
    """In place of a SIGKILL, which would end the tests too."""


@pytest.mark.parametrize("flags, rollout", [
    (["--updates=3", RATED], 0), (["--updates=3", RATED], 2), (["--search=puct", "--simulations=3"], 2),
    (["--algorithm=reinforce"], 4), (["--algorithm=imitation"], 2), (["--game=kuhn"], 4)])
def test_a_run_that_is_killed_in_a_rollout_goes_on_bit_for_bit(run_selfplay, monkeypatch, flags, rollout):
    flags = [*flags, "--max_iter=9"]
    whole = run_selfplay(*flags, checkpoint="whole.pt")
    draw, play, moves = rollouts.draw_moves, rollouts.PlayLoader.play, []  # moves: so far, in each rollout

    def counted(loader, model):
        moves.append(0)
        play(loader, model)

    def killed(weights, rng):
        moves[-1] += 1
        if len(moves) == rollout + 1 and moves[-1] == 2:
            raise Killed
        return draw(weights, rng)
    monkeypatch.setattr(rollouts.PlayLoader, "play", counted)
    monkeypatch.setattr(rollouts, "draw_moves", killed)
    with pytest.raises(Killed):
        run_selfplay(*flags, checkpoint="part.pt")
    monkeypatch.undo()
    part = run_selfplay("--resume_checkpoint", checkpoint="part.pt")
    for a, b in zip(saved_training(part), saved_training(whole)):
        assert_same(a, b)
    timings = {"games_per_sec", "positions_per_sec"}
    rows = [[{name: value for name, value in row.items() if name not in timings} for row in run_rows(path)]
            for path in (part, whole)]
    assert rows[0] == rows[1]
    assert read_matches(run_folder(part)) == read_matches(run_folder(whole))


@pytest.mark.integration
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = commands.start([REPO / "selfplay.py", f"--out_path={tmp_path / 'run.pt'}", *TINY, "--max_iter=100000",
                              "--verbose=1"])
    try:
        while not any(row["step"] > 2 for row in run_rows(tmp_path / "run.pt")) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"`python selfplay.py --out_path={tmp_path / 'run.pt'} --resume_checkpoint` continues" in " ".join(error.split())


# -- collapse ---------------------------------------------------------------------------------------------------------

def test_a_collapse_is_said_once(run_selfplay, monkeypatch, capsys):
    """With the flags as they are, of a model that plays the first legal move, whatever it reads."""
    def stubborn(positions, draws, temperature):
        legal = positions.game.legal(positions.state)
        return rollouts.own_targets(positions, draws)._replace(moves=np.eye(legal.shape[1])[legal.argmax(1)])
    monkeypatch.setattr(rollouts, "one_ply_targets", stubborn)
    path = run_selfplay("--max_iter=9", "--rollout_games=64")
    (line,) = [line for line in stderr_lines(capsys.readouterr().err) if "collapsed" in line]
    assert "0.0% differ, and only" in line and run_rows(path)[-1]["distinct_games"] == 0


def test_what_counts_as_a_collapse():
    assert describe_collapse({"distinct_games": 0.05, "optimal_moves": 0.7})
    assert describe_collapse({"distinct_games": 0.05})
    assert not describe_collapse({"distinct_games": 0.05, "optimal_moves": 0.995})  # good play may be narrow
    assert not describe_collapse({"distinct_games": 0.5, "optimal_moves": 0.5})
    assert not describe_collapse({"optimal_moves": 0.0})
    assert "try more --regularisation" in describe_collapse({"exploitability": 0.4, "entropy": 0.001})
    assert not describe_collapse({"exploitability": 0.4, "entropy": 0.3})


# -- ratings ----------------------------------------------------------------------------------------------------------

def test_ratings_go_on_in_another_folder_and_without_earlier_models(run_selfplay):
    path = run_selfplay("--max_iter=6", RATED)
    other = path.with_name("other.pt")
    selfplay.main([f"--resume_checkpoint={path}", f"--out_path={other}", "--max_iter=9", "--verbose=0"])
    assert {row["step"]: row["opponent"] for row in read_matches(run_folder(other))} == {3: 0, 6: 3, 9: 6}
    assert run_rows(other)[-1]["elo_margin"] > 0
    shutil.rmtree(run_folder(path) / "snapshots")
    selfplay.main([f"--out_path={path}", "--resume_checkpoint", "--max_iter=7", "--verbose=0"])
    assert "elo" not in run_rows(path)[-1] and [*(run_folder(path) / "snapshots").iterdir()]


def test_a_new_run_keeps_no_model_of_an_old_one_and_not_all_of_its_own(run_selfplay, monkeypatch):
    monkeypatch.setattr(selfplay, "MAX_SNAPSHOTS", 4)
    for flags in (["--max_iter=9"], ["--max_iter=5", "--val_intervals=1", "--overwrite"]):
        path = run_selfplay(*flags, RATED)
    steps = [int(file.stem) for file in sorted((run_folder(path) / "snapshots").iterdir())]
    assert steps == [0, 2, 4, 5]


def test_spread():
    assert spread([1, 2, 3], 4) == [1, 2, 3] and spread(list(range(10)), 4) == [0, 3, 6, 9] and spread([5], 4) == [5]


# -- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ([], ["--game", "such as --game=tic_tac_toe"]),
    (["--game=chess"], ["--game=chess", "choose one of"]),
    (["--game=connect_four", "--board=4"], ["--board=4", "height"]),
    (["--game=connect_four", "--board=4,5"], ["--board=4,5", "sizes joined by x"]),
    (["--game=nim", "--block_size=5"], ["--block_size=5", "nim on 3x4x5", "13"]),
    (["--game=nim", "--checkpoint_path=missing.pt"], ["missing.pt", "no checkpoint to read"]),
    (["--game=nim", "--algorithm=reinforce", "--replay=3"], ["--replay=3", "--algorithm=reinforce"]),
    (["--game=nim", "--play", "--checkpoint_path=missing.pt"], ["missing.pt", "selfplay.py --game=nim --board=3x4x5"]),
    (["--game=kuhn", "--play"], ["kuhn.pt", "python selfplay.py --game=kuhn --out_path"]),
    (["--game=nim", "--play", "--max_iter=3"], ["--max_iter=3", "--play"]),
    (["--play"], ["--game", "such as --game=tic_tac_toe"]), (["--play", "--task=builtin"], ["--task=builtin", "--play"]),
    (["--resume_checkpoint"], ["--game", "--out_path is enough"]),
    (["--game=nim", "--think=3"], ["--think=3", "without --play"]), (["--game=nim", "--vocab_size=9"], ["--vocab_size=9"]),
    (["--game=connect_four", "--algorithm=imitation"], ["--algorithm=imitation", "connect_four on 6x7 is not solved"])])
def test_bad_input_is_one_line(refused, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    refused(selfplay.main, flags, *words)
    assert not list(tmp_path.iterdir())


def test_models_of_other_things_are_refused(refused, trained, kuhn, tmp_path, data_path):
    text = train_tiny(tmp_path / "text.pt", data_path, "--max_iter=1")
    out = f"--out_path={tmp_path / 'run.pt'}"
    selfplay_main = lambda flags: selfplay.main([*flags, "--max_iter=1"])  # should it not refuse
    refused(selfplay_main, ["--game=nim", f"--checkpoint_path={text}", out], "text.pt", "not those of a game")
    refused(selfplay_main, ["--game=tic_tac_toe", f"--checkpoint_path={trained}", out], "plays nim on 1x2x3")
    refused(selfplay_main, ["--game=nim", f"--checkpoint_path={trained}", out], "--board=1x2x3")
    refused(selfplay_main, ["--game=kuhn", f"--checkpoint_path={trained}", out], "nim on 1x2x3, not kuhn: give --game=nim")
    refused(selfplay.main, ["--game=kuhn", "--play", "--think=3", f"--checkpoint_path={kuhn}"], "--think=3", "hidden")
    refused(selfplay_main, ["--game=nim", f"--checkpoint_path={kuhn}", out], "kuhn, not nim on 3x4x5: give --game=kuhn, or")
    refused(selfplay_main, ["--game=nim", "--board=1x2x3", f"--checkpoint_path={trained}", "--n_layer=3", out],
            "--n_layer=3", "--checkpoint_path")
    assert not (tmp_path / "run.pt").exists()


# -- a game in the terminal -------------------------------------------------------------------------------------------

def play_in_terminal(path, typed: list[str], *flags: str) -> str:
    """What a terminal of its own shows when these lines are typed, each after a prompt."""
    main, other = pty.openpty()
    process = commands.start([REPO / "selfplay.py", "--play", f"--checkpoint_path={path}", *flags], cwd=REPO, stdin=other,
                             stdout=other, stderr=other, env=os.environ | {"TERM": "dumb", "COLUMNS": "80"})
    os.close(other)
    shown, prompts = "", 0
    while True:
        try:
            data = os.read(main, 1024).decode(errors="replace")
        except OSError:  # the process has closed it
            break
        if not data:
            break
        shown += data
        while shown.count("> ") > prompts and prompts < len(typed):
            os.write(main, typed[prompts].encode() + b"\n")
            prompts += 1
    process.wait(timeout=60)
    os.close(main)
    assert process.returncode == 0, shown
    return shown.replace("\r", "")


@pytest.mark.integration
def test_a_game_in_a_terminal(trained):
    shown = play_in_terminal(trained, ["/help", "/think", "9of9", "/back", "1of1", "/new second", "/quit"], "--game=nim",
                             "--board=1x2x3", "--think=5")
    assert "you are first" in shown and "a move   play it: 1of1 1of2 2of2 1of3 2of3 3of3" in shown
    assert re.search(r"move +chosen +loses +draws +wins +visits +search", shown)
    assert "(9of9: not possible here" in shown and "(there is no move to take back)" in shown
    assert "heap 1\nheap 2  ||" in shown and "the model plays " in shown and "you are second" in shown
    assert max(map(len, shown.splitlines())) <= 80 and "Traceback" not in shown


@pytest.mark.integration
def test_games_are_played_to_their_end_in_a_terminal(tmp_path, kuhn):
    """Nim with two heaps of one match, where whoever moves second wins, and cards that are shown or stay hidden."""
    only = tmp_path / "only.pt"
    selfplay.main([f"--out_path={only}", *TINY[2:], "--game=nim", "--board=1x1", RATED, "--max_iter=1"])
    shown = play_in_terminal(only, ["1of1", "/new third", "/new second", "1of2", "1of1", "/quit"], "--game=nim",
                             "--board=1x1")  # of the last two, one is not possible
    assert shown.count("the model wins") == 1 and "you win" in shown.split("you are second")[1]
    assert "(/new third: no such command" in shown and "you won 1, drew 0 and lost 1 of 2 games" in shown
    shown = play_in_terminal(kuhn, ["bet"] * 8 + ["/quit"], "--game=kuhn", "--seed=1")
    assert "you won " in shown and re.search(r"(you win|the model wins) [12] chip", shown)
    for line in shown.splitlines():
        assert not line.startswith("first   ?")  # the person's own card


# -- answers that can be checked --------------------------------------------------------------------------------------

@pytest.mark.integration
def test_answers_are_learnt_from_what_is_right(trained_text, tmp_path, capsys):
    """A whole run of the command; what it learns is in test_grpo.py."""
    path, questions = tmp_path / "answers.pt", tmp_path / "questions.jsonl"
    questions.write_text("".join(f'{{"question": "{i} + 1?", "answer": "{i + 1}"}}\n' for i in range(40)))
    flags = [f"--task={questions}", f"--checkpoint_path={trained_text}", f"--out_path={path}", "--questions=2",
             "--samples=2", "--answer_tokens=4", "--eval_questions=4", "--pass_k=2", "--device=cpu"]
    selfplay.main([*flags, "--max_iter=2", "--val_intervals=1"])
    out = " ".join(capsys.readouterr().out.split())
    assert "2 questions x 2 answers" in out and "exact match of held-out questions" in out and "pass@2" in out
    rows = run_rows(path)
    assert rows[-1]["step"] == 2 and {"exact_match", "pass_at_1", "pass_at_k", "mean_length", "kl"} <= rows[-1].keys()
    assert rows[0]["kl"] == 0 and (run_folder(path) / "selfplay.html").exists()
    selfplay.main([f"--out_path={path}", "--resume_checkpoint", "--max_iter=3", "--verbose=0"])
    assert run_rows(path)[-1]["step"] == 3


@pytest.fixture(scope="module")
def trained_text(tmp_path_factory, data_path):
    """A model of text with a context that holds a question."""
    return train_tiny(tmp_path_factory.mktemp("text") / "gpt.pt", data_path, "--max_iter=1", "--block_size=256",
                      "--batch_size=1", "--val_iter=1")


def test_bad_input_of_answers_is_one_line(refused, tmp_path, trained_text, trained):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "1 + 1?"}\n{"question": "1 + 2?"}\n')
    out = f"--out_path={tmp_path / 'run.pt'}"
    start = [f"--checkpoint_path={trained_text}", out, "--max_iter=1"]
    refused(selfplay.main, [f"--task={questions}", *start], "questions.jsonl", "no question with an answer")
    refused(selfplay.main, ["--task=missing.jsonl", *start], "--task=missing.jsonl", "no such file")
    refused(selfplay.main, ["--task=builtin", "--game=nim", *start], "--task=builtin", "--game=nim")
    refused(selfplay.main, ["--task=builtin", "--n_layer=3", *start], "--n_layer=3")
    refused(selfplay.main, ["--task=builtin", f"--checkpoint_path={trained}", out], "no tokenizer")
    refused(selfplay.main, ["--game=nim", "--samples=3", out], "--samples=3", "--task")
    assert not (tmp_path / "run.pt").exists()
