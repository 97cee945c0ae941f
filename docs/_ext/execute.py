"""The directive ``execute``: code of a page that is run while the page is built.

What it prints stands below it, and what it draws. So no number, table or
figure of these pages is copied from anywhere: each is what the code does.
"""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import ClassVar

import matplotlib as mpl
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from matplotlib.figure import Figure
from sphinx.util.docutils import SphinxDirective

# One foreground each for Furo's light and dark pages; the background is the page's own. The
# colours of the lines are told apart on both, and by readers who do not see red and green.
FOREGROUNDS = {"light": "#2b2b2b", "dark": "#cfd0d0"}
STYLE = {
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.prop_cycle": mpl.cycler(color=["#3182bd", "#e6842a", "#2a9d78", "#b565c5", "#8c8c8c"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.facecolor": "none",
    "font.size": 9.5,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "path",
    "svg.hashsalt": "fastadam",  # the same file from the same figure
}
INK = (
    "axes.edgecolor",
    "axes.labelcolor",
    "axes.titlecolor",
    "grid.color",
    "text.color",
    "xtick.color",
    "ytick.color",
)


class Execute(SphinxDirective):
    """Run the content; the code of one page shares its names.

    Options
    -------
    hide-code
        Show only what comes of it.
    markup
        What is printed is part of the page, not text to show as it is.
    figure : width and height in inches
        The code draws on ``figure``, a Matplotlib figure. It is run once for
        a light page and once for a dark one.
    alt : text
        What the figure shows, for those who cannot see it.
    """

    has_content = True
    option_spec: ClassVar = {
        "hide-code": directives.flag,
        "markup": directives.flag,
        "figure": lambda text: tuple(float(part) for part in text.split()),
        "alt": directives.unchanged_required,
    }

    def run(self):
        code = "\n".join(self.content)
        shown = []
        if "hide-code" not in self.options:
            block = nodes.literal_block(code, code, language="python")
            self.set_source_info(block)
            shown.append(block)
        try:
            printed = self.draw(code) if "figure" in self.options else self.execute(code)
        except Exception as error:
            raise self.severe(f"execute: {type(error).__name__}: {error}") from error
        shown += self.show(printed)
        if "figure" in self.options:
            shown += [self.image(theme) for theme in FOREGROUNDS]
        return shown

    def execute(self, code, **names):
        page = self.env.temp_data.setdefault("execute_names", {"__name__": "page"})
        page.update(names)
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(code, f"<{self.env.docname}>", "exec"), page)  # noqa: S102
        return out.getvalue()

    def draw(self, code):
        page = self.env.temp_data
        page["execute_figures"] = page.get("execute_figures", 0) + 1
        printed = ""
        for theme, foreground in FOREGROUNDS.items():
            with mpl.rc_context({**STYLE, **dict.fromkeys(INK, foreground)}):
                figure = Figure(figsize=self.options["figure"], layout="constrained")
                printed = self.execute(code, figure=figure, ink=foreground)
                path = Path(self.env.srcdir) / self.place(theme)
                path.parent.mkdir(exist_ok=True)
                figure.savefig(path, metadata={"Date": None})
        return printed

    def place(self, theme):
        number = self.env.temp_data["execute_figures"]
        return f"generated/{self.env.docname.replace('/', '-')}-{number}-{theme}.svg"

    def image(self, theme):
        alt = self.options.get("alt", "")
        classes = ["executed", f"only-{theme}"]
        return nodes.image(uri=f"/{self.place(theme)}", alt=alt, classes=classes)

    def show(self, printed):
        if not printed:
            return []
        if "markup" not in self.options:
            return [nodes.literal_block(printed, printed.rstrip("\n"), language="text")]
        holder = nodes.Element()
        source = f"{self.env.docname} (printed by its code)"
        self.state.nested_parse(StringList(printed.splitlines(), source), 0, holder)
        return holder.children


def setup(app):
    app.add_directive("execute", Execute)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
