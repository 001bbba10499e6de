"""tokenizer.py --show and --compare: what is printed, and the pages."""
import html
import io
import re
import sys

import pytest
from test_report import parse_page

import tokenizer as tokenizer_script
from experiments.token_report import PAGE_COLORS, embedding_share, terminal_text, visible
from model import GPT, GPTConfig
from text.samples import sample_texts
from tokenizer import Tokenizer

COLOR = r"\x1b\[48;5;(\d+);38;5;16m(.*?)\x1b\[0m"
TEXT = "The theory  of 12 — naïve\n\tthings 🙂\x1b[31m"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def show(tmp_path, monkeypatch, capsys, english):
    """show(text, *flags) -> what a file, or with terminal=True a terminal, gets; the tokenizer is a.json."""
    Tokenizer.train(english[:20], 400).save(tmp_path / "a.json")

    def run(*flags: str, terminal: bool = False) -> str:
        monkeypatch.setenv("TERM", "xterm-256color")
        screen = Terminal() if terminal else sys.stdout
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            tokenizer_script.main([f"--tokenizer_path={tmp_path / 'a.json'}", *flags])
        return screen.getvalue() if terminal else capsys.readouterr().out
    return run


def shown_tokens(tmp_path) -> list[str]:
    tokenizer = Tokenizer.load(tmp_path / "a.json")
    return [visible(tokenizer.tokens[i]) for i in tokenizer.encode(TEXT)]


# -- --show -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("token, text", [
    (b" the", "·the"), (b"\n\n", "↵\n↵\n"), (b"\t\r", "→␍"), ("naïve 中".encode(), "naïve·中"), (b"\xe4\xb8", "\\xe4\\xb8"),
    (b"\x1b[31m", "\\x1b[31m"), ("\u200b\u202e".encode(), "\\u200b\\u202e"), (b"\\x", "\\x")])
def test_what_a_token_looks_like(token, text):
    """Nothing in a text can control the terminal."""
    assert visible(token) == text


def test_tokens_are_separated_where_there_is_no_terminal(show, tmp_path):
    printed = show(f"--show={TEXT}")
    assert printed.startswith("|".join(shown_tokens(tmp_path)) + "\n") and "\x1b" not in printed
    assert re.search(rf"\d+ tokens of .*a.json, {len(TEXT.encode())} bytes: \d\.\d\d bytes per token, \d+% of words are one "
                     "token\n", printed)


def test_tokens_are_coloured_in_a_terminal(show, tmp_path, monkeypatch):
    printed = show(f"--show={TEXT}", terminal=True)
    colored = re.findall(COLOR, printed)
    expected = [part for token in shown_tokens(tmp_path) for part in token.split("\n") if part]
    assert [part for _, part in colored] == expected and len({color for color, _ in colored}) == 6
    assert all(a != b for (a, _), (b, _) in zip(colored, colored[1:]))
    assert all(line.count("48;5") == line.count("\x1b[0m") for line in printed.splitlines())  # no colour crosses a line
    monkeypatch.setenv("NO_COLOR", "1")
    assert show(f"--show={TEXT}", terminal=True).startswith("|".join(shown_tokens(tmp_path)))


def test_ids_are_shown_when_asked_for(show, tmp_path):
    ids = Tokenizer.load(tmp_path / "a.json").encode(TEXT)
    assert re.findall(r"\((\d+)\)", show(f"--show={TEXT}", "--ids")) == [str(i) for i in ids]
    assert terminal_text([b"a\n", b"b"], [5, 66], True, False) == "a↵(5)\n|b(66)"


def test_page_has_the_tokens_with_their_ids(show, tmp_path):
    show(f"--show={TEXT}")
    page = (tmp_path / "tokens.html").read_text(encoding="utf-8")
    ids = Tokenizer.load(tmp_path / "a.json").encode(TEXT)
    spans = re.findall(r'<span class="t(\d)" title="(\d+)">(.*?)</span>', page, re.DOTALL)
    assert [int(token_id) for _, token_id, _ in spans] == ids
    assert [html.unescape(text) for *_, text in spans] == shown_tokens(tmp_path)
    assert "prefers-color-scheme: dark" in page and page.count("background:") == 2 * len(PAGE_COLORS)
    assert not parse_page(tmp_path / "tokens.html").open
    show("--show=<script>a & b</script>", f"--out_path={tmp_path / 'b.html'}")
    parsed = parse_page(tmp_path / "b.html")
    assert "script" not in parsed.tags and not parsed.addresses


def test_a_file_is_shown_from_its_start(show, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("é" * 30_000, encoding="utf-8")
    printed = show(f"--show={path}")
    assert "20,000 bytes at the start" in printed and "ffd" not in printed
    path.write_bytes(b"one \xff two")
    assert "·t|w|o" in show(f"--show={path}") and str(path) in (tmp_path / "tokens.html").read_text(encoding="utf-8")
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "a.json").rename(folder / "tokenizer.json")
    show("--show=once", f"--tokenizer_path={folder}")
    assert (folder / "tokens.html").exists()


