"""Tables, pages and pictures of results."""
import html.parser
import math
import re
import statistics
from xml.etree import ElementTree

from experiments.plots import align_evaluations, draw_mean_curves, draw_pareto_fronts, draw_scaling, pareto_front
from experiments.report import (
    Figure,
    Table,
    align_columns,
    csv_table,
    markdown,
    markdown_page,
    split_columns,
    write_page,
)


class PageParser(html.parser.HTMLParser):
    """Checks that every opened tag is closed; collects tags, addresses and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parse_page(path) -> PageParser:
    page = PageParser()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def rows(losses: list[float]) -> list[dict]:
    return [{"step": i, "tokens": 1e6 * i, "seconds": 10.0 * i, "flops": 1e12 * i, "val_loss": loss, "val_bpb": loss / 2}
            for i, loss in enumerate(losses)]


# -- tables and pages -------------------------------------------------------------------------------------------------

def test_markdown_table_escapes_bars():
    assert markdown(Table(("a", "b"), [("1", "x|y"), ("2", "")])) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n| 2 |  |"


def test_csv_has_the_columns_of_all_rows():
    assert csv_table([{"a": 1}, {"a": 2, "b": "x,y"}]) == 'a,b\n1,\n2,"x,y"\n'


def test_markdown_page_by_hand():
    parts = [("code", "ls"), ("h2", "A"), ("ul", ["x", "y"]), ("ul", []), Table(("a",), [("1",)]), Figure(["<svg/>"], "f"),
             ("p", "z")]
    assert markdown_page("T", parts) == "# T\n\n`ls`\n\n## A\n\n- x\n- y\n\n| a |\n| --- |\n| 1 |\n\nz\n"


def test_page_holds_all_parts_in_order(tmp_path):
    write_page(tmp_path / "p.html", "A title", [("h2", "one"), ("p", "two"), ("ul", ["three", "four"]), ("code", "five"),
                                                Table(("six", "seven"), [("eight", "nine")]), ("h3", "ten")])
    page = parse_page(tmp_path / "p.html")
    assert not page.open
    assert page.text.split()[-9:] == ["A", "title", "one", "two", "threefour", "five", "sixseven", "eightnine", "ten"]
    assert [tag for tag in page.tags if tag in ("h1", "h2", "p", "ul", "li", "code", "table", "th", "td", "h3")] == [
        "h1", "h2", "p", "ul", "li", "li", "p", "code", "table", "th", "th", "td", "td", "h3"]


def test_page_escapes_everything_but_svg(tmp_path):
    write_page(tmp_path / "p.html", "a < b", [
        ("p", "<script>alert(1)</script>"), ("ul", ["1 & 2"]), ("code", "x <y>"), ("h2", "<i>"),
        Table(("<h>",), [("<td-1>",)]), Figure(['<?xml version="1.0"?>\n<svg><g/></svg>', "<svg><a/></svg>"], 'a"b')])
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    for raw in ("<script>", "<y>", "<i>", "<h>", "<td-1>", "<?xml"):
        assert raw not in text, raw
    assert "<title>a &lt; b</title>" in text and "1 &amp; 2" in text
    assert '<figure id="a&#34;b"><svg><g/></svg><svg><a/></svg></figure>' in text


def test_a_page_fits_a_narrow_screen_and_a_dark_one(tmp_path):
    """Tables scroll by themselves, panels are placed one below the other, and every color has its dark counterpart."""
    write_page(tmp_path / "p.html", "t", [Table(("a",), [("1",)]), Figure(["<svg/>", "<svg/>"], "f")])
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    style = re.search("<style>(.*)</style>", text, re.DOTALL).group(1)
    assert 'name="viewport" content="width=device-width' in text
    light, dark = (dict(re.findall(r"(--\w+): (#\w+)", block)) for block in re.findall(r":root {(.*?)}", style, re.DOTALL))
    assert light.keys() == dark.keys() and not set(light.values()) & set(dark.values())
    rest = style.partition("body {")[2]
    assert "prefers-color-scheme: dark" in style and not re.search(r"#[0-9a-f]{3}", rest)  # no color but those
    assert "auto-fit" in rest and "overflow-x: auto" in rest and text.count("<svg") == 2


# -- pictures ---------------------------------------------------------------------------------------------------------

def test_mean_curves_name_every_arm_and_are_deterministic():
    curves = {"one": [rows([8.0, 5.0, 4.0]), rows([8.0, 5.2, 4.1])], "two": [rows([8.0, 5.5, 4.5])]}
    panels = draw_mean_curves(curves)
    assert panels == draw_mean_curves(curves) and len(panels) == 3
    for svg, words in zip(panels, ("million tokens", "Bits per byte against FLOPs", "seconds of training")):
        assert all(f">{text}</text>" in svg for text in ("one", "two", words))


def test_panels_side_by_side_are_one_valid_svg():
    panels = draw_mean_curves({"one": [rows([8.0, 5.0])]})
    svg = ElementTree.fromstring(Figure(panels, "f").svg)
    width, height = map(float, svg.get("viewBox").split()[2:])
    places = [(float(part.get("x")), float(part.get("width")), float(part.get("height"))) for part in svg]
    assert places == [(i * width / 3, width / 3, height) for i in range(3)]
    assert Figure(panels[:1], "f").svg == panels[0]


def test_runs_that_end_at_different_steps_are_averaged_step_by_step():
    evaluations = align_evaluations([rows([8.0, 5.0, 4.0, 3.0]), rows([8.0, 5.2, 4.2])])
    assert [[row["val_loss"] for row in at] for at in evaluations] == [[8.0, 8.0], [5.0, 5.2], [3.0, 4.2]]
    assert statistics.mean(row["tokens"] for row in evaluations[-1]) == 2.5e6


def test_pareto_front_by_hand():
    assert pareto_front([(10, 1.6), (20, 1.7), (30, 1.5), (30, 1.55), (10, 1.6)]) == [(10, 1.6), (30, 1.5)]


def test_pareto_picture_draws_arms_with_one_seed():
    """Their margin is infinite, which has no error bar."""
    results = {name: {"bpb": bpb, "bpb_margin": margin, "seconds": 10 * bpb, "peak_memory": 2**20}
               for name, bpb, margin in (("one", 1.6, 0.01), ("two", 1.7, float("inf")))}
    for svg, label in zip(draw_pareto_fronts(results), ("seconds of training", "peak memory, MiB"), strict=True):
        assert all(f">{words}</text>" in svg for words in ("Pareto front", "one", "two", label))


def test_close_losses_have_different_labels_on_a_logarithmic_axis():
    svg, = draw_scaling({"a": ([(1e12, 1.579), (2e12, 1.571)], 1.937, 0.0074)})
    labels = re.findall(r">(1\.5\d*)</text>", svg)
    assert len(labels) > 1 and len(set(labels)) == len(labels)


def test_columns_that_do_not_fit_follow_in_another_table():
    rows = [("", *"abcde"), ("bytes per token", *[f"{i}.0".rjust(20, "1") for i in range(5)])]
    parts = split_columns(rows, 80)
    assert [part[0] for part in parts] == [("", "a", "b"), ("", "c", "d"), ("", "e")]
    assert all(len(line) <= 80 for part in parts for line in align_columns(part))
    assert split_columns(rows, math.inf) == [rows]
