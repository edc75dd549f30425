"""The floors of the house (docs/ARCHITECTURE.md), which imports run down only, and their picture.

python docs/house.py     # writes docs/house.svg, prints how many rooms, lines and imports there are
"""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = {  # from the top; a folder stands for its files
    "scripts": ["cifar_main", "main_distillation", "visualize_attention", "position_sweep", "analyze_tokens",
                "discover_objects", "evaluate", "export_model", "run_with_submitit", "bench", "hubconf"],
    "sweep": ["sweep"],
    "small images": ["cifar_train", "cifar_test"],
    "training": ["training"],
    "inspection": ["inspection"],
    "loading": ["loading"],
    "checkpoints": ["checkpoints"],
    "ground": ["models_dynamic", "datasets", "loading.folders", "loading.archives", "loading.labels", "loading.scenes",
               "engine", "utils"],
    "attention": ["inspection.attention"],  # the recorder: the model's own maps come from it
    "tokens": ["tokens"],  # which tokens stand where; the blocks that they pass
}  # fmt: skip


def rooms() -> dict[str, Path]:
    """Dotted names of the project's modules, and their files."""
    folders = [name for names in FLOORS.values() for name in names if (ROOT / name).is_dir()]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in sorted((ROOT / folder).glob("*.py")))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def floor_of(room: str) -> int:
    """0 is the top."""
    floors = list(FLOORS.values())
    found = [i for name in (room, room.partition(".")[0]) for i, names in enumerate(floors) if name in names]
    if not found:
        raise ValueError(f"{room} has no floor: add it to FLOORS in docs/house.py")
    return found[0]


def imports() -> set[tuple[str, str]]:
    """(room, room that it imports), of all rooms."""
    known, found = rooms(), set()
    for room, file in known.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{name}" for name in names)]
            found |= {(room, name) for name in names if name in known}
    return found


def longest_chain() -> list[str]:
    """Rooms, each of which imports the next one."""
    below: dict[str, list[str]] = {room: [] for room in rooms()}
    for room, other in sorted(imports()):
        below[room].append(other)

    @cache
    def chain(room):
        return [room, *max(map(chain, below[room]), key=len, default=[])]

    return max(map(chain, below), key=len)


def lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def draw(file: Path):
    """A box for each room on its floor, with its number of lines."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    files = rooms()
    floors = [[room for room in files if floor_of(room) == i] for i in range(len(FLOORS))]
    heights = [0.42 * max(1.6, -(-len(inside) // 10)) + 0.1 for inside in floors]  # inches
    figure = Figure(figsize=(11, sum(heights)))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 11), ylim=(sum(heights), 0))
    axes.set_axis_off()
    for i, (floor, inside, height) in enumerate(zip(FLOORS, floors, heights)):
        y, names = sum(heights[:i]), FLOORS[floor]
        inside.sort(key=lambda room: next(n for n, name in enumerate(names) if room.partition(".")[0] in name))
        axes.text(0.15, y + height / 2, floor + "/" * (ROOT / floor).is_dir(), weight="bold", va="center")
        rows = -(-len(inside) // 10)
        width, tall = 9.2 / -(-len(inside) // rows), (height - 0.1) / rows
        for n, room in enumerate(inside):
            left, top = 1.7 + n // rows * width, y + 0.1 + n % rows * tall
            box = dict(width=width - 0.08, height=tall - 0.1, facecolor="#e8eef7", edgecolor="#5a78a8")
            axes.add_patch(Rectangle((left, top), **box))
            name = room.rpartition(".")[2]
            name = name.replace("_", "_\n", 1) if len(name) > 11 * width and rows == 1 else name
            text = f"{name}\n{lines(files[room])}"
            size = 8 if rows == 1 else 7
            axes.text(left + width / 2 - 0.04, top + tall / 2 - 0.05, text, fontsize=size, ha="center", va="center")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "house", "font.family": "DejaVu Sans"}):
        figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("house.svg"))
    chain = longest_chain()
    print(f"{len(rooms())} rooms, {sum(map(lines, rooms().values()))} lines, {len(imports())} imports")
    print(f"longest chain of imports: {len(chain)} rooms: {', '.join(chain)}")
