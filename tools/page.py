"""The report as one HTML page that asks nothing of any network: no script, figures inside it."""
import base64

from tools.runs import require

# Columns of numbers, which stand behind `texts` columns of texts, are set to the right by the class of their table.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>Model Zoo: report</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem;
       margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.wide { overflow-x: auto; overflow-wrap: normal }
table { border-collapse: collapse; border: 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem clamp(.3rem, 1vw, .7rem); text-align: left; border: 0; border-bottom: 1px solid #ddd;
         vertical-align: top }
td { min-width: 4rem; max-width: 26rem; overflow-wrap: break-word }
th { border-bottom: 2px solid #555; vertical-align: bottom }
:is(th, td):first-child { position: sticky; left: 0; background: #fff }
{% for n in range(1, 5) %}
.texts{{ n }} :is(th, td):nth-child(n + {{ n + 1 }}) { text-align: right; min-width: 0 }
.texts{{ n }} td:nth-child(n + {{ n + 1 }}) { white-space: nowrap }
{% endfor %}
tr:hover td { background: #f2f6fa }
img { width: min(100%, 56rem); height: auto }
</style>
</head>
<body>
<h1>Model Zoo: report</h1>
{% for line in head %}
<p>{{ line }}</p>
{% endfor %}
{% for title, table in tables %}
<h2>{{ title }}</h2>
<div class="wide">{{ table | safe }}</div>
{% endfor %}
{% if notes %}
<h2>Notes</h2>
<ul>
{% for note in notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
{% for title, data in figures %}
<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/svg+xml;base64,{{ data }}">
{% endfor %}
</body>
</html>
"""


def make_page(head, tables, notes, figures):
    """Put a page together; every text is escaped.

    Args:
        head, notes: lines.
        tables: as of `make_tables` in report.py.
        figures: of (title, SVG). They go in as images: the names inside one drawing cannot meet those of another.
    """
    with require("pandas").option_context("display.max_colwidth", None):
        tables = [(title, table.to_html(index=False, border=0, classes=f"texts{align.count('left')}"))
                  for title, (table, align) in tables.items()]
    figures = [(title, base64.b64encode(svg).decode()) for title, svg in figures]
    template = require("jinja2").Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    return template.render(head=head, tables=tables, notes=notes, figures=figures)
