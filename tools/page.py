"""The report as one HTML page that asks nothing of any network: no script, figures inside it."""
import base64
from html import escape

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>Model Zoo: report</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
thead th { border-bottom: 2px solid #555; white-space: nowrap }
.number { text-align: right; white-space: nowrap }
tbody tr:hover { background: #f2f6fa }
img { width: min(100%, 56rem); height: auto }
</style>
</head>
<body>
<h1>Model Zoo: report</h1>
"""


def make_page(tables, notes, figures):
    """Put a page together; every text is escaped.

    Args:
        tables: of (title, headings, whether each column holds numbers, rows of texts).
        notes: lines.
        figures: of (title, SVG).
    """
    parts = [HEAD]
    for title, headings, numeric, rows in tables:
        marks = [' class="number"' * number for number in numeric]
        parts += [f'<h2>{escape(title)}</h2>\n<div class="wide"><table>\n<thead><tr>']
        parts += [f"<th{mark}>{escape(heading)}</th>" for mark, heading in zip(marks, headings, strict=True)]
        parts += ["</tr></thead>\n<tbody>\n"]
        for row in rows:
            cells = "".join(f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(marks, row, strict=True))
            parts += [f"<tr>{cells}</tr>\n"]
        parts += ["</tbody></table></div>\n"]
    if notes:
        parts += ["<h2>Notes</h2>\n<ul>\n", *(f"<li>{escape(note)}</li>\n" for note in notes), "</ul>\n"]
    for title, svg in figures:
        # As images, not as elements: the names inside one drawing cannot meet those of another.
        data = base64.b64encode(svg).decode()
        parts += [f'<h2>{escape(title)}</h2>\n<img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}">\n']
    return "".join([*parts, "</body>\n</html>\n"])
