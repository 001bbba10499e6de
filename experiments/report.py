"""Tables as Markdown and CSV, and an HTML page of text, tables and pictures that needs no other file.

    write_page(Path("page.html"), "Title", [("h2", "Results"), Table(("a", "b"), [("1", "2")]), Figure([svg], "curves")])

The page's template is page.html.
"""
import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.files import atomic_write


@dataclass
class Table:
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass
class Figure:
    """panels: SVGs of one size, which a page shows side by side where it is wide enough. name: the id of the figure's
    element in the page."""
    panels: list[str]
    name: str

    @property
    def elements(self) -> list[str]:
        """The <svg> elements, without the XML declaration before them, which HTML does not allow."""
        return [panel[panel.index("<svg"):] for panel in self.panels]

    @property
    def svg(self) -> str:
        """One SVG, for a file, with the panels side by side."""
        if len(self.panels) == 1:
            return self.panels[0]
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', self.panels[0]).groups())
        nested = []
        for i, element in enumerate(self.elements):
            element = re.sub(r'(width|height)="[\d.]+pt"', "", element, count=2)  # points are not the outer viewBox's units
            nested.append(element.replace("<svg", f'<svg x="{i * width:g}" width="{width:g}" height="{height:g}"', 1))
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(nested) * width:g} {height:g}">\n'
                f'{"".join(nested)}</svg>\n')


def align_columns(rows: list[tuple[str, ...]], width: float = 80) -> list[str]:
    """Lines of a table for a terminal, the head first; columns of numbers are flush right. Names in the first column are
    shortened where lines would be longer than `width`."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    widths[0] = max(16, min(widths[0], width - sum(widths[1:]) - 2 * len(widths[1:])))
    shorten = lambda name: name if len(name) <= widths[0] else f"{name[:widths[0] - 1]}…"
    aligns = [str.ljust] + [str.rjust if re.match(r"[-+]?\d", rows[-1][i]) else str.ljust for i in range(1, len(widths))]
    return ["  ".join(align(text, n) for align, text, n in zip(aligns, (shorten(row[0]), *row[1:]), widths)).rstrip()
            for row in rows]


def split_columns(rows: list[tuple[str, ...]], width: float) -> list[list[tuple[str, ...]]]:
    """The table `rows`, or where its lines would be longer than `width`, several, each with the first column of it."""
    first, *widths = (max(map(len, column)) for column in zip(*rows))
    parts, room = [[]], width - first  # of the numbers of columns
    for i, n in enumerate(widths, 1):
        if parts[-1] and room < n + 2:
            parts, room = [*parts, []], width - first
        parts[-1].append(i)
        room -= n + 2
    return [[(row[0], *(row[i] for i in part)) for row in rows] for part in parts]


def markdown(table: Table) -> str:
    lines = [table.head, ("---",) * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown_page(title: str, parts: list) -> str:
    """The same parts as Markdown, without the figures."""
    blocks = [f"# {title}"]
    for part in parts:
        if isinstance(part, Table):
            blocks.append(markdown(part))
        elif not isinstance(part, Figure):
            tag, text = part
            blocks.append({"h2": f"## {text}", "h3": f"### {text}", "code": f"`{text}`"}.get(tag, text) if tag != "ul" else
                          "\n".join(f"- {item}" for item in text))
    return "\n\n".join(block for block in blocks if block) + "\n"


def csv_table(rows: list[dict]) -> str:
    """rows: a column per key, in the order of its first appearance; "" where a row lacks it."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def write_report(folder: Path, title: str, parts: list, tables: dict[str, list[dict]]):
    """Writes comparison.md, comparison.html, the pictures among the parts, in place of earlier ones, and each table as CSV,
    unless it is empty. parts: see write_page. tables: name -> rows."""
    for old in (*folder.glob("*.svg"), *(folder / f"{name}.csv" for name, rows in tables.items() if not rows)):
        old.unlink(missing_ok=True)
    files = {"comparison.md": markdown_page(title, parts)}
    files |= {f"{part.name}.svg": part.svg for part in parts if isinstance(part, Figure)}
    files |= {f"{name}.csv": csv_table(rows) for name, rows in tables.items() if rows}
    for name, content in files.items():
        with atomic_write(folder / name, "w") as file:
            file.write(content)
    write_page(folder / "comparison.html", title, parts)


def write_page(path: Path, title: str, parts: list):
    """parts: Tables, Figures, and (tag, text) for the tags h2, h3, p, code and ul, where the text of a ul is a list of
    items. Everything but SVG is escaped."""
    import jinja2  # 0.1 s that other commands need not wait
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True)
    tags = {Table: "table", Figure: "figure"}
    parts = [(tags[type(part)], part) if type(part) in tags else part for part in parts]
    with atomic_write(path, "w") as file:
        file.write(environment.get_template("page.html").render(title=title, parts=parts) + "\n")


def write_results(path: Path, rows: list[dict], title: str, note: str, sections: dict[str, tuple[list[str], list]],
                  name: str):
    """Writes `rows` to `path`, a line of JSON each, and beside them a page, .html, and its pictures, .svg. sections: heading
    -> (panels, parts of the page below them); note: a paragraph above all; name: see Figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with atomic_write(path.with_suffix(".svg"), "w") as file:
        file.write(Figure([panel for panels, _ in sections.values() for panel in panels], name).svg)
    write_page(path.with_suffix(".html"), title, [("p", note), *(
        part for heading, (panels, below) in sections.items() for part in (("h2", heading), Figure(panels, name), *below))])
