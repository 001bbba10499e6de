"""What a tokenizer does to text: its tokens in colour, and several tokenizers side by side.

`tokenizer.py --show` and `--compare` print and write what this file makes of ids and counts; it knows no tokenizer.
"""
import html
from dataclasses import dataclass
from pathlib import Path

from experiments.plots import draw_compression
from experiments.report import Figure, Table, write_page
from runtime.files import atomic_write

# Soft backgrounds with black text on them, which are readable on a dark and on a light terminal: numbers of the palette of
# 256 colours, and the same for a page, where the dark ones have white text.
TERMINAL_COLORS = (223, 151, 189, 229, 153, 217)
PAGE_COLORS = ("#ffdfaf", "#afd7af", "#d7d7ff", "#f7f1a8", "#afd7ff", "#ffc0c0")
DARK_PAGE_COLORS = ("#6b4a12", "#2a5a34", "#46467e", "#5c5714", "#1f5078", "#74323a")
VISIBLE = {" ": "·", "\n": "↵\n", "\r": "␍", "\t": "→"}
RARE = 100  # occurrences below which a token has hardly been trained


# -- the tokens of a text ---------------------------------------------------------------------------------------------

def visible(token: bytes) -> str:
    """A token as it is shown: white space by signs, and what is no whole character or cannot be printed by its escape."""
    text = token.decode("utf-8", errors="backslashreplace")
    return "".join(VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def terminal_text(tokens: list[bytes], ids: list[int], with_ids: bool, with_color: bool) -> str:
    """The tokens on backgrounds of alternating colours, or with | between them; the id after each, if asked."""
    texts = [visible(token) + (f"({token_id})" if with_ids else "") for token, token_id in zip(tokens, ids)]
    if with_ids:  # a line break belongs behind the id
        texts = [text.replace("↵\n", "↵") + "\n" * text.count("\n") for text in texts]
    if not with_color:
        return "|".join(texts)
    colors = (TERMINAL_COLORS[i % len(TERMINAL_COLORS)] for i in range(len(texts)))
    # a background must end before a line does, or some terminals paint the rest of the line
    return "".join("\n".join(f"\x1b[48;5;{color};38;5;16m{part}\x1b[0m" if part else "" for part in text.split("\n"))
                   for text, color in zip(texts, colors))


TOKEN_PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5; }}
pre {{ font: 1rem/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
pre span {{ color: #000; border-radius: 3px; padding: .15em 0; }}
{light}
@media (prefers-color-scheme: dark) {{
pre span {{ color: #fff; }}
{dark}
}}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
<pre>{spans}</pre>
</body></html>
"""


def write_token_page(path: Path, title: str, summary: str, tokens: list[bytes], ids: list[int]):
    """An HTML page that needs no other file; the id of a token is shown when the pointer rests on it."""
    n = len(PAGE_COLORS)
    styles = lambda colors: "\n".join(f".t{i} {{ background: {color}; }}" for i, color in enumerate(colors))
    spans = "".join(f'<span class="t{i % n}" title="{token_id}">{html.escape(visible(token))}</span>'
                    for i, (token, token_id) in enumerate(zip(tokens, ids)))
    with atomic_write(path, "w") as file:
        file.write(TOKEN_PAGE.format(title=html.escape(title), summary=html.escape(summary), spans=spans,
                                     light=styles(PAGE_COLORS), dark=styles(DARK_PAGE_COLORS)))


# -- several tokenizers -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TokenizerStats:
    """bytes_per_token: kind of text -> bytes per token. single_token_words: the fraction of words of prose that are one
    token. n_rare: tokens that occur fewer than RARE times in a text. embedding_shares: shape of a model -> the embedding's
    share of its parameters."""
    name: str
    vocab_size: int
    bytes_per_token: dict[str, float]
    single_token_words: float
    n_rare: int
    embedding_shares: dict[str, float]


def embedding_share(vocab_size: int, n_layer: int, width: int) -> float:
    """The share of the embedding, which is the head too, in the parameters of a model whose blocks have 12 width² each:
    attention 4, the feed-forward layer 8."""
    embedding = vocab_size * width
    return embedding / (embedding + 12 * n_layer * width**2)


def comparison_table(stats: list[TokenizerStats]) -> Table:
    """A row per quantity and a column per tokenizer."""
    first = stats[0]
    rows = [("tokens in the vocabulary", *(f"{s.vocab_size:,}" for s in stats))]
    rows += [(f"bytes per token: {kind}", *(f"{s.bytes_per_token[kind]:.2f}" for s in stats))
             for kind in first.bytes_per_token]
    rows += [("words of prose that are one token", *(f"{s.single_token_words:.1%}" for s in stats)),
             (f"tokens seen fewer than {RARE} times", *(f"{s.n_rare:,} ({s.n_rare / s.vocab_size:.0%})" for s in stats))]
    rows += [(f"embedding's share of {shape}", *(f"{s.embedding_shares[shape]:.1%}" for s in stats))
             for shape in first.embedding_shares]
    return Table(("", *(s.name for s in stats)), rows)


def plain_table(table: Table, width: int | None = None) -> str:
    """For a terminal of `width` columns; the numbers are flush right. Columns for which there is no room beside the others
    follow in a table of their own."""
    lines = [table.head, *table.rows]
    first, *widths = (max(map(len, column)) for column in zip(*lines))
    blocks = [[]]  # of columns
    for i, n in enumerate(widths, 1):
        if width and blocks[-1] and first + sum(2 + widths[k - 1] for k in blocks[-1]) + 2 + n > width:
            blocks.append([])
        blocks[-1].append(i)
    return "\n\n".join("\n".join(line[0].ljust(first) + "".join("  " + line[i].rjust(widths[i - 1]) for i in block)
                                 for line in lines) for block in blocks)


def write_tokenizer_page(path: Path, stats: list[TokenizerStats], counted: str):
    """A page with the table and a picture of bytes per token, and the picture alone beside it. counted: the text in which
    occurrences were counted."""
    picture = Figure(draw_compression({s.name: s.bytes_per_token for s in stats}), path.stem)
    notes = (f"Bytes per token: more is better, a text then takes fewer tokens. Prose is that of Python's help(), code that "
             f"of its standard library; the samples of other scripts are about 1 kB each. Tokens seen fewer than {RARE} "
             f"times: in {counted}, where their embeddings are hardly trained. Embedding's share: of the parameters of a "
             f"model whose head is its embedding, and whose blocks have 12 x width² parameters.")
    write_page(path, "Tokenizers", [comparison_table(stats), picture, ("p", notes)])
    with atomic_write(path.with_suffix(".svg"), "w") as file:
        file.write(picture.svg)
