"""Draw `docs/idea.svg`, the picture in docs/MODEL.md: python docs/draw_idea.py"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrow, FancyBboxPatch

DEPTH, CLS_POS, REG_POS, REGISTERS, PATCHES = 9, 6, 3, 2, 5
CLS, PATCH, REGISTER, BLOCK = "#d1495b", "#8d99ae", "#2e86ab", "#edf0f5"


def box(axes, x, y, width, height, colour, text="", size=8, ink="white"):
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="none"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=ink)


def draw():
    figure = Figure(figsize=(10, 3.7))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1.4, DEPTH + 1.35), ylim=(-1.0, 4.35))
    axes.set_axis_off()
    rows = [("CLS", CLS, CLS_POS, 3.0)]
    rows += [("", PATCH, 0, 2.65 - 0.35 * i) for i in range(PATCHES)]
    rows += [("R", REGISTER, REG_POS, 2.55 - 0.35 * (PATCHES + i)) for i in range(REGISTERS)]
    for block in range(DEPTH):
        box(axes, block + 0.3, -0.1, 0.4, 3.55, BLOCK)
        axes.text(block + 0.5, -0.32, f"block {block}", ha="center", fontsize=8, color="0.35")
    for name, colour, enters, y in rows:
        axes.plot((enters + 0.05, DEPTH + 0.1), (y + 0.12, y + 0.12), color=colour, linewidth=0.9, alpha=0.5)
        for block in range(enters, DEPTH):
            box(axes, block + 0.37, y, 0.26, 0.25, colour, name, 6.5 if name == "CLS" else 7.5)
    registers = f"--reg_pos {REG_POS}  --num_reg {REGISTERS}"
    labels = ((f"--cls_pos {CLS_POS}", CLS, CLS_POS, 3.12), (registers, REGISTER, REG_POS, 0.6))
    for words, colour, enters, y in labels:
        axes.add_patch(FancyArrow(enters - 0.5, y, 0.42, 0, width=0.02, head_width=0.14, head_length=0.1, color=colour))
        axes.text(enters - 0.58, y, words, ha="right", va="center", fontsize=9.5, color=colour, family="monospace")
    axes.text(-0.1, 1.95, "patches of\nthe image", ha="right", va="center", fontsize=9, color="0.3")
    axes.text(DEPTH + 0.2, 3.12, "head: class", va="center", fontsize=9, color=CLS)
    title = "The class token and the registers join the sequence [CLS | patches | registers] at the block you choose"
    axes.text((DEPTH - 0.05) / 2, 4.0, title, ha="center", va="center", fontsize=11)
    return figure


if __name__ == "__main__":
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "idea", "font.family": "DejaVu Sans"}):
        draw().savefig(Path(__file__).with_name("idea.svg"), metadata={"Date": None})