def test_name_of_a_missing_file_is_said_to_be_text(show, tmp_path, capsys):
    show("--show=missing.txt", terminal=True)
    assert "--show=missing.txt: there is no such file" in capsys.readouterr().err
    show("--show=a sentence.", terminal=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flags, words", [
    (["--show="], "--show: is empty"), (["--show=a", "--compare", "a.json"], "give one of them"),
    (["--ids"], "belongs to --show"), (["--out_path=a.html"], "belongs to --show and --compare"),
    (["--show=a", "--out_path=a.txt"], "end in .html"),
    (["--show=a", "--tokenizer_path=none.json"], "none.json: no tokenizer to read"),
    (["--compare", "a.json", "none.json"], "none.json: no tokenizer to read"),
    (["--compare", "text.txt"], "not a tokenizer.json"),
    (["--compare", "a.json", "--dataset=missing.txt"], "no such file"),
    (["--show=a", "--out_path=text.txt/a.html"], "cannot be written")])
def test_bad_flags_are_refused(tmp_path, monkeypatch, refused, flags, words):
    monkeypatch.chdir(tmp_path)
    Tokenizer.train(["once upon a time"] * 9, 270).save("a.json")
    (tmp_path / "text.txt").write_text("text")
    refused(tokenizer_script.main, ["--tokenizer_path=a.json", *flags], words)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "text.txt"}


# -- --compare --------------------------------------------------------------------------------------------------------

def test_samples_are_of_their_kinds():
    samples = sample_texts()
    assert samples == sample_texts() and all(len(text.splitlines()) >= 8 for text in samples.values())
    count = lambda kind, pattern: len(re.findall(pattern, samples[kind])) / len(samples[kind])
    assert count("digits", r"\d") > 0.6 and count("prose", "[a-z ]") > 0.8 and "def " in samples["code"]
    assert count("Cyrillic, Greek", "[\u0370-\u04ff]") > 0.7
    assert count("Chinese, Japanese, Korean", "[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]") > 0.7
    assert count("Arabic, Hebrew, Hindi, Thai", "[\u0590-\u06ff\u0900-\u097f\u0e00-\u0e7f]") > 0.7
    assert 0.03 < count("Latin with accents", r"[^\x00-\x7f]") < 0.2


@pytest.mark.parametrize("vocab_size", [1000, 50_000])
def test_embedding_share_is_that_of_a_model(vocab_size):
    model = GPT(GPTConfig(n_layer=3, n_head=2, head_size=64, block_size=16, vocab_size=vocab_size))
    share = model.embed.weight.numel() / model.n_parameters()
    assert embedding_share(vocab_size, 3, 128) == pytest.approx(share, rel=0.02)


@pytest.mark.integration
def test_tokenizers_side_by_side(tmp_path, english, capsys):
    """The numbers of a table in the terminal are those of the page, and what encoding gives."""
    text = "\n\n".join(english[:10])
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    names = ("small", "large")
    tokenizers = [Tokenizer.train([text], vocab_size) for vocab_size in (300, 900)]
    for name, tokenizer in zip(names, tokenizers):
        tokenizer.save(tmp_path / f"{name}.json")
    tokenizer_script.main(["--compare", *(str(tmp_path / f"{name}.json") for name in names),
                           f"--dataset={tmp_path / 'text.txt'}"])
    lines = capsys.readouterr().out.splitlines()
    rows = {re.split(r"\s{2,}", line)[0]: re.split(r"\s{2,}", line)[1:] for line in lines[1:-1]}
    assert lines[0].split() == [*names] and rows["tokens in the vocabulary"] == ["300", "900"]
    for kind, sample in [*sample_texts().items(), (str(tmp_path / "text.txt"), text)]:
        expected = [f"{len(sample.encode()) / len(tokenizer.encode(sample)):.2f}" for tokenizer in tokenizers]
        assert rows[f"bytes per token: {kind}"] == expected
    ids = [tokenizer.encode(text) for tokenizer in tokenizers]
    rare = [sum(ids[k].count(i) < 100 for i in range(tokenizer.vocab_size - 5)) for k, tokenizer in enumerate(tokenizers)]
    assert [cell.split()[0] for cell in rows["tokens seen fewer than 100 times"]] == [str(n) for n in rare]
    page = parse_page(tmp_path / "tokenizers.html")
    assert not page.open and "svg" in page.tags and all(cell in page.text for row in rows.values() for cell in row)
    assert (tmp_path / "tokenizers.svg").stat().st_size > 5000


@pytest.mark.integration
def test_files_of_the_same_name_are_told_apart(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Tokenizer.train(["once upon a time"] * 9, 270).save(tmp_path / name / "tokenizer.json")
    (tmp_path / "text.txt").write_text("once upon a time")
    paths = [str(tmp_path / name / "tokenizer.json") for name in ("a", "b")]
    tokenizer_script.main(["--compare", *paths, f"--out_path={tmp_path / 'x.html'}", f"--dataset={tmp_path / 'text.txt'}"])
    assert capsys.readouterr().out.split()[:2] == ["a", "b"]
