"""Whether a tokenizer.json of the library `tokenizers` gives the same ids as our tokenizer: both encode thousands of texts.

    check_same_ids(tokenizer, to_hf_tokenizer(tokenizer).to_str())
"""
import json
import random
import subprocess
import sys
from itertools import pairwise

from runtime.config import BadInput
from tokenizer import Tokenizer

# Kinds of characters that patterns and libraries treat in different ways. None is newer than Unicode 10: the libraries know
# other versions.
CHARACTERS = [
    "abcdefgxyz", "ABCSTDLMRVE", "éßñçøåÉĐ", "ſKǅʰªºˇ\u0301\u0308", "жЩёαΩς", "שלוםعربي", "हिन्दीक्ष", "ไทยที่", "中文字漢",
    "ひカ한글", "0123456789", "٣४５²½Ⅷ①㊿", " ", "\t\n\r\x0b\x0c", "\u00a0\u2009\u2028\u3000\u200b\ufeff\x85", "''’`\"",
    ".,;:!?-_/\\|()[]{}<>@#$%^&*+=~", "«»—…·。、！¿", "€©→∑√", "🙂👍🏽🇩🇪\u200d\ufe0f", "\x00\x01\x1c\x7f"]
WRITTEN = [
    "The quick brown fox's 12345 jumps — it'LL, 'Cause we've 3.14 reasons.\r\n\r\n   Indented\tcode = f(x)  \n",
    "I'm you're he'd she'll they've it's don't 'S'T'LL 'll've ''s 'x 's1 '\u017f", "I'M YOU'RE HE'D SHE'LL IT'S DON'T",
    "1 12 123 1234 12345 123456 1234567 12345678 123456789", "3.14159 1,000,000 0x1F 1e-9 10:05 a1b22c333d4444e55555",
    " lead  two   three    four\ttab\t\ttabs \t mixed\n line\n\n lines\r\n\r\n windows\r\rmac \n \n  end  ",
    " ", "  ", "\n", " \n", "\n ", "\n\n\n  x", "x \n\n", "x\n", "x ", "x  y", "  1", "\u3000\u3000字", "a\u00a0b",
    "if x[0] != 'it\\'s':\n\treturn f\"{x!r:>10}\"  # 12_345\r\n", "def f(self, *args, **kw) -> None: ...\n    pass\n\n\n",
    "<div class=\"a-b\">&nbsp;</div> https://example.com/a?b=c&d=%20 user@example.com", "C:\\path\\file.txt camelCaseHTTP",
    "El niño pidió «más»: ¿por qué no? L'été, Straße, naïveté. GROẞE İstanbul ĳ ﬁ ﬃ", "Съешь же ещё этих мягких булок",
    "نص عربي مع أرقام ١٢٣٤ و٥٦٪", "हिन्दी में क्षत्रिय १२३४५", "ภาษาไทยไม่มีช่องว่าง ๑๒๓", "我能吞下玻璃。二〇二四年",
    "日本語のテキスト、カタカナ", "한국어 문장입니다 1234",
    "🙂👩\u200d👩\u200d👧\u200d👦🇫🇷 ½ ② Ⅷ x² ㎏ e\u0301 \ufeff \u2028 \x85 \x00",
    "!!! ... ??? --- *** === /// \\\\\\ \n!!!\n\n...\n  ///\n", " !x \"y\" (z)\n'a' -b- _c_ #d @e $1 %2 &f"]
N_RANDOM, N_TOKEN_TEXTS = 3000, 3000
SECONDS = 300  # that the library may take; it needs some

# Run by a process of its own: where the library gives up on a regular expression, it prints a backtrace and may not return.
PROGRAM = """
import sys
del sys.path[0]  # the current folder
import json, tokenizers
saved, texts = json.load(sys.stdin)
tokenizer = tokenizers.Tokenizer.from_str(saved)
tokenizer.encode_special_tokens = True  # special tokens written in a text are text, as they are for us
tokenizer.no_padding(), tokenizer.no_truncation()
json.dump([encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)], sys.stdout)
"""


def check_same_ids(tokenizer: Tokenizer, saved: str):
    """Raises BadInput with a text that is encoded differently. saved: the content of a tokenizer.json of `tokenizers`."""
    texts = [text for text in probe_texts(tokenizer) if tokenizer.can_encode(text)]
    ids, offsets = tokenizer.encode_batch(texts)
    for text, (start, stop), expected in zip(texts, pairwise(offsets.tolist()), encode_with_tokenizers(saved, texts)):
        if (found := ids[start:stop].tolist()) != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
            here, there = (str(ids[at:at + 8])[1:-1] or "nothing" for ids in (found, expected))
            raise BadInput(f"{text[:60]!r} is encoded as {here} here, by tokenizers as {there}, from id {at + 1} of it on")


def encode_with_tokenizers(saved: str, texts: list[str]) -> list[list[int]]:
    """The ids of each text, without those of a post-processor. Raises BadInput when the library fails."""
    try:
        done = subprocess.run([sys.executable, "-c", PROGRAM], input=json.dumps([saved, texts]), capture_output=True,
                              text=True, encoding="utf-8", errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise BadInput(f"tokenizers has not encoded {len(texts):,} short texts within {SECONDS} s") from None
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith(("Onig", "Exception", "Error"))),
                      done.stderr.strip().rpartition("\n")[2])
        raise BadInput(f"the library tokenizers cannot use it ({reason[:120]})")
    return json.loads(done.stdout)


def probe_texts(tokenizer: Tokenizer) -> list[str]:
    """The same texts in every run: written by hand, random characters, every token by itself, and tokens in random order."""
    rng = random.Random(0)
    special = [*tokenizer.special_tokens, *tokenizer.added_tokens]
    kinds = [*CHARACTERS, *([*tokenizer.added_tokens],) * (3 * bool(tokenizer.added_tokens))]
    mixed = ["".join(rng.choice(kind) * rng.choice((1, 1, 1, 2, 3, 4))
                     for kind in rng.choices(kinds, k=rng.randint(1, 12))) for _ in range(N_RANDOM)]
    tokens = [text for token in tokenizer.tokens if (text := decode_or_none(token))]
    chains = ["".join(rng.choices(tokens, k=rng.randint(2, 8))) for _ in range(N_TOKEN_TEXTS)]
    return [*WRITTEN, *mixed, *tokens, *chains, *(f"a{text} {text}b" for text in special)]


def decode_or_none(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None
